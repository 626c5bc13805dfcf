"""How many filters each layer keeps: published tables, a target solver, and the entropy budget (methods.md 1).

The solvers know a network only through ``count(widths)``, its size at given filter counts, so that parameters, MACs or
any other size that grows with the widths can be the target. ``counting.size_function`` is it for ``models.py``.
"""

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from types import MappingProxyType

from apbm_core.errors import ConfigError
from apbm_core.study.networks.models import dense_widths
from apbm_core.study.networks.published_widths import PUBLISHED_WIDTHS, PublishedWidths, widths_from_rates
from apbm_core.study.networks.sizes import SizeFunction, size_function

__all__ = [
    "PUBLISHED_WIDTHS",
    "SOLVERS",
    "PublishedWidths",
    "WidthSolution",
    "balanced_widths",
    "check_published_target",
    "entropy_budget_model_widths",
    "entropy_budget_widths",
    "solve_model_widths",
    "solve_widths",
    "widths_from_rates",
]

Widths = tuple[int, ...]

_PUBLISHED_TOLERANCE = 0.005  # in shares of the dense size: half a point


@dataclass(frozen=True)
class WidthSolution:
    """Filter counts that meet a target, and how closely.

    Attributes:
        widths: Filters each layer keeps.
        target: Fraction of the dense size that was to be removed.
        removed: Fraction that these widths remove.
        count: Size at these widths.
        dense_count: Size at the dense widths.
        within_tolerance: Whether ``removed`` is as close to ``target`` as was asked.
        exponent: The entropy budget's g, before single filters were moved; ``None`` for a uniform ratio.
    """

    widths: Widths
    target: float
    removed: float
    count: int
    dense_count: int
    within_tolerance: bool
    exponent: float | None = None


def solve_widths(
    dense: Sequence[int],
    count: SizeFunction,
    target: float,
    *,
    tolerance: float = 0.0005,
    multiple: int = 1,
    minimum: int = 1,
) -> WidthSolution:
    """Keep the same ratio of every layer's filters so that ``target`` of the network's size is removed.

    The largest ratio that fits the budget of (1 - target) * dense size is bisected. Layers that the next larger ratio
    would widen are then widened one filter at a time, from input to output, as long as they fit. While the size is
    still off by more than the tolerance, the one-filter change that brings it closest to the budget is made; failing
    that, the pair of one filter more here and one fewer there. Ties go to the first layer. No randomness is involved.

    Args:
        dense: Filters of each layer, n_l.
        count: Size of the network (parameters, MACs, ...) at given filter counts; must grow with each of them.
        target: Fraction of ``count(dense)`` to remove, 0 <= target < 1.
        tolerance: How far ``removed`` may be from ``target``; 0.0005 is 0.05 percentage points.
        multiple: Allow only multiples of this, and a layer's full width. "One filter" above is then this many.
        minimum: Fewest filters a layer keeps (a narrower layer keeps all of its own).

    Returns:
        The solution. Where filters come too coarse for the tolerance (large multiples, tiny networks), the
        closest one found, with ``within_tolerance`` False.

    Raises:
        ConfigError: If an argument is out of range, or even the minimum widths remove less than ``target``.
    """
    problem = _Problem(dense, count, target, tolerance, multiple, minimum)
    solution, _ = _solve(problem, lambda removed: problem.nearest([n * (1 - removed) for n in problem.dense]))
    return solution


def entropy_budget_widths(
    dense: Sequence[int],
    redundancy: Sequence[float],
    count: SizeFunction,
    target: float,
    *,
    tolerance: float = 0.0005,
    multiple: int = 1,
    minimum: int = 1,
) -> WidthSolution:
    """Remove ``target`` of the network's size, more from layers whose filters resemble each other.

    keep_l = clip(round(n_l (1 - R_l)^g), minimum, n_l) with one exponent g for the network, bisected to the target;
    then single filters are moved as in ``solve_widths``.

    Args:
        dense: Filters of each layer, n_l.
        redundancy: R_l = mean_i exp(H_i) / n_l in (0, 1], the share of its layer that a filter resembles.
        count, target, tolerance, multiple, minimum: As in ``solve_widths``.

    Raises:
        ConfigError: As in ``solve_widths``, or if a redundancy is outside (0, 1].
    """
    problem = _Problem(dense, count, target, tolerance, multiple, minimum)
    if len(redundancy) != len(problem.dense):
        raise ConfigError(f"There are {len(redundancy)} redundancies for {len(dense)} layers; give one for each layer.")
    for layer, value in enumerate(redundancy, start=1):
        if not _is_real(value) or not 0 < value <= 1:
            raise ConfigError(f"The redundancy of layer {layer} is {value!r}; it must be above 0 and at most 1.")
    # In logarithms, because 1 - R rounds to 1 for a tiny R and would never shrink.
    log_unique = [math.log1p(-value) if value < 1 else -math.inf for value in map(float, redundancy)]

    def widths_at(g: float) -> Widths:
        if g == 0:
            return problem.dense
        return problem.nearest([n * math.exp(g * log) for n, log in zip(problem.dense, log_unique, strict=True)])

    solution, g = _solve(problem, widths_at)
    return replace(solution, exponent=g)


