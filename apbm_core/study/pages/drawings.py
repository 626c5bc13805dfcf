"""The front page's drawings: SVG that needs no script, follows the paper's colour, and says in words what it shows."""

import html
import math
from collections.abc import Sequence

import pandas as pd

from apbm_core.study.methods import label, ordered
from apbm_core.study.records import RunRecord
from apbm_core.study.report.frames import beds, label_dataset, label_model, of_bed, points, runs_frame
from apbm_core.study.report.style import colour

_WIDTH = 430
_CURVE_WIDTH, _PLOT = 540, 306  # the lines' names stand beside the plot
_NARROW_WIDTH, _NARROW_PLOT = 360, 352  # and, where a phone would make them too small, below it
_STEPS, _MOST_LINES = (1, 2, 5, 10, 20), 6  # points of accuracy between two lines of the grid, and how many there are
_CURVES_IN_COLOUR = ("apbm", "scratch", "hrank", "polarization", "swp")


def curve(table: pd.DataFrame, model: str, dataset: str, narrow: bool = False) -> tuple[str, str]:
    """Accuracy against the parameters removed, a line a method, the dense network dashed; and its caption.

    Args:
        table: a bed of :func:`apbm_core.study.pages.findings.curve_points`.
        narrow: for a phone: the lines' names stand below the plot, the highest end first.
    """
    edge = _NARROW_PLOT if narrow else _PLOT
    dense = table[table["method"] == "dense"]["accuracy"]
    pruned = table[(table["target"] > 0) & (table["method"] != "dense")]
    bottom, top = 250, 34
    low, high = pruned["accuracy"].min(), max(pruned["accuracy"].max(), *dense)
    height, across = _scale(low, high, bottom, top), _scale(*_left(pruned["target"].agg(["min", "max"])), 34, edge - 6)
    heading = f"{label_model(model)}, {label_dataset(dataset)}: test accuracy (%) against parameters removed (%)"
    if narrow:
        heading = "Test accuracy (%) against parameters removed (%)"
    parts = [f'<text x="2" y="16" font-weight="600">{heading}</text>']
    step = next((step for step in _STEPS if (high - low) / step <= _MOST_LINES), _STEPS[-1])
    for value in range(math.ceil(low / step) * step, math.floor(high) + 1, step):
        y = height(value)
        parts.append(f'<path d="M30 {y:.1f}H{edge}" class="grid"/><text x="2" y="{y + 4:.1f}">{value}</text>')
    for target in sorted(pruned["target"].unique()):
        x = across(_left(target))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{target:.4g}</text>')
    ends = []
    for method in sorted(ordered(pruned["method"].unique()), key=lambda name: name in _CURVES_IN_COLOUR):
        line = pruned[pruned["method"] == method].sort_values("target")
        plain, _, own = method.partition("@")
        leads = plain in _CURVES_IN_COLOUR
        ink = on_paper(colour(method)) if leads else "var(--faint)"
        places = [(across(_left(row.target)), height(row.accuracy)) for row in line.itertuples()]
        course = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = ' stroke-dasharray="6 4"' if own else ""  # with other widths, as in the figures
        width = 2.6 if method == "apbm" else 1.6 if leads else 0.8
        parts.append(f'<polyline points="{course}" fill="none" stroke="{ink}" stroke-width="{width}"{dashes}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 1}" fill="{ink}"/>' for x, y in places]
        ends.append((places[-1], method, ink, dashes))
    if len(dense):
        y = height(dense.iloc[0])
        dashes = ' stroke-dasharray="4 3"'
        parts.append(f'<path d="M30 {y:.1f}H{edge}" class="axis"{dashes}/>')
        ends.append(((float(edge), y), "dense", "var(--faint)", dashes))
    ends.sort(key=lambda end: end[0][1])
    places = [bottom + 42 + 19 * row for row in range(len(ends))] if narrow else _apart([y for (_, y), *_ in ends], 15)
    for ((x, y), method, ink, dashes), place in zip(ends, places, strict=True):
        bold = ' font-weight="600"' if method == "apbm" else ""
        start, end = (f"30 {place}", f"64 {place}") if narrow else (f"{x + 4:.1f} {y:.1f}", f"314 {place:.1f}")
        width = (2.6 if method == "apbm" else 1.6) if narrow else 0.6
        parts.append(
            f'<path d="M{start}L{end}" stroke="{ink}" stroke-width="{width}"{dashes if narrow else ""}/>'
            f'<text x="{72 if narrow else 317}" y="{place + 4:.1f}" fill="{ink}"{bold}>'
            f"{html.escape(label(method))}</text>"
        )
    targets = sorted(pruned["target"].unique())
    mean = pruned.pivot_table(index="target", columns="method", values="accuracy", observed=True).dropna(axis=1).mean()
    words = (
        f"{label_model(model)} on {label_dataset(dataset)}, {len(targets)} targets from {targets[0]:.4g} to "
        f"{targets[-1]:.4g} % of the parameters removed: {label(mean.idxmax())} is highest on average, "
        f"{mean.max():.2f} %"
    )
    words += "" if mean.idxmax() == "apbm" else f", APBM has {mean['apbm']:.2f} %"
    if narrow:
        return _svg(_NARROW_WIDTH, places[-1] + 12, parts, words), words
    return _svg(_CURVE_WIDTH, max(bottom + 26, places[-1] + 8), parts, words), words


