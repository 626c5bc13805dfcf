"""How many filters each layer keeps so that a target is met: one ratio for all, balanced, or by a signal of the method.

A :class:`WidthProblem` knows a network only through ``count(widths)``, its size at given filter counts, so parameters,
MACs or any other size that grows with the widths can be the target (:meth:`apbm_core.costs.CostTable.size_function`).
The rules are functions of a problem; each ends with the same polishing. methods.md 1 and 8. No randomness is involved.
"""

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

from apbm_core.errors import ConfigError

Widths = tuple[int, ...]
SizeFunction = Callable[[Sequence[int]], int]


@dataclass(frozen=True)
class WidthSolution:
    """Filter counts that meet a target, and how closely.

    Attributes:
        widths: Filters each layer keeps.
        target: Fraction of the dense size that was to be removed.
        removed: Fraction that these widths remove.
        count: Size at these widths.
        dense_count: Size at the dense widths.
        within_tolerance: Whether ``removed`` is as close to ``target`` as was asked. Where filters come too coarse for
            that (large multiples, tiny networks), the widths are the closest found.
        exponent: The entropy budget's g, before single filters were moved; ``None`` for the other rules.
    """

    widths: Widths
    target: float
    removed: float
    count: int
    dense_count: int
    within_tolerance: bool
    exponent: float | None = None