def balanced_widths(
    dense: Sequence[int],
    count: SizeFunction,
    target: float,
    *,
    tolerance: float = 0.0005,
    multiple: int = 1,
    minimum: int = 1,
) -> WidthSolution:
    """Remove ``target`` of the network's size where filters are expensive: no layer becomes a bottleneck.

    Widths whose harmonic mean is the largest that fits the budget, found one filter at a time: the one whose loss of
    ``sum 1 / keep_l`` is smallest for what it saves goes first; then single filters are moved as in ``solve_widths``.
    In networks that widen towards the output filters cost most there, so early layers stay wide and late ones become
    narrow, which takes more MACs at equal parameters. It looks at no weights (ours).

    Args:
        dense, count, target, tolerance, multiple, minimum: As in ``solve_widths``.

    Raises:
        ConfigError: As in ``solve_widths``.
    """
    problem = _Problem(dense, count, target, tolerance, multiple, minimum)
    problem.require_reachable()
    widths = problem.dense
    while not problem.fits(widths):
        size = problem.count(widths)
        narrower = [step for layer in range(len(widths)) if (step := problem.step(widths, layer, -1))]
        widths = min(narrower, key=lambda step: _harmonic_loss(widths, step) / max(size - problem.count(step), 1e-9))
    return problem.solution(_polish(problem, widths))


def _harmonic_loss(wider: Widths, narrower: Widths) -> float:
    return sum(1 / b - 1 / a for a, b in zip(wider, narrower, strict=True) if a != b)


SOLVERS = MappingProxyType({"uniform": solve_widths, "balanced": balanced_widths})


@functools.cache
def solve_model_widths(
    name: str,
    num_classes: int,
    target: float,
    by: str = "params",
    rule: str = "uniform",
    *,
    tolerance: float = 0.0005,
    multiple: int = 1,
    minimum: int = 1,
    **options,
) -> WidthSolution:
    """``solve_widths`` or another solver for a network of ``models.py``, remembered for the rest of the process.

    Args:
        name, num_classes, **options: As in ``build_model``.
        target: Fraction to remove of ``by``: "params", or "macs" of one 3x32x32 image.
        rule: "uniform" for ``solve_widths``, "balanced" for ``balanced_widths``.
        tolerance, multiple, minimum: As in ``solve_widths``.

    Raises:
        ConfigError: As in ``solve_widths``, or on an unknown ``by``.
    """
    count = size_function(name, num_classes, by, **options)
    solve = SOLVERS[rule]
    return solve(dense_widths(name), count, target, tolerance=tolerance, multiple=multiple, minimum=minimum)


def entropy_budget_model_widths(
    name: str, num_classes: int, redundancy: Sequence[float], target: float, by: str = "params", minimum: int = 4
) -> WidthSolution:
    """``entropy_budget_widths`` for a network of ``models.py``; arguments as in ``solve_model_widths``."""
    count = size_function(name, num_classes, by)
    return entropy_budget_widths(dense_widths(name), redundancy, count, target, minimum=minimum)


def check_published_target(name: str, model: str, num_classes: int, target: float, by: str = "params") -> None:
    """Raise ConfigError unless a published vector is this network's and removes the target, to half a point.

    Args:
        name: One of ``PUBLISHED_WIDTHS``.
        model, num_classes: As in ``build_model``.
        target: Fraction to remove of ``by``, as in ``solve_model_widths``.
    """
    published = PUBLISHED_WIDTHS[name]
    if published.model != model:
        raise ConfigError(f"the widths {name!r} are {published.model}'s, not {model}'s.")
    count = size_function(model, num_classes, by)
    removed = 1 - count(published.widths) / count(dense_widths(model))
    if abs(removed - target) > _PUBLISHED_TOLERANCE:
        raise ConfigError(
            f"the target {target} for {model} is not what the widths {name!r} remove: {removed:.4f} of the {by} with "
            f"{num_classes} classes. Set targets = {{{model!r}: [{removed:.4f}]}}, or widths = 'uniform', which meets "
            "any target."
        )