def _left(removed):
    """Equal factors of what is left are equal steps."""
    return [-math.log10(1 - value / 100) for value in removed] if hasattr(removed, "__len__") else _left([removed])[0]


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, each moved down just so far that it is ``gap`` below the one before it."""
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + gap) if places else height)
    return places


def drawing(records: Sequence[RunRecord]) -> tuple[str, str]:
    """The methods' accuracies at equal epochs, a panel a network, data set and target; and its caption."""
    table = points(runs_frame(records))
    panels = []
    for model, dataset, where in beds(table):
        here = of_bed(table, model, dataset)
        dense = here[here["target"] == 0]["accuracy"].max()
        for target, group in here[(here["target"] > 0) & (here["schedule"] == "equal")].groupby("target"):
            panels.append((where, target, group.sort_values("accuracy", ascending=False), dense))
    panels.sort(key=lambda panel: -panel[1])
    height, parts = 0, []
    for where, target, rows, dense in panels:
        values = [*rows["accuracy"], *([] if math.isnan(dense) else [dense])]
        scale = _scale(min(values), max(values), 232, 385)
        heading = f"{where}, {target:.4g} % removed"
        parts.append(f'<text x="2" y="{height + 16}" font-weight="600">{heading}</text>')
        top = height + 24
        if not math.isnan(dense):
            x = scale(dense)
            parts.append(
                f'<path d="M{x:.1f} {top}V{top + 20 * len(rows)}" class="axis" stroke-dasharray="4 3"/>'
                f'<text x="428" y="{height + 16}" text-anchor="end" class="faint">dense {dense:.2f}</text>'
            )
        for place, row in enumerate(rows.itertuples()):
            y = top + 20 * place + 10
            parts.append(
                f'<path d="M232 {y}H385" class="grid"/><text x="226" y="{y + 4}" text-anchor="end">'
                f'{html.escape(label(row.method))}</text><circle cx="{scale(row.accuracy):.1f}" cy="{y}" r="5" '
                f'fill="{on_paper(colour(row.method))}"/><text x="428" y="{y + 4}" text-anchor="end">'
                f"{row.accuracy:.2f}</text>"
            )
        height = top + 20 * len(rows) + 12
    leaders = [(where, rows.iloc[0]) for where, _, rows, _ in panels]
    words = "; ".join(f"{where}: {label(r['method'])} leads with {r['accuracy']:.2f} %" for where, r in leaders)
    return _svg(_WIDTH, height, parts, words), words


def forest(pairs: pd.DataFrame, bed: str) -> tuple[str, str]:
    """A bed's ingredients, a row each: difference with its 95 % interval, the seeds as small dots: SVG."""
    if pairs.empty:
        return "", ""
    pairs = pairs.sort_values("difference", ascending=False)
    low, high = (pick(pairs["each"].map(pick)) for pick in (min, max))
    half = pairs["interval of difference"].fillna(0)
    low, high = min(low, (pairs["difference"] - half).min()), max(high, (pairs["difference"] + half).max())
    scale = _scale(low, high, 4, 426)
    height = 30 * len(pairs) + 24
    parts = [f'<path d="M{scale(0):.1f} 4V{height - 20}" class="axis"/>']
    for place, row in enumerate(pairs.itertuples()):
        y = 30 * place + 25
        ink = {"above": "#009e73", "below": "#d55e00"}.get(row.verdict, "var(--faint)")
        width = pairs["interval of difference"].iloc[place]
        ends = [] if math.isnan(width) else [scale(row.difference - width), scale(row.difference + width)]
        bar = f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}" stroke="{ink}" stroke-width="2"/>' if ends else ""
        dots = "".join(f"M{scale(v):.1f} {y}h0" for v in row.each)  # a point with round ends is a dot
        parts.append(
            f'<text x="2" y="{y - 9}">{html.escape(row.ingredient)}</text><text x="428" y="{y - 9}" text-anchor="end" '
            f'class="faint">{row.difference:+.2f}</text>{bar}<path d="{dots}" stroke="{ink}" class="dots"/>'
            f'<circle cx="{scale(row.difference):.1f}" cy="{y}" r="4.5" fill="{ink}"/>'
        )
    for tick in range(math.ceil(low), math.floor(high) + 1):
        parts.append(f'<text x="{scale(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:+d}</text>')
    helps, hurts = ((pairs["verdict"] == word).sum() for word in ("above", "below"))
    words = (
        f"{bed}: {len(pairs)} ingredients, points of held-out accuracy with it minus without it: after Holm's "
        f"correction {helps} are above zero (green) and {hurts} below (orange); bars are 95 % intervals of one "
        "comparison, dots the seeds"
    )
    return _svg(_WIDTH, height, parts, words), words


def on_paper(ink: str) -> str:
    """A colour that can be seen on dark paper as well: the two darkest follow the page's ink."""
    return {"#000000": "var(--ink)", "#444444": "var(--faint)"}.get(ink.lower(), ink)


def _scale(low: float, high: float, left: float, right: float):
    margin = 0.08 * (high - low) or 1
    low, high = low - margin, high + margin
    return lambda value: left + (value - low) / (high - low) * (right - left)


def _svg(width: int, height: int, parts: Sequence[str], words: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(words, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
