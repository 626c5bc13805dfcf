"""What differences between methods can be told from chance: pooled noise, intervals, correction, power, verdicts.

Three seeds say little about the spread of one difference, but a bed (one network, data set and target) has many methods
that all trained with the same seeds. Accuracy is taken as a method's own level plus what a seed does to all methods
plus noise,

.. math:: y_{ms} = \\mu_m + b_s + e_{ms},

a design of randomised blocks, and the noise's standard deviation is estimated from all methods at once. A difference of
two methods over n common seeds then has the standard error sd * sqrt(2 / n), Student's with the residual's degrees of
freedom (Montgomery, *Design and Analysis of Experiments*, chapter 4). What a method and a seed do *together* is in the
noise, as it should be. Pairs that share most of their course are less noisy than that, so their interval is too wide.

A method that spreads far more than the others would make every interval too wide and its own too narrow. As with
Cochran's test for outlying variances (1941; ISO 5725-2 calls outlying what passes at 1 %, as here) such methods are
told apart, one after the other, and each is judged by its own spread (:class:`BedNoise`).

Where a table makes many comparisons, Holm's step-down procedure (1979) keeps the chance of one or more false verdicts
below 5 %, whatever they have in common. Intervals stay those of one comparison: 95 % each.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8
_OUTLYING = 0.01
PAIRS_FOR_A_VERDICT = 3  # methods.md 6
ABOVE, BELOW, INCONCLUSIVE = "above", "below", "inconclusive"


@dataclass(frozen=True)
class Noise:
    """The standard deviation of one run's accuracy about its method's and its seed's effect, in points."""

    sd: float
    df: int

    def half_width(self, n: float) -> float:
        """Of the 95 % interval of a difference of two methods' means over ``n`` common seeds."""
        return self._quantile((1 + CONFIDENCE) / 2) * self.standard_error(n)

    def half_width_of_mean(self, n: int) -> float:
        """Of the 95 % interval of one method's mean over ``n`` seeds, without what the seeds do to all methods."""
        return self._quantile((1 + CONFIDENCE) / 2) * self.sd / math.sqrt(n)

    def standard_error(self, n: float) -> float:
        return self.sd * math.sqrt(2 / n)

    def p_value(self, difference: float, n: float) -> float:
        """Two-sided, of a mean difference over ``n`` pairs, uncorrected; NaN where there is no noise to go by."""
        error = self.standard_error(n)
        if not self.df or error == 0:
            return math.nan
        return float(2 * stats.t.sf(abs(difference) / error, self.df))

    def detectable(self, n: float, comparisons: int = 1, power: float = POWER) -> float:
        """The true difference that ``n`` pairs show with probability ``power``; NaN without degrees of freedom.

        Args:
            n: pairs, one a seed; over k targets the mean of their differences has k * n.
            comparisons: in the same table; the smallest p-value has to pass alpha / comparisons, Holm's first step.
        """
        if not self.df:
            return math.nan
        critical = stats.t.isf((1 - CONFIDENCE) / comparisons / 2, self.df)

        def missed(shift: float) -> float:  # a verdict of the wrong sign, less than one in 10,000, is left out
            return stats.nct.sf(critical, self.df, shift) - power

        shift = optimize.brentq(missed, 0, critical + 10)
        return float(shift * self.standard_error(n))

    def _quantile(self, probability: float) -> float:
        return float(stats.t.ppf(probability, self.df)) if self.df else math.nan


NO_NOISE = Noise(math.nan, 0)


def pooled_noise(
    rows: pd.DataFrame, cell: str | Sequence[str], block: str = "seed", value: str = "accuracy", network: str = ""
) -> Noise:
    """The residual of cell x block over all ``rows``: least squares with an effect for each cell and each block.

    Args:
        rows: one a run.
        cell: the columns that say which runs are repetitions of each other: the method, and what else differs.
        block: the column of what is common to runs of all cells.
        value: the measured column.
        network: a column that identifies the trained network, such as its digest. Runs of different cells that ended
            as one network (a setting that changed nothing) are one observation, not several.
    """
    return _Fit(rows, cell, block, value, network).noise


