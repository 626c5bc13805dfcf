r"""SWP, stripe-wise pruning: learn which positions of a filter's kernel it needs (Meng et al., NeurIPS 2020).

methods.md 5. Every 3x3 convolution gets a skeleton F of shape (n, k, k), 1 at the start and multiplied onto its
weight. After each backward pass

.. math:: \partial L/\partial F \leftarrow \partial L/\partial F + \alpha \, \mathrm{sign}(F), \qquad
          M = [\,|F| > \delta\,]

and F and its gradient are masked by M. A stripe that fell stays down. After training, filters without stripes go whole
and the others keep their surviving stripes (:mod:`apbm_core.study.networks.stripes`).

Published SWP has no target. Ours cuts F where the exact parameter count meets it, once, after two thirds of the epochs,
and trains on with those stripes: cutting many stripes at the end and training no more would cost it nearly all of its
accuracy, which would be no fair rival.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from apbm_core.costs import CostTable
from apbm_core.study.methods.sparse import SparseOptions, bisect_setting, sparse_start, strength_in, train_sparsely
from apbm_core.study.methods.target import cut_to_target, parameter_target
from apbm_core.study.methods.task import Task
from apbm_core.study.networks.chains import fold_constants, norms_behind
from apbm_core.study.networks.models import prunable_convs
from apbm_core.study.networks.stripes import (
    FilterSkeleton,
    add_skeletons,
    pack_mask,
    skeleton_layers,
    to_stripes,
    unpack_mask,
    without_skeletons,
)
from apbm_core.study.options import added
from apbm_core.study.training.hooks import Context, Hook

LABEL = "SWP"
SUMMARY = "every filter learns the shape of its kernel; its weakest stripes go"
SOURCE = "Meng et al., Pruning Filter in Filter, NeurIPS 2020"
PLACE, COLOUR, MARKER = 60, "#009E73", "P"
STARTS_FROM = "sparse"
SCHEDULES = ("equal", "published")

_CUT_AT = 2 / 3  # of the epochs, where a target is met by delta on the equal schedule
_PUBLISHED_EPOCHS = 160
_LOG_ALPHA_RANGE = (-6.0, 0.0)  # log10, for the search
_PUBLISHED_RECIPE = {
    "batch_size": 64, "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "schedule": "steps",
    "milestones": (0.5, 0.75), "gamma": 0.1, "warmup": 0.0, "label_smoothing": 0.0,
}  # fmt: skip


class Options(SparseOptions):
    """SWP's settings, the published ones by default, and the ways to a target, which are ours."""

    alpha: float = Field(1e-5, ge=0, description="strength of the pull of every skeleton entry towards 0")
    delta: float = Field(0.01, ge=0, description="stripes whose skeleton entry falls to this or below are dead")
    reach: Literal["delta", "alpha"] | None = Field(
        "delta",
        description="how a parameter target is met: by a final delta; by a search for alpha with short trainings"
        " (expensive: they come on top of the run's epochs); or not at all, its deviation only noted",
    )
    score: Literal["skeleton", "skeleton-norm"] = Field(
        "skeleton",
        description="what the final delta cuts: |F| as published, or, ours, |F| times the norm of its stripe. In a few"
        " epochs F hardly leaves 1 and says little; the second also sees what the weights have learnt",
    )
    cut_at: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the epochs after which the final delta cuts and the stripes are fixed; 1 is after all of"
        " them. None: 2/3, but 1 on the published schedule",
    )
    norm_start: float = added(
        1.0,
        if_absent=1.0,
        gt=0,
        description="where the BatchNorm scales start; 0.5 in the authors' code, which the paper does not mention",
    )


class FixedStripes(Hook):
    """Keeps dead stripes, and the norms behind dead filters, at zero, whatever momentum the optimizer still has.

    Args:
        prunable: convolutions whose dead filters will go whole. Their norm's scale and shift go to zero, so that
            nothing depends on the channel any more; elsewhere the norm's constant stays, as part of the residual sum.
    """

    def __init__(self, prunable: Sequence[str]):
        self.prunable = tuple(prunable)
        self.layers: list[tuple[FilterSkeleton, nn.BatchNorm2d | None]] = []

    def start(self, context: Context) -> None:
        norms = norms_behind(context.model, self.prunable)
        self.layers = [(layer, norms.get(name)) for name, _, layer in skeleton_layers(context.model)]

    @torch.no_grad()
    def after_step(self, context: Context) -> None:
        for layer, norm in self.layers:
            layer.skeleton.mul_(layer.mask)
            if norm is not None:
                _silence(norm, layer)

    @torch.no_grad()
    def after_epoch(self, context: Context) -> dict[str, float]:
        masks = torch.cat([layer.mask.flatten() for layer, _ in self.layers])
        return {"stripes_alive": masks.double().mean().item()}


