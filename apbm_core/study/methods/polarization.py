r"""Polarization: push BatchNorm's scales apart, to 0 or well above, and cut in the gap (Zhuang et al., NeurIPS 2020).

methods.md 4. The training loss gains

.. math:: \lambda R(\gamma), \qquad R(\gamma) = \sum_i \bigl( t |\gamma_i| - |\gamma_i - \bar\gamma| \bigr)

over the scales of the *sparse* norms, :math:`\bar\gamma` their mean over all of these layers together. Sparse are both
norms of each ResNet block, not the stem's, and all of VGG's. After each step every scale is clamped to [0, 1]; they
start at 0.5.

Only filters whose outputs are their own can leave: in a ResNet, those of each block's first convolution. The scales of
second convolutions polarise too, but their channels belong to the whole stage and stay, as small as they may be.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from apbm_core.costs import CostTable
from apbm_core.study.methods.sparse import SparseOptions, bisect_setting, sparse_start, strength_in, train_sparsely
from apbm_core.study.methods.target import keep_globally, parameter_target
from apbm_core.study.methods.task import Task
from apbm_core.study.networks.chains import fold_constants, followers, norms_behind
from apbm_core.study.networks.models import prunable_convs
from apbm_core.study.training.hooks import Context, Hook
from apbm_core.surgery import slim

LABEL = "Polarization"
SUMMARY = "BatchNorm's scales are pushed apart, to 0 or well above, and cut in the gap"
SOURCE = "Zhuang et al., Neuron-level Structured Pruning using Polarization Regularizer, NeurIPS 2020"
PLACE, COLOUR, MARKER = 50, "#CC79A7", "^"
STARTS_FROM = "sparse"
SCHEDULES = ("equal", "published")

BINS = 100  # of the histogram of a layer's scales over [0, 1]
START = 0.5  # where the scales start
_SPARSE_SHARE = 2 / 3  # of the epochs, on the equal schedule; the rest is fine-tuning

# methods.md 4: (lambda, t), and the fine-tuning's learning rate
_PUBLISHED_SETTINGS = {"vgg": (3e-5, 1.5, 5e-4), "resnet": (5e-5, 1.4, 1e-3)}
_SEARCH_RANGE, _SEARCH_T, _SEARCH_T_STEP = (0.0, 2e-4), 1.2, 0.1
_SPARSE_RECIPE = {
    "batch_size": 128, "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "schedule": "steps",
    "milestones": (0.3, 0.6, 0.8), "gamma": 0.2, "warmup": 0.005, "label_smoothing": 0.0,
}  # fmt: skip
_PUBLISHED_EPOCHS = 200
# published: 0.01 in epoch 0 of 200, then 0.1, x0.2 at 60, 120 and 160


class Options(SparseOptions):
    """Polarization's settings; where None, the published value for the network's family."""

    strength: float | None = Field(
        None,
        ge=0,
        description="lambda. The published ones act over 200 epochs; in a few, scales hardly leave 0.5, and a target"
        " is met by ranking them",
    )
    t: float | None = Field(None, ge=0, description="t: weight of the scales' own size against their distance")
    reach: Literal["global-threshold", "search"] = Field(
        "global-threshold",
        description="how a parameter target is met: by one threshold over all layers, or by trying settings of"
        " lambda, two of t after them, and cutting in the valleys (expensive: they come on top of the run's epochs)",
    )
    minimum: int = Field(2, ge=1, description="filters that a layer keeps, whatever their scales")


def regulariser(scales: Sequence[Tensor], t: float) -> Tensor:
    """R(gamma), a scalar: sum of t |gamma_i| - |gamma_i - mean| over all scales of all layers; differentiable."""
    gamma = torch.cat([scale.flatten() for scale in scales])
    return (t * gamma.abs() - (gamma - gamma.mean()).abs()).sum()


class Polarizer(Hook):
    """Adds the regulariser to the loss and clamps the network's BatchNorm scales to [0, 1] after every step."""

    def __init__(self, sparse_norms: Sequence[str], strength: float, t: float):
        self.sparse_norms, self.strength, self.t = tuple(sparse_norms), strength, t

    def on_loss(self, context: Context, loss: Tensor) -> Tensor:
        return loss + self.strength * regulariser(self._scales(context.model), self.t)

    @torch.no_grad()
    def after_step(self, context: Context) -> None:
        for norm in _norms(context.model):
            norm.weight.clamp_(0, 1)

    @torch.no_grad()
    def after_epoch(self, context: Context) -> dict[str, float]:
        gamma = torch.cat(self._scales(context.model))
        return {"gamma_mean": gamma.mean().item(), "gamma_std": gamma.std(correction=0).item()}

    def _scales(self, model: nn.Module) -> list[Tensor]:
        return [model.get_submodule(name).weight for name in self.sparse_norms]