class _Problem:
    """A checked target: which widths each layer may take, and how far a choice of them is from the budget."""

    def __init__(
        self, dense: Sequence[int], count: SizeFunction, target: float, tolerance: float, multiple: int, minimum: int
    ):
        for label, value in [("multiple", multiple), ("minimum", minimum), *(("A dense width", n) for n in dense)]:
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{label} is {value!r}; it must be a whole number of at least 1.")
        if len(dense) == 0:
            raise ConfigError("dense is empty; give the filter count of at least one layer.")
        if not _is_real(target) or not 0 <= target < 1:
            raise ConfigError(
                f"target is {target!r}; give the fraction to remove, from 0 to below 1 (0.9274 is 92.74 %)."
            )
        if not _is_real(tolerance) or not 0 <= tolerance < 1:
            raise ConfigError(f"tolerance is {tolerance!r}; give a fraction from 0 to below 1 (0.0005 is 0.05 points).")
        self.dense: Widths = tuple(int(n) for n in dense)
        self.count = functools.cache(count)  # searches revisit widths, and a user's count may build a network
        self.target = float(target)
        self.dense_count = self.count(self.dense)
        self.budget = (1 - self.target) * self.dense_count
        self.slack = tolerance * self.dense_count
        # A layer's full width is always allowed: there is nothing to gain from cutting it to a round number.
        self.allowed = [sorted({n, *(k for k in range(multiple, n, multiple) if k >= minimum)}) for n in self.dense]
        self.smallest: Widths = tuple(allowed[0] for allowed in self.allowed)

    def require_reachable(self) -> None:
        """Raise ConfigError if even the smallest widths remove too little."""
        if self.count(self.smallest) > self.budget + self.slack:
            reach = self.solution(self.smallest).removed
            raise ConfigError(
                f"Cannot remove {100 * self.target:.6g} %: with every layer at its minimum width, {reach:.2%} is the "
                "most that these layers give. Lower the target, the minimum or the multiple."
            )

    def nearest(self, ideal: Sequence[float]) -> Widths:
        """The allowed widths closest to ``ideal``, the smaller one at a tie."""
        return tuple(_nearest(allowed, x) for allowed, x in zip(self.allowed, ideal, strict=True))

    def fits(self, widths: Widths) -> bool:
        return self.count(widths) <= self.budget

    def error(self, widths: Widths) -> float:
        return abs(self.count(widths) - self.budget)

    def step(self, widths: Widths, layer: int, by: int) -> Widths | None:
        """``widths`` with one layer at its next larger (``by`` = 1) or smaller (-1) width; None if there is none."""
        i = self.allowed[layer].index(widths[layer]) + by
        if not 0 <= i < len(self.allowed[layer]):
            return None
        return (*widths[:layer], self.allowed[layer][i], *widths[layer + 1 :])

    def single_steps(self, widths: Widths) -> Iterator[Widths]:
        for layer in range(len(widths)):
            yield from filter(None, (self.step(widths, layer, by) for by in (1, -1)))

    def exchanges(self, widths: Widths) -> Iterator[Widths]:
        for layer in range(len(widths)):
            wider = self.step(widths, layer, 1)
            for other in range(len(widths) if wider else 0):
                if other != layer and (exchanged := self.step(wider, other, -1)):
                    yield exchanged

    def solution(self, widths: Widths) -> WidthSolution:
        size = self.count(widths)
        return WidthSolution(
            widths=widths,
            target=self.target,
            removed=1 - size / self.dense_count,
            count=size,
            dense_count=self.dense_count,
            within_tolerance=self.error(widths) <= self.slack,
        )


def _solve(problem: _Problem, widths_at: Callable[[float], Widths]) -> tuple[WidthSolution, float]:
    """Meet the target along ``widths_at(x)``: dense at x = 0, never wider as x grows. Returns the x reached, too."""
    problem.require_reachable()
    if problem.fits(problem.dense):
        return problem.solution(problem.dense), 0.0
    low, high = 0.0, 1.0
    while not problem.fits(widths_at(high)) and widths_at(high) != problem.smallest:
        low, high = high, 2 * high
    for _ in range(60):  # halves the interval down to float precision
        middle = (low + high) / 2
        low, high = (low, middle) if problem.fits(widths_at(middle)) else (middle, high)
    widths = _fill(problem, widths_at(high), widths_at(low))
    return problem.solution(_polish(problem, widths)), high


def _fill(problem: _Problem, widths: Widths, limit: Widths) -> Widths:
    """Widen the layers towards ``limit``, from input to output, as long as the budget holds."""
    for layer, most in enumerate(limit):
        while widths[layer] < most and problem.fits(wider := problem.step(widths, layer, 1)):
            widths = wider
    return widths


def _polish(problem: _Problem, widths: Widths) -> Widths:
    """Make the change that brings the size closest to the budget until it is within tolerance or none helps."""
    while problem.error(widths) > problem.slack:
        better = min(problem.single_steps(widths), key=problem.error, default=widths)
        if problem.error(better) >= problem.error(widths):
            better = min(problem.exchanges(widths), key=problem.error, default=widths)
        if problem.error(better) >= problem.error(widths):
            break
        widths = better
    return widths


def _nearest(allowed: Sequence[int], x: float) -> int:
    i = bisect_left(allowed, x)
    return min(allowed[max(i - 1, 0) : i + 1], key=lambda k: abs(k - x))


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
