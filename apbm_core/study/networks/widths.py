"""How many filters each layer of a network of the study keeps: by a rule that meets a target, or as published.

The rules themselves serve any network and live in :mod:`apbm_core.width_rules`.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from apbm_core.errors import ConfigError
from apbm_core.study.networks.models import cost_table, dense_widths
from apbm_core.study.networks.published_widths import PUBLISHED_WIDTHS
from apbm_core.width_rules import balanced_widths, entropy_budget_widths, marginal_utility_widths, uniform_widths
from apbm_core.widths import SizeFunction, WidthProblem, WidthSolution

SOLVERS = MappingProxyType({"uniform": uniform_widths, "balanced": balanced_widths})

MINIMUM = 4
"""Filters that every layer keeps where the network itself decides how wide its layers are."""

_PUBLISHED_TOLERANCE = 0.005  # in shares of the dense size: half a point


def width_problem(name: str, num_classes: int, target: float, by: str = "params", **limits) -> WidthProblem:
    """The problem of removing a target from a network of the study.

    Args:
        name, num_classes: As in ``build_model``.
        target: Fraction to remove of ``by``: "params", or "macs" of one image (:func:`models.cost_table`).
        **limits: ``tolerance``, ``multiple`` and ``minimum`` of :class:`apbm_core.widths.WidthProblem`.

    Raises:
        ConfigError: On an unknown name or ``by``, or as in ``WidthProblem``.
    """
    return WidthProblem(dense_widths(name), cost_table(name, num_classes).size_function(by), target, **limits)


@functools.cache
def solve_model_widths(
    name: str, num_classes: int, target: float, by: str = "params", rule: str = "uniform", **limits
) -> WidthSolution:
    """The widths of the rule, one of ``SOLVERS``, remembered for the rest of the process; else as ``width_problem``."""
    return SOLVERS[rule](width_problem(name, num_classes, target, by, **limits))


def entropy_budget_model_widths(
    name: str, num_classes: int, redundancy: Sequence[float], target: float, by: str = "params", minimum: int = MINIMUM
) -> WidthSolution:
    """``entropy_budget_widths`` for a network of the study; else as ``width_problem``."""
    return entropy_budget_widths(width_problem(name, num_classes, target, by, minimum=minimum), redundancy)


def marginal_utility_model_widths(
    name: str,
    num_classes: int,
    scores: Sequence[Sequence[float]],
    target: float,
    by: str = "params",
    mac_weight: float = 0.0,
    minimum: int = MINIMUM,
    tied: bool = False,
) -> WidthSolution:
    """``marginal_utility_widths`` for a network of the study; else as ``width_problem``.

    ``tied`` keeps neighbouring layers of equal dense width, a stage, equally wide: then the rule cannot alternate, and
    identity branches stay possible. The target is met as closely as whole steps of a stage can.
    """
    costs, dense = cost_table(name, num_classes), dense_widths(name)
    stages = [len(list(run)) for _, run in itertools.groupby(dense)] if tied else [1] * len(dense)
    firsts = list(itertools.accumulate(stages, initial=0))[:-1]

    def expanded(widths: Sequence[int]) -> tuple[int, ...]:
        return tuple(width for width, layers in zip(widths, stages, strict=True) for _ in range(layers))

    def count_of(what: str) -> SizeFunction:
        count = costs.size_function(what)
        return lambda widths: count(expanded(widths))

    if len(scores) == len(dense):  # one score for the filters of a rank in all layers of a stage
        ranked = [sorted(layer, reverse=True) for layer in scores]
        scores = [
            [math.fsum(filters) for filters in zip(*ranked[first : first + layers], strict=True)]
            for first, layers in zip(firsts, stages, strict=True)
        ]
    problem = WidthProblem([dense[first] for first in firsts], count_of(by), target, minimum=minimum)
    solution = marginal_utility_widths(problem, scores, count_of("macs"), mac_weight)
    return replace(solution, widths=expanded(solution.widths))


def check_published_target(name: str, model: str, num_classes: int, target: float, by: str = "params") -> None:
    """Raise ConfigError unless a published vector is this network's and removes the target, to half a point.

    Args:
        name: One of ``PUBLISHED_WIDTHS``.
        model, num_classes: As in ``build_model``.
        target: Fraction to remove of ``by``, as in ``width_problem``.
    """
    published = PUBLISHED_WIDTHS[name]
    if published.model != model:
        raise ConfigError(f"the widths {name!r} are {published.model}'s, not {model}'s.")
    count = cost_table(model, num_classes).size_function(by)
    removed = 1 - count(published.widths) / count(dense_widths(model))
    if abs(removed - target) > _PUBLISHED_TOLERANCE:
        raise ConfigError(
            f"the target {target} for {model} is not what the widths {name!r} remove: {removed:.4f} of the {by} with "
            f"{num_classes} classes. Set targets = {{{model!r}: [{removed:.4f}]}}, or widths = 'uniform', which meets "
            "any target."
        )