class ShrinkSkeletons(FixedStripes):
    """SWP's update after every backward pass; the largest stripe of a prunable layer never dies."""

    def __init__(self, prunable: Sequence[str], alpha: float, delta: float):
        super().__init__(prunable)
        self.alpha, self.delta = alpha, delta

    @torch.no_grad()
    def after_backward(self, context: Context) -> None:
        for layer, norm in self.layers:
            skeleton = layer.skeleton
            alive = layer.mask & (skeleton.abs() > self.delta)
            if norm is not None:
                alive.view(-1).index_fill_(0, skeleton.abs().argmax().view(1), True)  # not [...]: it would wait for it
            skeleton.grad.add_(skeleton.sign(), alpha=self.alpha)
            layer.set_mask(alive)
            skeleton.grad.mul_(alive)


@torch.no_grad()
def stripe_scores(model: nn.Module, score: str = "skeleton") -> dict[str, Tensor]:
    """|F| of every stripe, or with "skeleton-norm" |F| ||w||; name -> (n, k, k), -infinity for dead stripes."""
    scores = {}
    for name, conv, layer in skeleton_layers(model):
        value = layer.skeleton.detach().double().abs()
        if score == "skeleton-norm":
            value = value * conv.parametrizations.weight.original.double().norm(dim=1)
        scores[name] = value.masked_fill(~layer.mask, -torch.inf).cpu()
    return scores


def stripes_for_target(
    model: nn.Module, costs: CostTable, target: float, score: str = "skeleton"
) -> tuple[dict[str, Tensor], float | None]:
    """The masks that keep the best stripes of all layers so that ``target`` of the dense network's parameters goes.

    Stripes go one by one in the order of their scores; the exact count, dead filters gone whole, decides how many. The
    best stripe of every prunable layer stays.

    Args:
        model: a network with skeletons.
        costs: what the dense network costs; its prunable convolutions are those whose dead filters go whole.

    Returns:
        Name -> (n, k, k) mask, and the largest score that was cut (None if nothing was): with "skeleton", delta.

    Raises:
        ConfigError: the target is out of reach.
    """
    scores = stripe_scores(model, score)
    for name in costs.widths:
        scores[name].view(-1)[scores[name].argmax()] = torch.inf
    return cut_to_target(scores, lambda masks: count_striped(costs, masks), costs.parameters(), target)


def count_striped(costs: CostTable, masks: Mapping[str, Tensor]) -> int:
    """Parameters of the network that :func:`stripes.to_stripes` makes of these masks, without making it."""
    alive = {name: int(mask.flatten(1).any(1).sum()) for name, mask in masks.items()}
    widths = {name: max(alive[name], 1) for name in costs.widths}
    return costs.parameters(widths, {name: int(mask.sum()) for name, mask in masks.items()})


@torch.no_grad()
def cut(model: nn.Module, example_inputs: Tensor, prunable: Sequence[str], masks: Mapping[str, Tensor]) -> None:
    """Kill the stripes outside ``masks``, in place; what a dead filter's norm still put out is folded forward."""
    norms, constants = norms_behind(model, prunable), {}
    for name, conv, layer in skeleton_layers(model):
        layer.set_mask(masks[name].to(layer.mask.device))
        if name in norms:
            constants[name] = _constant_output(conv, norms[name]).masked_fill(layer.mask.flatten(1).any(1), 0)
            _silence(norms[name], layer)
    fold_constants(model, example_inputs, constants)