class _Fit:
    """Least squares with an effect for each cell and each block; the arguments are :func:`pooled_noise`'s.

    Attributes:
        rows: those that say something of the noise, one a network of a block.
        residual: of each of these rows.
        blocks: the effect of each block, by its name.
        noise: the residual's standard deviation.
    """

    def __init__(self, rows: pd.DataFrame, cell: str | Sequence[str], block: str, value: str, network: str):
        self.cells = [cell] if isinstance(cell, str) else list(cell)
        if network:
            rows = rows.drop_duplicates([block, network])
        rows = rows.dropna(subset=[value])
        repeated = rows.groupby(self.cells, observed=True)[value].transform("size") > 1
        self.rows = rows = rows[repeated]  # one run says nothing of the noise
        self.residual, self.blocks, self.noise = pd.Series(dtype=float), pd.Series(dtype=float), NO_NOISE
        if rows.empty:
            return
        names, blocks = rows.groupby(self.cells, observed=True).ngroup(), pd.get_dummies(rows[block])
        design = np.hstack([pd.get_dummies(names).to_numpy(float), blocks.to_numpy(float)])
        y = rows[value].to_numpy(float)
        effects, _, rank, _ = np.linalg.lstsq(design, y - y.mean(), rcond=None)
        df, residual = len(y) - int(rank), y - y.mean() - design @ effects
        self.residual = pd.Series(residual, index=rows.index)
        self.blocks = pd.Series(effects[-blocks.shape[1] :], index=blocks.columns)
        self.noise = Noise(math.sqrt(residual @ residual / df), df) if df else NO_NOISE

    def spreads(self, method: str) -> dict[str, Noise]:
        """The residual's spread of each value of the column ``method``, about the means of its cells."""
        found = {}
        for name, residual in self.residual.groupby(self.rows[method], observed=True):
            df = len(residual) - self.rows.loc[residual.index].groupby(self.cells, observed=True).ngroups
            found[name] = Noise(math.sqrt((residual**2).sum() / df), df)
        return found


@dataclass(frozen=True)
class BedNoise:
    """The noise of a bed's methods: the pooled one of most, and the own one of each that spreads far more."""

    common: Noise
    own: Mapping[str, Noise] = field(default_factory=dict)

    def of(self, method: str) -> Noise:
        return self.own.get(method, self.common)

    def between(self, method: str, other: str) -> Noise:
        """For a difference of the two: the mean of their variances, with Satterthwaite's degrees of freedom."""
        if method not in self.own and other not in self.own:
            return self.common
        mean = mean_noise([self.of(method), self.of(other)])
        return Noise(mean.sd * math.sqrt(2), mean.df)


def bed_noise(
    rows: pd.DataFrame,
    cell: str | Sequence[str],
    method: str = "method",
    block: str = "seed",
    value: str = "accuracy",
    network: str = "",
    apart: Collection[str] | None = None,
) -> BedNoise:
    """The pooled noise without the methods whose variance is an outlier, and of each of these its own.

    An own noise is the method's spread beside the seeds' effects on the others.

    Args:
        method: the column of what may spread in a way of its own; the others are :func:`pooled_noise`'s.
        apart: who is told apart; None: those that :func:`outlying` finds.
    """
    apart = outlying(rows, cell, method, block, value, network) if apart is None else apart
    is_apart = rows[method].isin(list(apart))
    fit = _Fit(rows[~is_apart], cell, block, value, network)
    beside = rows[value] - rows[block].map(fit.blocks).fillna(fit.blocks.mean() if len(fit.blocks) else 0).astype(float)
    alone = rows[is_apart].assign(**{value: beside, block: 0})
    own = {name: pooled_noise(part, cell, block, value) for name, part in alone.groupby(method, observed=True)}
    return BedNoise(fit.noise, own)


def outlying(
    rows: pd.DataFrame,
    cell: str | Sequence[str],
    method: str = "method",
    block: str = "seed",
    value: str = "accuracy",
    network: str = "",
) -> list[str]:
    """The methods that spread far more than the others, the widest first; the arguments are :func:`bed_noise`'s.

    Again and again the method of the largest residual variance leaves, as long as an F test against all that are left,
    corrected for their number, has p < 0.01 and at least three stay.
    """
    found: list[str] = []
    while True:
        spreads = _Fit(rows[~rows[method].isin(found)], cell, block, value, network).spreads(method)
        if len(spreads) < 4:
            return found
        widest = max(spreads, key=lambda name: spreads[name].sd)
        rest = [noise for name, noise in spreads.items() if name != widest]
        df = sum(noise.df for noise in rest)
        variance = sum(noise.sd**2 * noise.df for noise in rest) / df
        if variance == 0:
            return found
        p = stats.f.sf(spreads[widest].sd ** 2 / variance, spreads[widest].df, df)
        if p * len(spreads) >= _OUTLYING:
            return found
        found.append(widest)


