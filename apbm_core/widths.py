"""A target, and which widths meet it: the problem that the rules of :mod:`apbm_core.width_rules` solve.

A :class:`WidthProblem` knows a network only through ``count(widths)``, its size at given filter counts, so parameters,
MACs, latency or any other size that grows with the widths can be the target (for the first two there is
:meth:`apbm_core.costs.CostTable.size_function`). methods.md 1.
"""

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
        copies: Where widths count units of several filters, of how many, one a layer; ``multiple`` and ``minimum`` are
            of filters all the same.
        from_below: Whether ``target`` is the least to remove, and not to be missed by a little either.
        is_measured: Whether ``count`` is a measurement, dear and with some noise: then the target is met by a few
            steps along a rule, and no single filter is moved after them.

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
        copies: Sequence[int] | None = None,
        from_below: bool = False,
        is_measured: bool = False,
    ):
        for label, value in [("multiple", multiple), ("minimum", minimum), *(("A dense width", n) for n in dense)]:
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{label} is {value!r}; it must be a whole number of at least 1.")
        if len(dense) == 0:
            raise ConfigError("dense is empty; give the filter count of at least one layer.")
        if not is_real(target) or not 0 <= target < 1:
            raise ConfigError(
                f"target is {target!r}; give the fraction to remove, from 0 to below 1 (0.9274 is 92.74 %)."
            )
        if not is_real(tolerance) or not 0 <= tolerance < 1:
            raise ConfigError(f"tolerance is {tolerance!r}; give a fraction from 0 to below 1 (0.0005 is 0.05 points).")
        self.dense: Widths = tuple(int(n) for n in dense)
        self.from_below, self.is_measured = from_below, is_measured
        self.change = getattr(count, "change", self._change)
        self.count = functools.cache(count)  # searches revisit widths, and a user's count may build a network
        self.target = float(target)
        self.dense_count = self.count(self.dense)
        self.budget = (1 - self.target) * self.dense_count
        self.slack = tolerance * self.dense_count
        self.allowed = [
            _allowed(n, filters, multiple, minimum)
            for n, filters in zip(self.dense, copies or [1] * len(self.dense), strict=True)
        ]
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
        """How far the size is from the budget; infinitely, where it must not be above it and is."""
        over = self.count(widths) - self.budget
        return math.inf if over > 0 and self.from_below else abs(over)

    def _change(self, widths: Widths, layer: int, width: int) -> float:
        """How much larger the size is with ``width`` filters in a layer; a size function may know it at once."""
        return self.count((*widths[:layer], width, *widths[layer + 1 :])) - self.count(widths)

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
        for _ in range(8 if self.is_measured else 60):  # halves the interval down to float precision
            middle = (low + high) / 2
            low, high = (low, middle) if self.fits(widths_at(middle)) else (middle, high)
        if self.is_measured:
            return self._solution(widths_at(high)), high
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


def _allowed(n: int, copies: int, multiple: int, minimum: int) -> list[int]:
    """The widths that a layer of ``n`` units may take; its full one always, for cutting it to a round number gains
    nothing."""
    step = multiple // math.gcd(multiple, copies)
    return sorted({n, *(k for k in range(step, n, step) if k * copies >= minimum)})


def _nearest(allowed: Sequence[int], x: float) -> int:
    i = bisect_left(allowed, x)
    return min(allowed[max(i - 1, 0) : i + 1], key=lambda k: abs(k - x))


def is_real(value: object) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