class WidthProblem:
    """A target: which widths each layer may take, and how far a choice of them is from the budget.

    Args:
        dense: Filters of each layer, n_l.
        count: Size of the network (parameters, MACs, ...) at given filter counts; must grow with each of them.
        target: Fraction of ``count(dense)`` to remove, 0 <= target < 1.
        tolerance: How far ``removed`` may be from ``target``; 0.0005 is 0.05 percentage points.
        multiple: Allow only multiples of this, and a layer's full width. "One filter" is then this many.
        minimum: Fewest filters a layer keeps (a narrower layer keeps all of its own).

    Raises:
        ConfigError: If an argument is out of range, or even the minimum widths remove less than ``target``.
    """

    def __init__(
        self,
        dense: Sequence[int],
        count: SizeFunction,
        target: float,
        *,
        tolerance: float = 0.0005,
        multiple: int = 1,
        minimum: int = 1,
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
        if self.count(self.smallest) > self.budget + self.slack:
            reach = 1 - self.count(self.smallest) / self.dense_count
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

    def steps(self, widths: Widths, by: int) -> Iterator[tuple[int, Widths]]:
        """Every layer that has a next width in the direction ``by``, with the widths it makes."""
        for layer in range(len(widths)):
            if (changed := self.step(widths, layer, by)) is not None:
                yield layer, changed

    def meet_along(self, widths_at: Callable[[float], Widths]) -> tuple[WidthSolution, float]:
        """Meet the target along ``widths_at(x)``: dense at x = 0, never wider as x grows.

        The smallest x that fits the budget is bisected. Layers that a smaller x would widen are then widened one filter
        at a time, from input to output, as long as they fit, and the result is polished.

        Returns:
            The solution, and the x that was reached.
        """
        if self.fits(self.dense):
            return self._solution(self.dense), 0.0
        low, high = 0.0, 1.0
        while not self.fits(widths_at(high)) and widths_at(high) != self.smallest:
            low, high = high, 2 * high
        for _ in range(60):  # halves the interval down to float precision
            middle = (low + high) / 2
            low, high = (low, middle) if self.fits(widths_at(middle)) else (middle, high)
        return self.polished(self._filled(widths_at(high), widths_at(low))), high

    def polished(self, widths: Widths) -> WidthSolution:
        """The solution near ``widths``: while the size is off by more than the tolerance, the one-filter change that
        brings it closest to the budget is made; failing that, the pair of one filter more here and one fewer there.
        Ties go to the first layer."""
        while self.error(widths) > self.slack:
            better = min(self._single_steps(widths), key=self.error, default=widths)
            if self.error(better) >= self.error(widths):
                better = min(self._exchanges(widths), key=self.error, default=widths)
            if self.error(better) >= self.error(widths):
                break
            widths = better
        return self._solution(widths)

    def _single_steps(self, widths: Widths) -> Iterator[Widths]:
        for layer in range(len(widths)):
            yield from filter(None, (self.step(widths, layer, by) for by in (1, -1)))

    def _exchanges(self, widths: Widths) -> Iterator[Widths]:
        for layer, wider in self.steps(widths, 1):
            for other, exchanged in self.steps(wider, -1):
                if other != layer:
                    yield exchanged

    def _filled(self, widths: Widths, limit: Widths) -> Widths:
        """Widen the layers towards ``limit``, from input to output, as long as the budget holds."""
        for layer, most in enumerate(limit):
            while widths[layer] < most and self.fits(wider := self.step(widths, layer, 1)):
                widths = wider
        return widths

    def _solution(self, widths: Widths) -> WidthSolution:
        size = self.count(widths)
        return WidthSolution(
            widths=widths,
            target=self.target,
            removed=1 - size / self.dense_count,
            count=size,
            dense_count=self.dense_count,
            within_tolerance=self.error(widths) <= self.slack,
        )


def uniform_widths(problem: WidthProblem) -> WidthSolution:
    """Keep the same ratio of every layer's filters: the largest that fits."""
    return problem.meet_along(lambda removed: problem.nearest([n * (1 - removed) for n in problem.dense]))[0]


def balanced_widths(problem: WidthProblem) -> WidthSolution:
    """Remove where filters are expensive, so that no layer becomes a bottleneck.

    Widths whose harmonic mean is the largest that fits the budget, found one filter at a time: the one whose loss of
    ``sum 1 / keep_l`` is smallest for what it saves goes first. In networks that widen towards the output filters cost
    most there, so early layers stay wide and late ones become narrow, which takes more MACs at equal parameters. It
    looks at no weights (ours).
    """
    widths = problem.dense
    while not problem.fits(widths):
        size = problem.count(widths)

        def loss_for_gain(step: tuple[int, Widths], widths: Widths = widths, size: int = size) -> float:
            layer, narrower = step
            loss = 1 / narrower[layer] - 1 / widths[layer]
            return loss / max(size - problem.count(narrower), 1e-9)

        _, widths = min(problem.steps(widths, -1), key=loss_for_gain)
    return problem.polished(widths)


def entropy_budget_widths(problem: WidthProblem, redundancy: Sequence[float]) -> WidthSolution:
    """Remove more from layers whose filters resemble each other (methods.md 1).

    keep_l = clip(round(n_l (1 - R_l)^g), minimum, n_l) with one exponent g for the network, bisected to the target.

    Args:
        problem: The target.
        redundancy: R_l = mean_i exp(H_i) / n_l in (0, 1], the share of its layer that a filter resembles.

    Raises:
        ConfigError: If a redundancy is outside (0, 1], or they are not one a layer.
    """
    if len(redundancy) != len(problem.dense):
        raise ConfigError(
            f"There are {len(redundancy)} redundancies for {len(problem.dense)} layers; give one for each layer."
        )
    for layer, value in enumerate(redundancy, start=1):
        if not _is_real(value) or not 0 < value <= 1:
            raise ConfigError(f"The redundancy of layer {layer} is {value!r}; it must be above 0 and at most 1.")
    # In logarithms, because 1 - R rounds to 1 for a tiny R and would never shrink.
    log_unique = [math.log1p(-value) if value < 1 else -math.inf for value in map(float, redundancy)]

    def widths_at(g: float) -> Widths:
        if g == 0:
            return problem.dense
        return problem.nearest([n * math.exp(g * log) for n, log in zip(problem.dense, log_unique, strict=True)])

    solution, g = problem.meet_along(widths_at)
    return replace(solution, exponent=g)


def marginal_utility_widths(
    problem: WidthProblem,
    scores: Sequence[Sequence[float]],
    macs: SizeFunction | None = None,
    mac_weight: float = 0.0,
) -> WidthSolution:
    r"""Spend the budget filter by filter where the next one is worth most for its price (methods.md 8).

    From the smallest widths on, the next filter goes to the layer of the largest

    .. math:: \frac{s_l(c_l)}{\Delta_l} + \lambda M_l

    among those whose next filter still fits: s_l(c) the score of the layer's filter of rank c + 1, the gain; Delta_l
    what that filter adds to the size, k^2 (c_{l-1} + c_{l+1}) weights and its norm in a chain of convolutions; M_l the
    multiply-accumulates it adds. Ties go to the first layer.

    In a chain of layers a filter is cheap between narrow neighbours, so the rule tends to alternate: a wide layer
    between two narrow ones buys the most score. Tie the layers of a stage together where that is not wanted.

    Args:
        problem: The target.
        scores: The relative-entropy scores of each layer's filters, in any order, (n_l,) each; not negative.
        macs: Multiply-accumulates at given filter counts; needed for a ``mac_weight``.
        mac_weight: lambda, in units of score per parameter and multiply-accumulate; positive favours large maps.

    Raises:
        ConfigError: If the scores are not one finite number of at least 0 for each filter, or ``macs`` is missing.
    """
    if [len(layer) for layer in scores] != list(problem.dense):
        raise ConfigError(
            f"There are scores of {[len(layer) for layer in scores]} filters for layers of {list(problem.dense)}; give "
            "one for each filter of each layer."
        )
    if not _is_real(mac_weight) or (mac_weight and macs is None):
        raise ConfigError(f"mac_weight is {mac_weight!r}; it must be a number, and anything but 0 needs `macs`.")
    curves = []
    for number, layer in enumerate(scores, start=1):
        if not all(_is_real(score) and score >= 0 for score in layer):
            raise ConfigError(f"The scores of layer {number} are not all finite numbers of at least 0.")
        best_first = sorted(map(float, layer), reverse=True)
        curves.append([0.0, *(math.fsum(best_first[:count]) for count in range(1, len(best_first) + 1))])

    def utility(widths: Widths, layer: int, wider: Widths) -> float:
        gain = curves[layer][wider[layer]] - curves[layer][widths[layer]]
        value = gain / max(problem.count(wider) - problem.count(widths), 1e-9)
        return value + mac_weight * (macs(wider) - macs(widths)) if mac_weight else value

    widths = problem.smallest
    while steps := [(layer, wider) for layer, wider in problem.steps(widths, 1) if problem.fits(wider)]:
        current = widths
        _, widths = max(steps, key=lambda step: utility(current, *step))
    return problem.polished(widths)


def _nearest(allowed: Sequence[int], x: float) -> int:
    i = bisect_left(allowed, x)
    return min(allowed[max(i - 1, 0) : i + 1], key=lambda k: abs(k - x))


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