def mean_noise(noises: Sequence[Noise]) -> Noise:
    """The noise of a run's accuracy averaged over several beds, such as the targets of one network.

    Variances of independent beds add up; the degrees of freedom are Satterthwaite's (1946), rounded down. One estimate
    that serves several beds (the same object) knows no more for that. A bed without any makes the whole unknown.
    """
    if not noises or any(not noise.df for noise in noises):
        return NO_NOISE
    estimates = {id(noise): noise for noise in noises}
    parts = dict.fromkeys(estimates, 0.0)
    for noise in noises:
        parts[id(noise)] += noise.sd**2 / len(noises) ** 2
    total = sum(parts.values())
    if total == 0:
        return Noise(0.0, sum(noise.df for noise in estimates.values()))
    df = total**2 / sum(part**2 / estimates[key].df for key, part in parts.items())
    return Noise(math.sqrt(total), math.floor(df + 1e-9))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given; a NaN is no comparison and stays NaN."""
    found = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(found):
        largest = max(largest, min(1.0, p * (len(found) - rank)))
        adjusted[place] = largest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """Differences of paired runs, in points: theirs taken from ours, a pair a seed."""

    each: tuple[float, ...]
    identical: int = 0  # pairs whose two runs are one network, bit for bit

    @property
    def n(self) -> int:
        return len(self.each)

    @property
    def mean(self) -> float:
        return sum(self.each) / self.n if self.each else math.nan

    @property
    def remark(self) -> str:
        """Why there is no interval, if there is none for a reason of the runs themselves."""
        if not self.identical:
            return ""
        return "one network" if self.identical == self.n else f"one network in {self.identical} of {self.n} pairs"


def judge(comparisons: Sequence[Comparison], noise: Noise | Sequence[Noise]) -> pd.DataFrame:
    """One row a comparison of one table: difference, interval, pairs, p, Holm's p over the table, verdict.

    A comparison with bit-identical pairs gets no interval and takes no part in the correction, for noise is not what
    separates its runs; nor does one of fewer than three pairs. Their verdict says so.

    Args:
        comparisons: of one table, all of them.
        noise: of the bed, or one for each comparison.
    """
    noises = [noise] * len(comparisons) if isinstance(noise, Noise) else list(noise)
    rows = []
    for found, own in zip(comparisons, noises, strict=True):
        told = found.n > 0 and not found.identical
        counts = told and found.n >= PAIRS_FOR_A_VERDICT
        rows.append(
            {
                "difference": found.mean,
                "interval": own.half_width(found.n) if told else math.nan,
                "pairs": found.n,
                "p": own.p_value(found.mean, found.n) if counts else math.nan,
            }
        )
    table = pd.DataFrame(rows, columns=["difference", "interval", "pairs", "p"])
    table["p (Holm)"] = holm(table["p"].tolist())
    table["verdict"] = [
        _verdict(found, adjusted) for found, adjusted in zip(comparisons, table["p (Holm)"], strict=True)
    ]
    return table


def _verdict(found: Comparison, adjusted: float) -> str:
    if found.identical:
        return found.remark
    if found.n < PAIRS_FOR_A_VERDICT:
        return f"too few pairs ({found.n} of {PAIRS_FOR_A_VERDICT})"
    if math.isnan(adjusted):
        return "no spread known"
    if adjusted > 1 - CONFIDENCE:
        return INCONCLUSIVE
    return ABOVE if found.mean > 0 else BELOW


def design_sees(noise: Noise, n: int, comparisons: int) -> str:
    """The sentence beside a table: how large a difference has to be for this design to show it."""
    if not noise.df:
        return "The spread between runs is not known yet, so no difference can be told from chance: run more seeds."
    one, all_of_them = noise.detectable(n), noise.detectable(n, max(comparisons, 1))
    corrected = f", of {all_of_them:.1f} after the correction for {comparisons} comparisons" if comparisons > 1 else ""
    pairs = f"{n} pair{'s' if n != 1 else ''}"
    return (
        f"Runs of one method spread by sd {noise.sd:.2f} points ({noise.df} degrees of freedom). With {pairs} a "
        f"true difference of {one:.1f} points is seen with {POWER:.0%} probability{corrected}."
    )
