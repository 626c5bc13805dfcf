"""What the benchmarks measure: the study's networks, noise to feed them, and one step of their training."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apbm_core.compress import fuse
from apbm_core.fusion import FusionSettings
from apbm_core.study.bench.measure import Settings
from apbm_core.study.data.batches import Augmentation, BatchSource
from apbm_core.study.data.datasets import DataSplit
from apbm_core.study.data.images import Images
from apbm_core.study.networks.models import build_model, prunable_convs
from apbm_core.study.networks.widths import solve_model_widths
from apbm_core.study.training.device import CompiledForward, autocast, memory_format
from apbm_core.study.training.lowering import choose_lowered, lowered
from apbm_core.study.training.optimizer import build_optimizer
from apbm_core.study.training.precision import resolve_precision
from apbm_core.study.training.recipes import Recipe, get_recipe, learning_rate

CLASSES = 10
TARGETS = {"vgg16": 0.9274, "resnet56": 0.4884}  # the paper's shares of the parameters removed on CIFAR-10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@cache
def slim_widths(name: str, multiple: int = 1) -> tuple[int, ...]:
    """The widths that meet the paper's target on CIFAR-10."""
    return solve_model_widths(name, CLASSES, TARGETS[name], multiple=multiple).widths


def network(name: str, kind: str) -> nn.Module:
    """A fresh network: "dense", "slim", or "slim/8" and "slim/16" with widths that are multiples of that."""
    torch.manual_seed(0)
    if kind == "dense":
        return build_model(name, CLASSES)
    return build_model(name, CLASSES, slim_widths(name, int(kind.partition("/")[2] or 1)))


def fused_network(name: str, settings: FusionSettings | None = None) -> nn.Module:
    """The slim network with its banks of dense width."""
    keep = dict(zip(prunable_convs(name), slim_widths(name), strict=True))
    return fuse(network(name, "dense"), torch.zeros(1, 3, 32, 32), keep, settings, groups=False)


def random_split(count: int) -> DataSplit:
    """Noise with random labels: a step takes the same time whatever it learns."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    noise = Images(images, torch.randint(CLASSES, (count,), generator=generator))
    return DataSplit(noise, None, noise, MEAN, STD, CLASSES)


def recipe_for(batch_size: int, **overrides: Any) -> Recipe:
    """The "fast" recipe at one small learning rate, so that noise does not make the weights grow."""
    settled = {"schedule": "constant", "warmup": 0.0, "lr": 0.01, "batch_size": batch_size}
    return get_recipe("fast", **(settled | overrides))


class TrainingStep:
    """Calling it takes one step of the training loop on the next batch: input, forward, backward, optimizer.

    The loop itself cannot be stopped between two steps, which taking turns needs. A test holds the weights after some
    steps equal to those that :func:`apbm_core.study.training.loop.train` leaves.
    """

    def __init__(self, model: nn.Module, split: DataSplit, recipe: Recipe, device: torch.device, seed: int = 0):
        self.precision, channels_last = resolve_precision(recipe.precision, recipe.channels_last, device)
        self.layout, self.device, self.recipe = memory_format(channels_last), device, recipe
        self.model = model.to(device, memory_format=self.layout).train()
        self.forward = CompiledForward(model, recipe.compile) if recipe.compile else model
        augmentation = Augmentation(padding=recipe.padding, crop=recipe.crop, flip=recipe.flip)
        source = BatchSource(split.train, split.mean, split.std, recipe.batch_size, device, augmentation, seed)
        self.batches = endless(source)
        self.lowered = choose_lowered(
            self.model, recipe, source.image_size, device, self.precision, bool(channels_last)
        )
        self.optimizer = build_optimizer(model, recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, 0.0)

    def __call__(self) -> None:
        with lowered(self.model, self.lowered):
            self._step()

    def _step(self) -> None:
        with torch.profiler.record_function("bench::input"):
            images, labels = next(self.batches)
            images = images.contiguous(memory_format=self.layout)
        with autocast(self.device, self.precision):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def endless(source: BatchSource) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from source.epoch(epoch)
        epoch += 1


def fastest_step(model: nn.Module, settings: Settings) -> TrainingStep:
    """A step as the recipes take it on this device: precision, layout and lowered layers "auto"."""
    return TrainingStep(model, random_split(2 * settings.batch_size), recipe_for(settings.batch_size), settings.device)