def prune(task: Task) -> nn.Module:
    """Train with shrinking skeletons, cut to the target, train with the stripes fixed; returns the striped network.

    The first training does not know the target, so it is done once for all targets; but not where alpha is searched for
    a target.
    """
    options, target, epochs = task.options, parameter_target(task.config), task.config.epochs
    is_published = task.config.schedule == "published"
    prunable = prunable_convs(task.model_name)
    recipe = dict(_PUBLISHED_RECIPE) if is_published else None
    is_cut = target is not None and options.reach == "delta"
    alpha = options.alpha
    if target is not None and options.reach == "alpha":
        alpha = _search(task, target, recipe)

    cut_at = (options.cut_at or (1.0 if is_published else _CUT_AT)) if is_cut else 1.0
    shrinking_epochs = min(max(1, round(cut_at * epochs)), epochs)
    before, after = task.courses(options.course, shrinking_epochs)
    published = _PUBLISHED_RECIPE, _PUBLISHED_EPOCHS
    alpha = strength_in(task, alpha, published, (recipe, shrinking_epochs), before)
    model = add_skeletons(sparse_start(task, options.norm_start))
    settings = {"alpha": alpha, "delta": options.delta}
    if options.norm_start != 1:
        settings["norm_start"] = options.norm_start
    hook = ShrinkSkeletons(prunable, alpha, options.delta)
    train_sparsely(task, model, shrinking_epochs, hook, recipe, before, settings)

    def choose() -> dict[str, Any]:
        facts = {"alpha": alpha, "delta": options.delta, "skeleton_std": _skeleton_std(model)}
        if is_cut:
            masks, facts["cut_score"] = stripes_for_target(model, task.costs, target, options.score)
        else:
            masks = {name: layer.mask.cpu() for name, _, layer in skeleton_layers(model)}
        facts["stripes_kept"] = torch.cat([mask.flatten() for mask in masks.values()]).double().mean().item()
        facts["layers_without_stripes"] = [name for name, mask in masks.items() if not mask.any()]
        if target is not None:
            facts["target_deviation"] = _removed(task.costs, masks) - target
        return {"masks": {name: pack_mask(mask) for name, mask in masks.items()}, "facts": facts}

    choice = task.choose(choose)
    shapes = {name: layer.mask.shape for name, _, layer in skeleton_layers(model)}
    masks = {name: unpack_mask(digits, shapes[name]) for name, digits in choice["masks"].items()}
    cut(model, task.example_inputs, prunable, masks)
    task.train("finetune", model, epochs - shrinking_epochs, [FixedStripes(prunable)], recipe, after)
    return to_stripes(without_skeletons(model), task.example_inputs, masks)


def _search(task: Task, target: float, recipe: dict[str, Any] | None) -> float:
    """Bisect log10(alpha) for the share that falls below delta in a short training; each trial is a phase."""
    options, prunable = task.options, prunable_convs(task.model_name)

    def removed(trial: int, log_alpha: float) -> float:
        model = add_skeletons(task.build())
        hook = ShrinkSkeletons(prunable, 10**log_alpha, options.delta)
        task.train(f"search-{trial + 1}", model, options.trial_epochs, hooks=[hook], recipe_overrides=recipe)
        return _removed(task.costs, {name: layer.mask.cpu() for name, _, layer in skeleton_layers(model)})

    log_alpha, _ = bisect_setting(removed, *_LOG_ALPHA_RANGE, target, options.trials)
    task.note("search_epochs", options.trials * options.trial_epochs)
    return 10**log_alpha


def _removed(costs: CostTable, masks: Mapping[str, Tensor]) -> float:
    return 1 - count_striped(costs, masks) / costs.parameters()


def _silence(norm: nn.BatchNorm2d, layer: FilterSkeleton) -> None:
    """Set the norm's scale and shift of dead filters to zero."""
    alive = layer.mask.flatten(1).any(1)
    norm.weight.mul_(alive)
    norm.bias.mul_(alive)


def _constant_output(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """What relu(norm(.)) makes of a dead filter in evaluation, whose output is its bias everywhere; (n,)."""
    bias = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return F.relu(norm.bias + scale * (bias - norm.running_mean)).detach()


def _skeleton_std(model: nn.Module) -> float:
    """How far the live skeleton entries have spread: near 0, the published score says next to nothing."""
    values = torch.cat([layer.skeleton.detach()[layer.mask].flatten() for _, _, layer in skeleton_layers(model)])
    return values.double().std(correction=0).item()
