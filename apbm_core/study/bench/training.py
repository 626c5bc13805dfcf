"""Benchmarks of what surrounds a training step: what fusion adds to it, what feeds it, and evaluation."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from apbm_core.branches import FUSED, add_branches
from apbm_core.compress import collapse, compact, rescore
from apbm_core.counting import count_macs, count_parameters
from apbm_core.forward import evaluation_mode
from apbm_core.fusion import fused_layers
from apbm_core.passing import pass_inputs
from apbm_core.study.bench.measure import Settings, Table, goal, interleave
from apbm_core.study.bench.steps import (
    MEAN,
    STD,
    TrainingStep,
    endless,
    fastest_step,
    fused_network,
    network,
    random_split,
)
from apbm_core.study.data.batches import Augmentation, BatchSource, evaluation_batches
from apbm_core.study.data.datasets import DataSplit
from apbm_core.study.methods.variants import VariantSettings
from apbm_core.study.training.device import autocast, memory_format
from apbm_core.study.training.evaluation import evaluate
from apbm_core.study.training.optimizer import build_optimizer
from apbm_core.study.training.precision import choose_precision

_MIX = "alone: P W of all layers, forward"
_SELECT = "alone: selection in all layers, forward"
_DROPPED = "alone: weights of all layers once their banks are dropped, forward"
_COLLAPSED = "slim, P is frozen and its banks are dropped"
_BRANCHES = "slim, a pointwise branch and an identity beside each convolution"


def fusion_cost(settings: Settings) -> list[Table]:
    """What FilterFusion adds to a step of the slim VGG16."""
    mixing = fused_network("vgg16")
    selecting = fused_network("vgg16", VariantSettings(fuse=False))
    collapsed = fused_network("vgg16")
    rescore(collapsed, progress=1.0)
    collapse(collapsed)
    steps = {
        "slim, plain convolutions": fastest_step(compact(mixing), settings),
        **{case: fastest_step(model, settings) for case, model in _forms().items()},
        _COLLAPSED: fastest_step(collapsed, settings),
        "slim, P is a selection": fastest_step(selecting, settings),
        "slim, P is dense": fastest_step(mixing, settings),
    }
    alone = {
        _MIX: _weights_of(mixing, backward=False),
        _SELECT: _weights_of(selecting, backward=False),
        _DROPPED: _weights_of(collapsed, backward=False),
        "alone: P W of all layers, forward and backward": _weights_of(mixing, backward=True),
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
    share = products / (3 * settings.batch_size * count_macs(mixing))
    rate = seconds[_MIX].map(lambda s: 2e-9 * products / s)
    banks = sum(conv.parametrizations.weight.original.nbytes for _, conv, _ in fused_layers(mixing))
    table.notes += [
        goal(
            "fusion's forward pass while P is dense, % of the plain step",
            (seconds[_MIX] / plain).map(_percent),
            3.0,
            otherwise=f"Its multiply-accumulates alone are {100 * share:.1f} % of the network's forward and backward "
            f"pass at this batch size; they run at {rate.median:.0f} GFLOP/s, laid out so that nothing is copied.",
        ),
        goal(
            "its forward pass once P is a selection, % of the plain step",
            (seconds[_SELECT] / plain).map(_percent),
            0.5,
            otherwise=f"It copies the kept filters out of {banks / 1e6:.0f} MB of banks.",
        ),
        goal(
            "its forward pass once P is frozen and the banks are dropped (collapse), % of the plain step",
            (seconds[_DROPPED] / plain).map(_percent),
            0.1,
            otherwise="Each layer hands its weight on as it is.",
        ),
        goal(
            "a step with a pointwise branch and an identity, each with its norm, times the plain step",
            seconds[_BRANCHES] / plain,
            1.35,
            otherwise="Three norms take the place of one, and a second convolution is added.",
        ),
        f"With banks the whole step also has P W's gradient, as many multiply-accumulates again, and an optimizer with "
        f"{count_parameters(mixing):,} parameters, the banks included, instead of "
        f"{count_parameters(compact(mixing)):,}.",
    ]
    return [table]


def _forms() -> dict[str, nn.Module]:
    """The slim VGG16 in the forms that pass its input on, or that are several branches with norms of their own."""
    image = torch.zeros(1, 3, 32, 32)
    passing, plain = fused_network("vgg16"), network("vgg16", "slim")
    pass_inputs(passing)
    return {
        "slim, P is dense, passing its input on": passing,
        _BRANCHES: add_branches(plain, image)[0],
        "slim, responses of unimportant filters": add_branches(fused_network("vgg16"), image, [FUSED])[0],
    }


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
    inputs.notes += [
        f"Random crop, flip and normalisation of {settings.source_images:,} resident images; each epoch's permutation "
        "is included.",
        goal(
            "augmented batch, % of the step",
            share,
            3.0,
            otherwise=f"{(seconds['batch'].map(lambda s: 1e6 * s / settings.batch_size)).median:.1f} microseconds an "
            f"image; the step takes {seconds['step'].map(lambda s: 1e6 * s / settings.batch_size).median:.1f}.",
        ),
    ]
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
        "batches alone": lambda: list(evaluation_batches(images, MEAN, STD, batch, settings.device)),
        "evaluate()": partial(evaluate, model, images, MEAN, STD, batch_size=batch),
    }
    seconds = interleave(cases, settings)
    forward = seconds["forward passes alone"]
    table = Table(f"Evaluation, slim VGG16, batch {batch}", ("case", "images/s", "of forward alone"))
    for name, took in seconds.items():
        table.add(
            case=name,
            of_forward_alone=forward / took,
            **{"images/s": took.map(lambda s: len(images) / s)},
        )
    table.notes.append(
        goal(
            "evaluate(), of the forward passes' speed",
            forward / seconds["evaluate()"],
            0.95,
            at_least=True,
            otherwise=f"Making the batches takes {(seconds['batches alone'] / forward).map(_percent).median:.1f} % of "
            "the time of the forward passes; the rest is loss and accuracy.",
        )
    )
    return table


def _ms(seconds: float) -> float:
    return 1000 * seconds


def _percent(share: float) -> float:
    return 100 * share