def sparse_norms(model: nn.Module, prunable: Sequence[str]) -> list[str]:
    """Names of the norms that the regulariser acts on: those registered beside a prunable convolution's.

    That is every norm of a VGG, and both of each ResNet block but neither the stem's nor a projection shortcut's.
    """
    homes = {name.rpartition(".")[0] for name in prunable}
    named = model.named_modules()
    return [n for n, module in named if isinstance(module, nn.BatchNorm2d) and n.rpartition(".")[0] in homes]


def first_valley(scales: Tensor) -> float | None:
    """Where the histogram of ``scales`` over [0, 1], 100 bins, first stops falling; None if it never does.

    The valley is the first bin between a difference <= 0 and one >= 0; the threshold is its lower edge.
    """
    steps = torch.histc(scales.detach().float().cpu(), bins=BINS, min=0, max=1).diff()
    valleys = ((steps[:-1] <= 0) & (steps[1:] >= 0)).nonzero()
    return (valleys[0].item() + 1) / BINS if len(valleys) else None


def cut_in_valleys(scales: Mapping[str, Tensor], minimum: int) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Keep the filters whose scale is above their layer's valley.

    A layer without a valley keeps everything. One that would keep fewer than ``minimum`` filters keeps its largest.

    Returns:
        Layer -> kept filters, ascending; and facts for the record: ``thresholds`` by layer, ``layers_without_valley``,
        and ``emptied_layers`` with the number of filters that were above their threshold.
    """
    keep, thresholds, emptied = {}, {}, {}
    for name, gamma in scales.items():
        gamma = gamma.detach().cpu()
        thresholds[name] = first_valley(gamma)
        above = torch.ones(len(gamma), dtype=torch.bool) if thresholds[name] is None else gamma > thresholds[name]
        if above.sum() < min(minimum, len(gamma)):
            emptied[name] = int(above.sum())
            above[_largest(gamma, minimum)] = True
        keep[name] = above.nonzero().flatten().tolist()
    missing = [name for name, threshold in thresholds.items() if threshold is None]
    return keep, {"thresholds": thresholds, "layers_without_valley": missing, "emptied_layers": emptied}


def cut_at_global_threshold(
    costs: CostTable, scales: Mapping[str, Tensor], target: float, minimum: int
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Keep the filters with the largest scales over all layers so that ``target`` of the parameters goes.

    :func:`apbm_core.study.methods.target.keep_globally` of the scales.

    Returns:
        Layer -> kept filters, ascending; and facts for the record: ``gamma_threshold``, the largest scale removed, and
        ``emptied_layers``, those at their minimum.
    """
    keep, threshold, emptied = keep_globally(costs, scales, target, minimum)
    return keep, {"gamma_threshold": threshold, "emptied_layers": emptied}


def remove_filters(model: nn.Module, example_inputs: Tensor, keep: Mapping[str, Sequence[int]]) -> nn.Module:
    """A slim copy of ``model``, what the removed channels contributed folded into the layers behind them.

    BatchNorm makes a channel's pre-activation about normal with mean beta and deviation gamma, so behind the ReLU its
    mean is beta Phi(beta / gamma) + gamma phi(beta / gamma): relu(beta) at gamma = 0, where the channel is constant and
    :func:`~apbm_core.study.networks.chains.fold_constants` exact (but for zero padding). ``model`` is changed.
    """
    constants = {}
    for name, chain in followers(model, keep).items():
        norm = model.get_submodule(chain.norm)
        constants[name] = mean_after_relu(norm.weight.detach(), norm.bias.detach())
        constants[name][torch.as_tensor(keep[name], device=norm.weight.device)] = 0
    fold_constants(model, example_inputs, constants)
    return slim(model, example_inputs, keep)


def split_epochs(epochs: int, schedule: str) -> tuple[int, int]:
    """Epochs of sparse training and of fine-tuning; at least one of the former. Published: 200 + 200."""
    sparse = max(1, round(epochs * (1 / 2 if schedule == "published" else _SPARSE_SHARE)))
    return sparse, epochs - sparse


