"""Where the time of a training step goes, by kind of work."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from apbm_core.fusion import fused_layers
from apbm_core.study.bench.measure import Settings, Table, interleave
from apbm_core.study.bench.steps import TrainingStep, fastest_step, fused_network, network
from apbm_core.study.training.device import autocast, synchronize
from apbm_core.study.training.lowering import lowered

KINDS = (
    "conv forward", "conv weight gradient", "conv input gradient", "BatchNorm", "ReLU", "pooling", "fusion",
    "shortcuts", "linear and loss", "optimizer", "input", "casts and copies", "other",
)  # fmt: skip
_BACKWARD = "conv backward"  # PyTorch computes both gradients in one operation; see _share_of_weight_gradient
_STEPS = 3

# The outermost caller of an operation, or itself, whose name contains one of these decides its kind.
_RULES = (
    ("Optimizer.", "optimizer"),
    ("bench::input", "input"),
    ("bench::fusion", "fusion"),
    ("MmBackward", "fusion"),  # the linear layer's is called AddmmBackward
    ("IndexSelectBackward", "fusion"),
    ("ConvolutionBackward", _BACKWARD),
    ("ProductConvolution", "conv forward"),
    ("aten::conv2d", "conv forward"),
    ("batch_norm", "BatchNorm"),
    ("BatchNorm", "BatchNorm"),
    ("aten::relu", "ReLU"),
    ("ReluBackward", "ReLU"),
    ("pool", "pooling"),
    ("Pool", "pooling"),
    ("aten::mean", "pooling"),
    ("MeanBackward", "pooling"),
    ("aten::add", "shortcuts"),
    ("AddBackward", "shortcuts"),
    ("aten::pad", "shortcuts"),
    ("ConstantPadNd", "shortcuts"),
    ("SliceBackward", "shortcuts"),
    ("linear", "linear and loss"),
    ("Addmm", "linear and loss"),
    ("cross_entropy", "linear and loss"),
    ("Softmax", "linear and loss"),
    ("NllLoss", "linear and loss"),
    ("aten::to", "casts and copies"),
    ("ToCopyBackward", "casts and copies"),
    ("aten::copy_", "casts and copies"),
    ("aten::contiguous", "casts and copies"),
)


def step_profile(settings: Settings) -> list[Table]:
    """Percent of a step's time by kind, for dense and slim networks as the recipes train them here."""
    networks = {
        "VGG16 dense": network("vgg16", "dense"),
        "VGG16 slim, fused": fused_network("vgg16"),
        "ResNet56 dense": network("resnet56", "dense"),
        "ResNet56 slim, fused": fused_network("resnet56"),
    }
    steps = {name: fastest_step(model, settings) for name, model in networks.items()}
    shares = {name: profile_step(step, settings) for name, step in steps.items()}
    table = Table(f"Where a training step's time goes, %, batch {settings.batch_size}", ("kind", *steps))
    for kind in KINDS:
        table.add(kind=kind, **{name: round(100 * share[kind], 1) for name, share in shares.items()})
    table.notes.append(
        f"torch.profiler over {_STEPS} steps, the time of each operation without those that it calls. PyTorch computes "
        "a convolution's two gradients in one operation: their shares are those that they take when each is measured "
        "alone, layer by layer. The profiler itself costs many small operations more than few large ones."
    )
    return [table]


def profile_step(step: TrainingStep, settings: Settings) -> dict[str, float]:
    """The share of each of KINDS in the time of a step, summing to 1."""
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if settings.device.type == "cuda" else [])]
    with _labelled(step.model), _quiet(), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(_STEPS):
            step()
        synchronize(settings.device)
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        attribute = "self_device_time_total" if settings.device.type == "cuda" else "self_cpu_time_total"
        seconds[kind_of(event)] += getattr(event, attribute)
    backward = seconds.pop(_BACKWARD, 0.0)
    weight_share = _share_of_weight_gradient(step, settings)
    seconds["conv weight gradient"] = backward * weight_share
    seconds["conv input gradient"] = backward * (1 - weight_share)
    total = sum(seconds.values())
    return {kind: seconds[kind] / total for kind in KINDS}


def kind_of(event: FunctionEvent) -> str:
    """The kind of work that an operation belongs to."""
    callers = [event.name]
    while (event := event.cpu_parent) is not None:
        callers.append(event.name)
    for name in reversed(callers):
        for fragment, kind in _RULES:
            if fragment in name:
                return kind
    return "other"


@contextmanager
def _labelled(model: nn.Module) -> Iterator[None]:
    """Let the profiler see where a fused weight is computed."""
    open_ranges, handles = [], []

    def enter(*_) -> None:
        open_ranges.append(record_function("bench::fusion"))
        open_ranges[-1].__enter__()

    def leave(*_) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for _, _, fusion in fused_layers(model):
        handles += [fusion.register_forward_pre_hook(enter), fusion.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the profiler's library prints to the process's stderr, which no setting of its own prevents."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _gradient(conv: nn.Conv2d, x: Tensor, weight: Tensor, of: Tensor) -> Callable[[], object]:
    """A function that computes one gradient of a convolution, as it is lowered now."""
    output = conv._conv_forward(x, weight, None)
    upstream = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, of, upstream, retain_graph=True)


def _share_of_weight_gradient(step: TrainingStep, settings: Settings) -> float:
    """Time of all weight gradients over that of all gradients of convolutions, each measured alone."""
    recorded: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output: recorded.append((module, inputs[0].detach(), output.detach()))
        )
        for module in step.model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    images, _ = next(step.batches)
    with torch.no_grad(), autocast(settings.device, step.precision):
        step.model(images.contiguous(memory_format=step.layout))
    for handle in handles:
        handle.remove()
    cases = {"weight": [], "input": []}
    with lowered(step.model, step.lowered):
        for index, (conv, x, y) in enumerate(recorded):
            x, weight = x.to(y.dtype), conv.weight.detach().to(y.dtype)
            cases["weight"].append(_gradient(conv, x, weight.requires_grad_(), weight))
            if index > 0:  # the images need no gradient
                x = x.requires_grad_()
                cases["input"].append(_gradient(conv, x, weight.detach(), x))
    once = Settings(settings.device, settings.threads, rounds=(1, 1), shortest=0.0)
    took = interleave({kind: lambda calls=calls: [call() for call in calls] for kind, calls in cases.items()}, once)
    return took["weight"].median / (took["weight"].median + took["input"].median)
