"""How long a grid would take on cards that are not here: an estimate on paper, from counts and two stated rates.

A training step of a small network on a large card is bound by its arithmetic or by the launching of its kernels,
whichever takes longer::

    seconds of a step = max(6 * MACs * images / rate, kernels * seconds a launch)

Six: two operations for each multiply-accumulate, in the forward pass and in both gradients. MACs are the cost table's,
at the run's widths; kernels are counted in a real step, by the operators that compute something. The two rates are
assumptions, and :data:`RATE` and :data:`LAUNCH` say where they come from.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import apbm_core
from apbm_core.study.data.datasets import class_count
from apbm_core.study.methods import get_method
from apbm_core.study.networks.models import build_model, cost_table, dense_widths, prunable_convs
from apbm_core.study.networks.widths import solve_model_widths
from apbm_core.study.records import RunConfig

RATE = 30e12
"""Operations a second. Published for CIFAR-10 on one A100: 0.36 PFLOP in 3.83 s and, for a plain training of ResNet-18,
32.3 PFLOP in 7 minutes, thus 94 and 77 TFLOP/s (K. Jordan, cifar10-airbench, README). Our layers are narrower, so we
take less than half of that."""
LAUNCH = 10e-6
"""Seconds a kernel when Python launches them one by one, forward, backward and optimizer; an assumption of ours."""
_UPDATE_KERNELS = 20
"""The optimizer's, which works on all tensors at once, and the batch's augmentation; an assumption of ours."""
_IMAGES = {"cifar10": 50_000, "cifar100": 50_000}


@dataclass(frozen=True)
class Estimate:
    """What a grid takes.

    Attributes:
        runs: how many.
        operations: of all their trainings, shared ones once.
        seconds: on one card, one run at a time.
        longest: of one run, which no number of cards shortens.
    """

    runs: int
    operations: float
    seconds: float
    longest: float

    def hours(self, cards: int) -> float:
        """On so many cards, each of which always has a run in hand."""
        return max(self.seconds / cards, self.longest) / 3600

    def words(self, cards: Sequence[int]) -> str:
        """A sentence."""
        hours = ", ".join(f"{self.hours(n):.3g} h on {n} card{'s' * (n > 1)}" for n in cards)
        return f"On paper: {self.runs} runs, {self.operations / 1e18:.3g} EFLOP; {hours}."


def estimate(configs: Iterable[RunConfig], equal_time: bool, rate: float = RATE, launch: float = LAUNCH) -> Estimate:
    """What ``configs`` take, each from its start; the methods' pre-training of a network once a seed.

    Methods with a sparse training of their own count as dense throughout, which is an upper bound, for their targets
    may share it. Evaluation, scores and data are not counted.

    Args:
        configs: the runs.
        equal_time: whether each run that knows that schedule has an equal-time run, which takes what l1's run does.
        rate, launch: see :data:`RATE` and :data:`LAUNCH`.
    """
    configs, shared = list(configs), set()
    operations = seconds = longest = 0.0
    runs = len(configs)
    for config in configs:
        parts = _parts(config)
        if equal_time and config.method != "dense" and "equal-time" in get_method(config.method).schedules:
            stand_in = _parts(config.model_copy(update={"method": "l1", "options": {}}))
            operations += sum(_operations(config, macs, epochs) for epochs, macs, _ in stand_in)
            seconds += sum(_seconds(config, *part, rate, launch) for part in stand_in)
            runs += 1
        whole = [_seconds(config, *part, rate, launch) for part in parts]
        longest = max(longest, sum(whole))
        if get_method(config.method).starts_from == "pretrained":
            key = (config.dataset, config.model, config.seed, config.epochs)
            if key in shared:
                parts, whole = parts[1:], whole[1:]
            shared.add(key)
        operations += sum(_operations(config, macs, epochs) for epochs, macs, _ in parts)
        seconds += sum(whole)
    return Estimate(runs, operations, seconds, longest)


def _parts(config: RunConfig) -> list[tuple[int, int, int]]:
    """A run's trainings: (epochs, MACs an image, kernels a step)."""
    classes, method = class_count(config.dataset), get_method(config.method)
    dense, slim = _macs(config.model, classes, 0.0, config.by), _macs(config.model, classes, config.target, config.by)
    kernels = count_kernels(config.model)
    if method.starts_from == "sparse" or config.target == 0:
        return [(config.epochs, dense, kernels)]
    if method.starts_from == "scratch":
        is_fused = config.method in ("apbm", "dcff")
        return [(config.epochs, slim, count_kernels(config.model, is_fused))]
    before = 0 if config.start_epochs else max(1, round(config.epochs / 3))  # Task.pretrain_epochs
    return [(before, dense, kernels), (config.epochs - before, slim, kernels)]


def _operations(config: RunConfig, macs: int, epochs: int) -> float:
    return 6.0 * macs * epochs * _images(config)


def _seconds(config: RunConfig, epochs: int, macs: int, kernels: int, rate: float, launch: float) -> float:
    steps = epochs * math.ceil(_images(config) / config.recipe.batch_size)
    return max(_operations(config, macs, epochs) / rate, steps * kernels * launch)


def _images(config: RunConfig) -> int:
    return config.train_subset or _IMAGES.get(config.dataset, 50_000)


@cache
def _macs(model: str, classes: int, target: float, by: str) -> int:
    widths = solve_model_widths(model, classes, target, by).widths if target else dense_widths(model)
    return cost_table(model, classes).macs(dict(zip(prunable_convs(model), widths, strict=True)))


@cache
def count_kernels(model: str, is_fused: bool = False) -> int:
    """The operators that compute something in one training step of the dense network, or of a fused one of half its
    filters; a view of a tensor computes nothing."""
    with torch.random.fork_rng(devices=[]):
        network, images = build_model(model), torch.randn(2, 3, 32, 32)
        if is_fused:
            network = apbm_core.fuse(network, images, dict.fromkeys(prunable_convs(model), 0.5))
    with _CountKernels() as counter:
        network(images).logsumexp(1).mean().backward()
    return counter.kernels + _UPDATE_KERNELS


class _CountKernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = [returned.alias_info for returned in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        self.kernels += not is_view and function is not torch.ops.aten.detach.default
        return function(*args, **(kwargs or {}))
