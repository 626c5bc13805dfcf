"""The figures of 05_ablation: what each ingredient is worth, what it costs, and how much is fused when."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from apbm_core.study.ablation.variants import VARIANTS
from apbm_core.study.records import RunRecord
from apbm_core.study.report.statistics import CONFIDENCE, PAIRS_FOR_A_VERDICT
from apbm_core.study.report.style import in_lines

# Okabe and Ito's again; the references stay grey
GROUP_COLOURS = {
    "reference": "#444444",
    "fusion": "#D55E00",
    "mass": "#E69F00",
    "tau": "#0072B2",
    "score": "#CC79A7",
    "bank": "#009E73",
    "narrowing": "#56B4E9",
    "widths": "#8C6D31",
    "rate": "#332288",
    "passing": "#882255",
    "responses": "#CC6677",
    "helped": "#DDAA33",
    "average": "#117733",
    "rival": "#666666",
}
VERDICT_COLOURS = {"above": "#009E73", "below": "#D55E00"}
_LANDMARKS = ("scratch", "slice", "no-fusion", "base", "l1", "dcff")
Records = Mapping[tuple[str, int], RunRecord]


def differences(table: pd.DataFrame, records: Records, reference: str = "scratch", title: str = "") -> Figure:
    """One line a variant: its difference to the reference, paired by seed, with interval; small dots are the seeds.

    Args:
        table: of :func:`apbm_core.study.ablation.tables.variants`, for the same reference.
        records: what it was made of.
    """
    rows = table[(table["variant"] != reference) & (table["pairs"] > 0)].iloc[::-1].reset_index(drop=True)
    figure, axis = plt.subplots(figsize=(8.6, 1.2 + 0.27 * len(rows)))
    axis.axvline(0, color="black", lw=1.2)
    for place, row in rows.iterrows():
        colour = GROUP_COLOURS[row["ingredient"]]
        seeds = [seed for name, seed in records if name == row["variant"] and (reference, seed) in records]
        pairs = [
            100 * (records[row["variant"], seed].val_accuracy - records[reference, seed].val_accuracy) for seed in seeds
        ]
        axis.plot(pairs, [place] * len(pairs), "o", color=colour, ms=3, alpha=0.45)
        half = row["interval of difference"]
        axis.errorbar(
            row["difference"], place, xerr=None if pd.isna(half) else half, fmt="D", color=colour, ms=5, capsize=2
        )
    axis.set_yticks(range(len(rows)), [f"{row['what']}  (n={row['pairs']})" for _, row in rows.iterrows()])
    for tick, (_, row) in zip(axis.get_yticklabels(), rows.iterrows(), strict=True):
        tick.set_color(GROUP_COLOURS[row["ingredient"]])
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(
        f"points of held-out accuracy against\n{VARIANTS[reference].label}, paired by seed;\n{CONFIDENCE:.0%} interval"
    )
    figure.suptitle(title or _finding(rows, reference), x=0.01, ha="left", fontsize=11)
    return figure


def on_and_off(table: pd.DataFrame) -> Figure:
    """One line an ingredient: accuracy with it minus without it, with interval; small dots are the seeds.

    Args:
        table: of :func:`apbm_core.study.ablation.tables.ingredients`.
    """
    rows = table.iloc[::-1].reset_index(drop=True)
    figure, axis = plt.subplots(figsize=(8.6, 1.2 + 0.3 * len(rows)))
    axis.axvline(0, color="black", lw=1.2)
    for place, row in rows.iterrows():
        colour = VERDICT_COLOURS.get(row["verdict"], "#999999")
        axis.plot(row["each"], [place] * row["pairs"], "o", color=colour, ms=3, alpha=0.45)
        half = row["interval of difference"]
        axis.errorbar(
            row["difference"], place, xerr=None if pd.isna(half) else half, fmt="D", color=colour, ms=5, capsize=2
        )
    axis.set_yticks(range(len(rows)), [f"{row['ingredient']}  ({_seeds(row)})" for _, row in rows.iterrows()])
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"points of held-out accuracy, with it minus without it, paired by seed; {CONFIDENCE:.0%} interval")
    helps, hurts = (list(table[table["verdict"] == word]["ingredient"]) for word in ("above", "below"))
    sentence = f"Shown to help, after Holm's correction: {'; '.join(helps) or 'nothing'}. "
    sentence += f"To hurt: {'; '.join(hurts) or 'nothing'}."
    figure.suptitle(in_lines(sentence, 110), x=0.01, ha="left", fontsize=11)
    return figure


def _seeds(row: pd.Series) -> str:
    """How many pairs; where some are one network, that instead of the interval that is missing."""
    return row["verdict"] if row["verdict"].startswith("one network") else f"n={row['pairs']}"


def accuracy_against_cost(table: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """Mean accuracy against training time, a mark a variant: what an ingredient gains beside what it takes.

    Only the landmarks are named, and the variants that are more accurate than every faster one.
    The time is the fastest run's, for other work on the machine can only lengthen one; intervals are in
    :func:`differences`. Variants with fewer seeds than the others are left out: means over other seeds mislead. So are
    those timed under other conditions only.
    """
    rows = table if names is None else table[table["variant"].isin(names)]
    rows = rows[(rows["n"] == rows["n"].max()) & rows["fastest seconds"].notna()]
    figure, axis = plt.subplots(figsize=(8.6, 4.6))
    for group, part in rows.groupby("ingredient", sort=False):
        axis.plot(part["fastest seconds"] / 60, part["accuracy"], "o", color=GROUP_COLOURS[group], ms=6, label=group)
    ahead = rows.sort_values(["fastest seconds", "accuracy"], ascending=[True, False])
    ahead = ahead[ahead["accuracy"] == ahead["accuracy"].cummax()]  # no faster one is as accurate
    best, cheapest = rows.loc[rows["accuracy"].idxmax()], rows.loc[rows["fastest seconds"].idxmin()]
    ratio = best["fastest seconds"] / cheapest["fastest seconds"]
    axis.set_title(f"The most accurate, {best['variant']}, takes {ratio:.1f} times the shortest time", loc="left")
    axis.set_xlabel("training time of a variant's fastest run (minutes)")
    axis.set_ylabel(f"held-out accuracy (%), n = {rows['n'].max()}")
    axis.legend(fontsize=8, title="ingredient", loc="center left", bbox_to_anchor=(1, 0.5))
    named = rows[rows["variant"].isin(_LANDMARKS) | rows["variant"].isin(ahead["variant"])]
    points = {row["variant"]: (row["fastest seconds"] / 60, row["accuracy"]) for _, row in named.iterrows()}
    _name_points(axis, points, list(zip(rows["fastest seconds"] / 60, rows["accuracy"], strict=True)))
    return figure


def _name_points(axis: Axes, points: Mapping[str, tuple[float, float]], marks: Sequence[tuple[float, float]]) -> None:
    """A name beside each point, on the first of its sides where it covers no mark, other name or axis."""
    axis.figure.draw_without_rendering()  # from here on the axis knows where its points are
    inside = axis.get_window_extent()
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in axis.transData.transform(marks)]
    sides = [(6, 3, "left"), (6, -9, "left"), (-6, 3, "right"), (-6, -9, "right"), (0, 9, "center"), (0, -15, "center")]
    sides += [(-3, 20, "left"), (-3, -26, "left")]  # farther off, for a point at the left edge
    for name, point in points.items():
        for right, up, alignment in sides:
            place = {"xytext": (right, up), "textcoords": "offset points", "horizontalalignment": alignment}
            text = axis.annotate(name, point, fontsize=7, **place)
            box = text.get_window_extent()
            free = inside.x0 < box.x0 and not any(box.overlaps(other) for other in taken)
            if free or (right, up, alignment) == sides[-1]:
                break  # crowded on all sides: a name that covers something is better than none
            text.remove()
        taken.append(box)


def courses(records: Records, names: Sequence[str]) -> Figure:
    """How much is fused when: own share, self-mass, entropy and churn by epoch, the mean over a variant's seeds."""
    quantities = {
        "own_share": "share of a kept filter\nin its fused one",
        "self_mass": "self-mass of the bank's filters",
        "entropy": "entropy of the similarity\ndistributions (nats)",
        "churn": "kept filters replaced\nin the epoch (share)",
    }
    figure, axes = plt.subplots(1, 4, figsize=(13.5, 3.6))
    for number, name in enumerate(names):
        runs = [record for (variant, _), record in records.items() if variant == name]
        rows = pd.DataFrame([row["fusion"] | {"epoch": row["epoch"] + 1} for run in runs for row in run.history])
        if rows.empty:
            continue
        means = rows.groupby("epoch").mean()
        for axis, quantity in zip(axes, quantities, strict=True):
            style = {"color": plt.cm.tab10(number), "marker": "osD^vP*X"[number % 8], "ms": 5}
            axis.plot(means.index, means[quantity], label=f"{VARIANTS[name].label} (n={len(runs)})", **style)
    for axis, title in zip(axes, quantities.values(), strict=True):
        axis.set_xlabel("epoch")
        axis.set_title(title, loc="left", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _finding(rows: pd.DataFrame, reference: str) -> str:
    """Of the variants with enough pairs, how many are clearly above the reference and how many clearly below it."""
    if rows["pairs"].max() < PAIRS_FOR_A_VERDICT:
        return f"Against {VARIANTS[reference].label}: fewer than {PAIRS_FOR_A_VERDICT} seeds, too few for a verdict"
    rows = rows[rows["pairs"] >= PAIRS_FOR_A_VERDICT]
    above, below = (rows[rows["verdict"] == word] for word in ("above", "below"))
    best = rows.loc[rows["difference"].idxmax()]
    sentence = f"Against {VARIANTS[reference].label}: {len(above)} above, {len(below)} below, after the correction for"
    return f"{sentence} {len(rows)} comparisons; best: {best['what']}, {best['difference']:+.2f}"
