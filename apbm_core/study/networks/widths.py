"""How many filters each layer of a network of the study keeps: by a rule that meets a target, or as published.

The rules themselves serve any network and live in :mod:`apbm_core.widths`.
"""

import functools
from collections.abc import Sequence
from types import MappingProxyType

from apbm_core.errors import ConfigError
from apbm_core.study.networks.models import cost_table, dense_widths
from apbm_core.study.networks.published_widths import PUBLISHED_WIDTHS
from apbm_core.widths import (
    WidthProblem,
    WidthSolution,
    balanced_widths,
    entropy_budget_widths,
    marginal_utility_widths,
    uniform_widths,
)

SOLVERS = MappingProxyType({"uniform": uniform_widths, "balanced": balanced_widths})

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
    name: str, num_classes: int, redundancy: Sequence[float], target: float, by: str = "params", minimum: int = 4
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
    minimum: int = 4,
) -> WidthSolution:
    """``marginal_utility_widths`` for a network of the study; else as ``width_problem``."""
    problem = width_problem(name, num_classes, target, by, minimum=minimum)
    macs = cost_table(name, num_classes).size_function("macs")
    return marginal_utility_widths(problem, scores, macs, mac_weight)


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
