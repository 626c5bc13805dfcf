"""What the methods share that train sparsely: a pull on scales or stripes, then a cut, then fine-tuning.

The sparse training knows no target, so it is carried out once for all targets of a study; but not where its strength is
searched for the target, with short trainings.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from apbm_core.study.methods.task import Course, Task
from apbm_core.study.options import added
from apbm_core.study.training.hooks import Hook
from apbm_core.study.training.recipes import Recipe, learning_rate

StrengthFor = Literal["published", "budget"]
"""Whether a pull acts as strongly a step as published, or as strongly over the whole training."""


class SparseOptions(BaseModel):
    """Options that such a method has, whatever it pulls on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trials: int = Field(6, ge=1, description="search for the strength: settings to try")
    trial_epochs: int = Field(1, ge=1, description="search for the strength: length of each trial training")
    strength_for: StrengthFor = added(
        "published",
        if_absent="published",
        description="whether the pull acts as strongly a step as published, or over the whole of this shorter training",
    )
    course: Course = added(
        "restart",
        if_absent="restart",
        description="whether the learning rate starts its course anew after the cut or goes on with it",
    )


def train_sparsely(
    task: Task,
    model: nn.Module,
    epochs: int,
    hook: Hook,
    recipe: Mapping[str, Any] | None,
    course: tuple[float, float],
    settings: Mapping[str, Any],
) -> None:
    """The phase "sparse", shared by all targets; the target's own where its strength was searched for.

    Arguments as those of :meth:`Task.train_shared`.
    """
    if any(phase.epochs for phase in task.phases):
        task.train("sparse", model, epochs, [hook], recipe, course)
    else:
        task.train_shared("sparse", model, epochs, [hook], recipe, course, settings)


def strength_in(
    task: Task,
    strength: float,
    published: tuple[Mapping[str, Any], int],
    given: tuple[Mapping[str, Any] | None, int],
    course: tuple[float, float],
) -> float:
    """The strength of the pull in this run: as published, or scaled to its epochs if its options say so.

    Args:
        task: the run, whose options are :class:`SparseOptions`.
        strength: the published one.
        published, given: overrides of the recipe, and epochs, of the published training and of this one.
        course: the part of the recipe's course that this one goes through.
    """
    if task.options.strength_for == "published":
        return strength
    (their_recipe, their_epochs), (recipe, epochs) = published, given
    trainings = (task.recipe(their_recipe), their_epochs), (task.recipe(recipe), epochs)
    return scaled_to_budget(strength, *trainings, len(task.split.train), course)


def scaled_to_budget(
    strength: float,
    published: tuple[Recipe, int],
    given: tuple[Recipe, int],
    images: int,
    course: tuple[float, float] = (0.0, 1.0),
) -> float:
    """``strength`` of a pull per step, such that it moves a weight as far in the given training as in the published.

    A pull of constant strength moves a weight by strength * the sum of all steps' learning rates. Of the published
    training CIFAR's 50,000 images are counted.

    Args:
        strength: the published one.
        published: recipe and epochs of the published training.
        given: recipe and epochs of this one.
        images: that this one has in an epoch.
        course: the part of the recipe's course that this one goes through.
    """
    whole = total_rate(*published, 50_000)
    return strength * whole / total_rate(*given, images, course)


def total_rate(recipe: Recipe, epochs: int, images: int, course: tuple[float, float] = (0.0, 1.0)) -> float:
    """The sum of the learning rates of all steps of a training."""
    steps = epochs * -(-images // recipe.batch_size)
    begin, end = course
    return sum(learning_rate(recipe, begin + (end - begin) * step / steps) for step in range(steps))


def bisect_setting(
    removed: Callable[[int, float], float], low: float, high: float, target: float, trials: int
) -> tuple[float, float]:
    """The setting in [low, high] that removes closest to ``target``, by bisection.

    Args:
        removed: fraction removed at trial i with a setting; expected to grow with it.
        trials: how many settings to try.

    Returns:
        The best setting tried, and the fraction that it removed.
    """
    tried = []
    for trial in range(trials):
        middle = (low + high) / 2
        tried.append((middle, removed(trial, middle)))
        low, high = (middle, high) if tried[-1][1] < target else (low, middle)
    return min(tried, key=lambda pair: abs(pair[1] - target))


def sparse_start(task: Task, scale: float) -> nn.Module:
    """The dense network with every BatchNorm scale at ``scale``; one that is trained already keeps those it has."""
    model = task.build()
    return model if task.config.start_epochs else start_norms(model, scale)


@torch.no_grad()
def start_norms(model: nn.Module, scale: float) -> nn.Module:
    """Set every BatchNorm scale to ``scale``, in place; returns ``model``."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(scale)
    return model
