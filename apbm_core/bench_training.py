"""Benchmarks of training: how fast a step is, what fusion adds to it, and what feeds it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from apbm_core.augment import Augmentation, BatchSource
from apbm_core.bench_measure import Settings, Table, interleave, seconds_of_one
from apbm_core.bench_steps import (
    MEAN,
    STD,
    TARGETS,
    TrainingStep,
    endless,
    fastest_step,
    fused_network,
    network,
    random_split,
    recipe_for,
)
from apbm_core.counting import count_macs, count_parameters
from apbm_core.data import DataSplit
from apbm_core.device import autocast, memory_format
from apbm_core.evaluation import evaluate, evaluation_mode
from apbm_core.fusion import FusionSettings, fused_layers
from apbm_core.optimizer import build_optimizer
from apbm_core.precision import choose_precision
from apbm_core.surgery import compact

_PROBE_SHARE = 16  # arithmetic that the device only emulates is tried on a sixteenth of a batch


def _variants(settings: Settings) -> dict[str, dict[str, Any]]:
    variants = {
        "float32 NCHW": {"precision": "float32", "channels_last": False},
        "float32 NHWC": {"precision": "float32", "channels_last": True},
        "bfloat16 NHWC": {"precision": "bfloat16", "channels_last": True},
    }
    if choose_precision(settings.device)[0] != "bfloat16":
        del variants["bfloat16 NHWC"]
    if settings.compile:
        name, options = list(variants.items())[-1]
        variants[f"{name}, compiled"] = options | {"compile": True}
    return variants


def throughput(settings: Settings) -> list[Table]:
    """Images/s of training steps, for each network and arithmetic."""
    table = Table(
        f"Training throughput, batch {settings.batch_size}",
        ("network", "parameters", "arithmetic", "images/s", "of float32 NCHW", "of dense"),
        notes=[
            "A step: augmented batch, forward, backward, optimizer. NHWC is channels_last, bfloat16 is autocast. slim "
            f"has the widths that remove {TARGETS['vgg16']:.2%} of VGG16's parameters and {TARGETS['resnet56']:.2%} of "
            "ResNet56's; slim/8 and slim/16 restrict them to multiples. 'of dense': the dense network in the same "
            "arithmetic."
        ],
    )
    families = (
        [("vgg16", "dense"), ("vgg16", "slim"), ("vgg16", "slim/8"), ("vgg16", "slim/16")],
        [("resnet20", "dense"), ("resnet56", "dense"), ("resnet56", "slim")],
    )
    for family in families:
        steps = {
            (*member, variant): TrainingStep(
                network(*member), random_split(2 * settings.batch_size), recipe_for(settings.batch_size, **options),
                settings.device,
            )
            for member in family
            for variant, options in _variants(settings).items()
        }  # fmt: skip
        seconds = interleave(steps, settings)
        for (name, kind, variant), took in seconds.items():
            table.add(
                network=f"{name} {kind}",
                parameters=count_parameters(steps[name, kind, variant].model),
                arithmetic=variant,
                **{
                    "images/s": took.map(lambda s: settings.batch_size / s),
                    "of float32 NCHW": seconds[name, kind, "float32 NCHW"] / took,
                    "of dense": None if kind == "dense" else seconds[name, "dense", variant] / took,
                },
            )
        if choose_precision(settings.device)[0] != "bfloat16":
            table.notes.append(_probe_bfloat16(*family[-1], settings))
    return [table]


def _probe_bfloat16(name: str, kind: str, settings: Settings) -> str:
    """Time one step in the arithmetic that the device emulates."""
    batch = max(2, settings.batch_size // _PROBE_SHARE)
    took = {}
    for precision in ("float32", "bfloat16"):
        recipe = recipe_for(batch, precision=precision, channels_last=True)
        step = TrainingStep(network(name, kind), random_split(2 * batch), recipe, settings.device)
        took[precision] = seconds_of_one(step, settings.device)
    return (
        f"bfloat16 is not native here and not measured further: a single step of {name} {kind} on {batch} images took "
        f"{took['bfloat16'] / took['float32']:.1f} times as long as in float32 NHWC."
    )


def fusion_cost(settings: Settings) -> list[Table]:
    """What FilterFusion adds to a step of the slim VGG16."""
    mixing = fused_network("vgg16")
    selecting = fused_network("vgg16", FusionSettings(fuse=False))
    steps = {
        "slim, plain convolutions": fastest_step(compact(mixing), settings),
        "slim, P is a selection": fastest_step(selecting, settings),
        "slim, P is dense": fastest_step(mixing, settings),
    }
    alone = {
        "alone: P W of all layers, forward": _weights_of(steps["slim, P is dense"].model, backward=False),
        "alone: P W of all layers, forward and backward": _weights_of(steps["slim, P is dense"].model, backward=True),
        "alone: optimizer, plain": _optimizer_of(steps["slim, plain convolutions"]),
        "alone: optimizer, banks": _optimizer_of(steps["slim, P is dense"]),
    }
    for step in steps.values():
        step()  # the optimizer alone needs gradients
    # A few percent are in question here, so there are twice as many rounds.
    seconds = interleave(steps | alone, replace(settings, seconds=2 * settings.seconds))
    plain = seconds["slim, plain convolutions"]
    table = Table("Cost of fusion in a training step, VGG16", ("case", "ms", "% of the plain step", "added %"))
    for name, took in seconds.items():
        share = (took / plain).map(_percent)
        added = share.map(lambda percent: percent - 100) if name in steps else None
        table.add(case=name, ms=took.map(_ms), **{"% of the plain step": share, "added %": added})
    products = sum(
        fusion.matrix.shape[0] * conv.parametrizations.weight.original.numel()
        for _, conv, fusion in fused_layers(mixing)
    )
    share = 2 * products / (3 * settings.batch_size * count_macs(mixing))
    table.notes.append(
        "Goal: at most 3 % while P is dense, about 0 once it is a selection. By their multiply-accumulates alone, P W "
        f"and its gradient are {100 * share:.1f} % of the network's forward and backward pass at this batch size. "
        f"Parameters: {count_parameters(mixing):,} with the banks, {count_parameters(compact(mixing)):,} without."
    )
    return [table]


def _optimizer_of(step: TrainingStep) -> Callable[[], None]:
    """The same work on the same gradients, at a rate that leaves the weights alone."""
    optimizer = build_optimizer(step.model, step.recipe)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer.step


def _weights_of(model: nn.Module, backward: bool) -> Callable[[], None]:
    convolutions = [(conv, torch.ones_like(conv.weight)) for _, conv, _ in fused_layers(model)]

    def forward() -> None:
        with torch.no_grad():
            for conv, _ in convolutions:
                _ = conv.weight

    def forward_and_backward() -> None:
        for conv, gradient in convolutions:
            torch.autograd.grad(conv.weight, conv.parametrizations.weight.original, gradient)

    return forward_and_backward if backward else forward


def input_pipeline(settings: Settings) -> list[Table]:
    """What a batch costs beside a step of the network with the shortest one, and evaluation beside its forward pass."""
    step = fastest_step(network("vgg16", "slim"), settings)
    split = random_split(settings.source_images)
    source = BatchSource(split.train, MEAN, STD, settings.batch_size, settings.device, Augmentation())
    batches = endless(source)
    seconds = interleave({"batch": partial(next, batches), "step": step}, settings)
    inputs = Table(f"Input pipeline, batch {settings.batch_size}", ("case", "ms", "share of the step %"))
    inputs.add(case="training step, slim VGG16", ms=seconds["step"].map(_ms))
    share = (seconds["batch"] / seconds["step"]).map(_percent)
    inputs.add(case="augmented batch", ms=seconds["batch"].map(_ms), **{"share of the step %": share})
    inputs.notes.append(
        f"Goal: at most 3 %. Random crop, flip and normalisation of {settings.source_images:,} resident images; each "
        "epoch's permutation is included."
    )
    return [inputs, _evaluation(split, settings)]


def _evaluation(split: DataSplit, settings: Settings) -> Table:
    batch = min(500, settings.source_images // 4)
    images = split.train.select(torch.arange(4 * batch))
    precision, channels_last = choose_precision(settings.device)
    model = network("vgg16", "slim").to(settings.device, memory_format=memory_format(channels_last))
    ready = [
        chunk.permute(0, 3, 1, 2).float().to(settings.device).contiguous(memory_format=memory_format(channels_last))
        for chunk in images.images.split(batch)
    ]

    @torch.no_grad()
    def bare() -> None:
        with evaluation_mode(model), autocast(settings.device, precision):
            for chunk in ready:
                model(chunk)

    cases = {
        "forward passes alone": bare,
        "evaluate()": partial(evaluate, model, images, MEAN, STD, batch_size=batch),
    }
    seconds = interleave(cases, settings)
    table = Table(f"Evaluation, slim VGG16, batch {batch}", ("case", "images/s", "of forward alone"))
    for name, took in seconds.items():
        table.add(
            case=name,
            of_forward_alone=seconds["forward passes alone"] / took,
            **{"images/s": took.map(lambda s: len(images) / s)},
        )
    return table


def _ms(seconds: float) -> float:
    return 1000 * seconds


def _percent(share: float) -> float:
    return 100 * share