def prune(task: Task) -> nn.Module:
    """Sparse training, the cut, fine-tuning; returns the slim network.

    The sparse training does not know the target, so it is done once for all targets; but not where lambda and t are
    searched for a target.
    """
    options, target = task.options, parameter_target(task.config)
    strength, t, tuning_rate = _published_settings(task.model_name, options)
    is_published = task.config.schedule == "published"
    sparse_epochs, tuning_epochs = split_epochs(task.config.epochs, task.config.schedule)
    sparse_recipe = dict(_SPARSE_RECIPE) if is_published else None
    if target is not None and options.reach == "search":
        strength, t = _search(task, target, sparse_recipe)

    before, after = task.courses(options.course, sparse_epochs)
    published = _SPARSE_RECIPE, _PUBLISHED_EPOCHS
    strength = strength_in(task, strength, published, (sparse_recipe, sparse_epochs), before)
    model = sparse_start(task, START)
    convs = prunable_convs(task.model_name)
    hook = Polarizer(sparse_norms(model, convs), strength, t)
    train_sparsely(task, model, sparse_epochs, hook, sparse_recipe, before, {"strength": strength, "t": t})

    def choose() -> dict[str, Any]:
        scales = _prunable_scales(model, convs)
        if target is None or options.reach == "search":
            keep, facts = cut_in_valleys(scales, options.minimum)
        else:
            keep, facts = cut_at_global_threshold(task.costs, scales, target, options.minimum)
        if target is not None:
            facts["target_deviation"] = _removed(task.costs, keep) - target
        return {"keep": keep, "facts": facts}

    task.note("strength", strength)
    task.note("t", t)
    choice = task.choose(choose)
    small = remove_filters(model, task.example_inputs, choice["keep"])
    if tuning_epochs:
        tuning_recipe = _SPARSE_RECIPE | {"lr": tuning_rate, "warmup": 0.0} if is_published else None
        task.train("finetune", small, tuning_epochs, recipe_overrides=tuning_recipe, course=after)
    return small


def _search(task: Task, target: float, recipe: dict[str, Any] | None) -> tuple[float, float]:
    """methods.md 4: bisect lambda in [0, 2e-4] at t = 1.2, then try t +- 0.1; each trial is a phase."""
    options = task.options
    convs = prunable_convs(task.model_name)

    def removed(trial: int, strength: float, t: float = _SEARCH_T) -> float:
        model = sparse_start(task, START)
        hook = Polarizer(sparse_norms(model, convs), strength, t)
        task.train(f"search-{trial + 1}", model, options.trial_epochs, hooks=[hook], recipe_overrides=recipe)
        keep, _ = cut_in_valleys(_prunable_scales(model, convs), options.minimum)
        return _removed(task.costs, keep)

    strength, found = bisect_setting(removed, *_SEARCH_RANGE, target, options.trials)
    best = (abs(found - target), _SEARCH_T)
    for trial, t in enumerate((_SEARCH_T - _SEARCH_T_STEP, _SEARCH_T + _SEARCH_T_STEP), start=options.trials):
        best = min(best, (abs(removed(trial, strength, t) - target), t))
    task.note("search_epochs", (options.trials + 2) * options.trial_epochs)
    return strength, best[1]


def _published_settings(model_name: str, options: Options) -> tuple[float, float, float]:
    strength, t, tuning_rate = _PUBLISHED_SETTINGS["vgg" if model_name.startswith("vgg") else "resnet"]
    strength = strength if options.strength is None else options.strength
    return strength, t if options.t is None else options.t, tuning_rate


def _prunable_scales(model: nn.Module, convs: Sequence[str]) -> dict[str, Tensor]:
    return {name: norm.weight for name, norm in norms_behind(model, convs).items()}


def _removed(costs: CostTable, keep: Mapping[str, Sequence[int]]) -> float:
    return 1 - costs.parameters({name: len(kept) for name, kept in keep.items()}) / costs.parameters()


def mean_after_relu(gamma: Tensor, beta: Tensor) -> Tensor:
    """E[relu(z)] for z normal with mean beta and standard deviation gamma, both (n,)."""
    ratio = beta / gamma.abs().clamp_min(torch.finfo(gamma.dtype).tiny)
    density = torch.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    return beta * torch.special.ndtr(ratio) + gamma.abs() * density


def _largest(gamma: Tensor, count: int) -> Tensor:
    """Indices of the largest ``count`` scales, the first ones at a tie."""
    return gamma.argsort(descending=True, stable=True)[:count]


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
