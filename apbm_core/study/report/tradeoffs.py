"""Accuracy against what it costs: parameters, multiply-accumulates, training time; a panel a network and data set.

APBM, the paper's three rivals, APBM at widths of its own and the reader's own method have a colour, slim from scratch
is black, and all others are grey: ten coloured lines are told apart by nobody. Every line carries its name at its right
end. A point is the mean over the seeds that the methods share there. Bands and bars are 95 % intervals
(:func:`apbm_core.study.report.frames.points`).
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from apbm_core.study.grid.calibration import Calibration
from apbm_core.study.methods import label, ordered
from apbm_core.study.records import RunRecord
from apbm_core.study.report.curve_titles import in_accuracy, in_macs, in_time
from apbm_core.study.report.frames import beds, label_dataset, label_model, of_bed, of_shared_seeds, points, runs_frame
from apbm_core.study.report.rivals import over_targets
from apbm_core.study.report.style import colour, line_style, marker, set_title

_IN_COLOUR = ("apbm", "hrank", "polarization", "swp")
_GREY = "#A8A8A8"
_TICKS = (0, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95, 97, 98, 99, 99.5)  # percent removed
_LINE = 11  # points between two names
_WIDEST_BAND = 5  # points of accuracy to each side


def accuracy_curves(records: Sequence[RunRecord]) -> Figure:
    """Accuracy against the parameters removed. A network with one target has its methods listed instead."""
    return _panels(records, "parameters removed", None)


def accuracy_against_macs(records: Sequence[RunRecord]) -> Figure:
    """Accuracy against the multiply-accumulates removed."""
    return _panels(records, "MACs removed", None)


def accuracy_against_time(records: Sequence[RunRecord], calibration: Calibration | None = None) -> Figure:
    """Accuracy against the total training time of a run, shared phases included, on a logarithmic axis.

    Hollow marks are runs that were given the time of L1's. Runs that were timed under other conditions than most of the
    network's are faint; there are none where a calibration covers them all.
    """
    return _panels(records, "training seconds", calibration)


def _panels(records: Sequence[RunRecord], against: str, calibration: Calibration | None) -> Figure:
    frame = runs_frame(records, calibration)
    table, whole = points(of_shared_seeds(frame)), over_targets(frame)
    panels = [(bed, of_bed(table, *bed[:2])) for bed in beds(table)]
    lists = [against == "parameters removed" and not _has_several_targets(part) for _, part in panels]
    heights = [
        1.6 + 0.3 * part["method"].nunique() if is_list else 4.8
        for is_list, (_, part) in zip(lists, panels, strict=True)
    ]
    shape = {"figsize": (8.4, sum(heights)), "height_ratios": heights, "squeeze": False}
    figure, axes = plt.subplots(len(panels), 1, **shape)
    for axis, is_list, ((model, dataset, _), part) in zip(axes[:, 0], lists, panels, strict=True):
        means = of_bed(whole, model, dataset)
        if against == "training seconds":
            _against_time(axis, part)
        elif is_list:
            _list_of_methods(axis, part[part["schedule"] != "equal-time"])
        else:
            _against_removed(axis, part[part["schedule"] != "equal-time"], against)
        if against == "training seconds":
            words = in_time(part)
        elif against == "MACs removed":
            words = in_macs(part, [name for name in _methods(part) if _ink(name) != _GREY])
        else:
            words = in_accuracy(part, means)
        set_title(axis, f"{label_model(model)}, {label_dataset(dataset)}: {words}", 84)
    return figure


def _has_several_targets(part: pd.DataFrame) -> bool:
    return part[part["target"] > 0]["target"].nunique() > 1


def _against_removed(axis: Axes, part: pd.DataFrame, removed: str) -> None:
    # equal steps are equal factors of what is left: 97 and 99 % are as far apart as 50 and 83 %
    axis.set_xscale("function", functions=(lambda x: -np.log10(1 - np.minimum(x, 99.99) / 100), _inverse))
    pruned = part[part["target"] > 0]
    lines = {name: pruned[pruned["method"] == name].sort_values(removed) for name in _methods(part)}
    _dense_band(axis, part)
    for method, line in lines.items():
        _draw(axis, line[removed], line, method)
    low, high = pruned[removed].min(), pruned[removed].max()
    ticks = sorted(pruned["target"].unique()) if removed == "parameters removed" else _TICKS
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low - 12 <= tick <= high + 2]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_xlabel(f"{removed} (%)")
    axis.set_ylabel(f"test accuracy (%), {_seeds(pruned)}")
    _show_the_lines(axis, part)
    _name_lines(axis, {method: (line[removed].iloc[-1], line["accuracy"].iloc[-1]) for method, line in lines.items()})


def _inverse(x: np.ndarray) -> np.ndarray:
    return 100 * (1 - 10.0 ** -np.clip(x, -1, 4))


def _against_time(axis: Axes, part: pd.DataFrame) -> None:
    axis.set_xscale("log")
    ends = {}
    for method in (*_methods(part), "dense"):
        for schedule, line in part[part["method"] == method].groupby("schedule", sort=False):
            for alike, marks in line.groupby("timed alike"):
                marks = marks.sort_values("training seconds")
                minutes = marks["training seconds"] / 60
                _draw(axis, minutes, marks, method, hollow=schedule == "equal-time", faint=not alike)
                if schedule != "equal-time" or method not in ends:
                    ends[method] = (minutes.iloc[-1], marks["accuracy"].iloc[-1])
    low, high = axis.get_xlim()
    many, few = (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5)
    steps = [decade * step for decade in (0.01, 0.1, 1, 10, 100, 1000) for step in (few if high > 12 * low else many)]
    if high < 2 * low:  # so short an axis holds but one of those
        steps = MaxNLocator(5).tick_values(low, high)
    axis.xaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    hollow = "; hollow: equal-time runs" if (part["schedule"] == "equal-time").any() else ""
    faint = "" if part["timed alike"].all() else "; faint: timed under other conditions"
    axis.set_xlabel(f"training time of the run (minutes{hollow}{faint})")
    axis.set_ylabel(f"test accuracy (%), {_seeds(part)}")
    _show_the_lines(axis, part)
    _name_lines(axis, ends)


def _show_the_lines(axis: Axes, part: pd.DataFrame) -> None:
    """Let the accuracies fill the axis; the band of a method that is hardly known may leave it."""
    low, high = part["accuracy"].min(), part["accuracy"].max()
    margin = max(0.08 * (high - low), 1)
    axis.set_ylim(low - margin, high + margin)


def _draw(axis: Axes, x: pd.Series, line: pd.DataFrame, method: str, hollow: bool = False, faint: bool = False) -> None:
    """One method's marks, joined, with its interval as a band; as bars where it has one mark, or where a band would
    hide what lies behind it."""
    leads = method in _IN_COLOUR or method == "scratch" or method.startswith("apbm@")
    ink, half = _ink(method), line["interval"].fillna(0)
    joined = len(line) > 1 and not hollow
    is_band = joined and half.max() <= _WIDEST_BAND
    if is_band and leads and half.any():
        axis.fill_between(x, line["accuracy"] - half, line["accuracy"] + half, color=ink, alpha=0.16, lw=0)
    axis.errorbar(
        x,
        line["accuracy"],
        yerr=half if half.any() and (not joined or (leads and not is_band)) else None,
        color=ink,
        marker="h" if method == "dense" else marker(method),
        ms=8 if method == "apbm" else 6 if leads else 4,
        markerfacecolor="none" if hollow else ink,
        lw=2.2 if method == "apbm" else 1.5 if leads else 0.9,
        ls=line_style(method) if joined else "none",
        capsize=3,
        elinewidth=None if not joined or is_band else 0.6,
        zorder=5 if method == "apbm" else 4 if leads else 2,
        alpha=0.35 if faint else None,
    )


def _ink(method: str) -> str:
    base = method.partition("@")[0]
    if method in _IN_COLOUR or method.startswith("apbm@") or base in ("scratch", "dense") or base.endswith(".py"):
        return colour(base)
    return _GREY


def _name_lines(axis: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Each line's name in a column at the right, at the height of its end if that is free, with a thin leader."""
    figure = axis.figure
    figure.draw_without_rendering()  # from here on the axis knows where its points are
    pixels = figure.dpi / 72
    order = sorted(ends, key=lambda method: ends[method][1])
    wanted = [axis.transData.transform((ends[method][0], ends[method][1]))[1] for method in order]
    places = _spread(wanted, _LINE * pixels, axis.bbox.y0, axis.bbox.y1)
    for method, height in zip(order, places, strict=True):
        y = (height - axis.bbox.y0) / axis.bbox.height
        axis.annotate(
            label(method),
            xy=ends[method],
            xytext=(1.03, y),
            textcoords="axes fraction",
            color=_ink(method) if _ink(method) != _GREY else "#6E6E6E",
            fontsize=8,
            fontweight="bold" if method == "apbm" else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _ink(method), "lw": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
        )


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights near the ``wanted`` (ascending) ones, ``gap`` apart, and inside [low, high] if they fit."""
    places: list[float] = []
    for value in wanted:
        places.append(max(value, places[-1] + gap) if places else max(value, low))
    ceiling = max(high, low + gap * (len(wanted) - 1))
    for i in reversed(range(len(places))):
        ceiling = min(places[i], ceiling)
        places[i] = ceiling
        ceiling -= gap
    return places


def _list_of_methods(axis: Axes, part: pd.DataFrame) -> None:
    """One line of text for each method, the best on top, its accuracy as a mark."""
    _dense_band(axis, part, upright=True)
    pruned = part[part["target"] > 0].sort_values("accuracy")
    for place, row in enumerate(pruned.itertuples()):
        half = None if pd.isna(row.interval) else row.interval
        look = {"marker": marker(row.method), "color": _ink(row.method), "ms": 9, "capsize": 3, "ls": "none"}
        axis.errorbar(row.accuracy, place, xerr=half, **look)
        beside = axis.get_yaxis_transform()  # a column at the right edge, where no mark or line is
        axis.text(1.01, place, f"{row.accuracy:.2f}", transform=beside, va="center", fontsize=8)
    axis.set_yticks(range(len(pruned)), [label(method) for method in pruned["method"]])
    axis.set_ylim(-0.6, len(pruned) - 0.4)
    axis.margins(x=0.12)
    axis.grid(axis="y", visible=False)
    target = pruned["target"].iloc[0] if len(pruned) else 0
    axis.set_xlabel(f"test accuracy (%) with {target:.4g} % removed, {_seeds(pruned)}; dashed: dense")


def _dense_band(axis: Axes, part: pd.DataFrame, upright: bool = False) -> None:
    """The dense network's accuracy and its interval, across the whole axis."""
    dense = part[part["method"] == "dense"]
    if dense.empty:
        return
    row = dense.iloc[0]
    half = 0 if pd.isna(row["interval"]) else row["interval"]
    span, line = (axis.axvspan, axis.axvline) if upright else (axis.axhspan, axis.axhline)
    span(row["accuracy"] - half, row["accuracy"] + half, color=colour("dense"), alpha=0.15, lw=0)
    line(row["accuracy"], color=colour("dense"), lw=1.2, ls="--")
    if not upright:
        place = {"transform": axis.get_yaxis_transform(), "fontsize": 8, "color": colour("dense")}
        axis.text(0.01, row["accuracy"], "dense", va="bottom", **place)


def _methods(table: pd.DataFrame) -> list[str]:
    return [name for name in ordered(table["method"]) if name != "dense"]


def _seeds(part: pd.DataFrame) -> str:
    counts = sorted(set(part["n"])) or [0]
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
