"""Every plot the notebooks show. Each takes records, and its title says what they found."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apbm_core.study.methods import label, ordered
from apbm_core.study.records import RunRecord
from apbm_core.study.report.frames import (
    beds,
    history_frame,
    of_bed,
    phase_frame,
    runs_frame,
    timed_alike,
)
from apbm_core.study.report.style import colour, in_lines, line_style, marker, set_title, shared_legend
from apbm_core.study.report.style import save as save  # the notebooks take the whole set from here
from apbm_core.study.report.style import use_style as use_style
from apbm_core.study.report.tradeoffs import accuracy_against_macs as accuracy_against_macs
from apbm_core.study.report.tradeoffs import accuracy_against_time as accuracy_against_time
from apbm_core.study.report.tradeoffs import accuracy_curves as accuracy_curves


def training_curves(records: Sequence[RunRecord]) -> Figure:
    """Training accuracy by epoch, all phases in a row, the mean over the seeds; the last mark of each line is the test
    accuracy. A panel a network, data set and target, each with the dense network; two abreast where there are several.
    """
    history, runs = history_frame(records), runs_frame(records)
    rows: list[list[tuple[str, str, str, float]]] = []
    for bed in beds(history):
        targets = [target for target in sorted(of_bed(runs, *bed[:2])["target"].unique()) if target > 0] or [0.0]
        rows += [[(*bed, target) for target in targets[start : start + 2]] for start in range(0, len(targets), 2)]
    columns = max(map(len, rows), default=1)
    size = (8 if columns == 1 else 9.5, (4.2 if columns == 1 else 3.4) * max(1, len(rows)))
    figure, axes = plt.subplots(max(1, len(rows)), columns, figsize=size, squeeze=False)
    for line, panels in zip(axes, rows, strict=False):
        several = len({target for *bed, target in sum(rows, []) if bed == list(panels[0][:3])}) > 1
        for axis, (model, dataset, where, target) in zip(line, panels, strict=False):
            at = f"{where}, {target:.4g} % removed" if several else where
            _training_panel(axis, *(_of_target(frame, model, dataset, target) for frame in (history, runs)), at)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
    shared_legend(figure, axes.flat)
    return figure


def _of_target(frame: pd.DataFrame, model: str, dataset: str, target: float) -> pd.DataFrame:
    part = of_bed(frame, model, dataset)
    return part[part["target"].isin([0.0, target])]


def _training_panel(axis: Axes, history: pd.DataFrame, runs: pd.DataFrame, where: str) -> None:
    keys = ["method", "schedule"]
    ends = runs.groupby(keys, observed=True)["accuracy"].mean()
    for method in ordered(history["method"]):
        for place, schedule in enumerate(dict.fromkeys(history[history["method"] == method]["schedule"])):
            here = history[(history["method"] == method) & (history["schedule"] == schedule)]
            line = 100 * here.groupby("epoch")["train_accuracy"].mean()
            name = label(method) if place == 0 else None
            axis.plot(line.index, line, color=colour(method), lw=1.4, ls=line_style(method), label=name)
            look = marker(method) if method != "dense" else "h"
            axis.plot(line.index.max(), ends[method, schedule], look, color=colour(method), ms=7)
    pruned = ends[ends.index.get_level_values("method") != "dense"]
    best = (ends if pruned.empty else pruned).idxmax()
    words = f"{label(best[0])} ends highest{'' if pruned.empty else ' of the pruned'}, at {ends[best]:.1f} %"
    place = axis.get_subplotspec()
    set_title(axis, f"{where}: {words}", 60 if place.get_gridspec().ncols == 1 else 38)
    axis.set_xlabel("epoch, all phases counted")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if place.is_first_col():
        axis.set_ylabel("training accuracy (%), marks: test")


def phase_times(records: Sequence[RunRecord]) -> Figure:
    """Where the time of each method goes, phase by phase; the mean over targets and seeds, one panel a network
    and data set, one below another.

    Runs that were timed under other conditions than most of the network's are left out, and counted below.
    """
    records = [record for record in records if record.config.schedule == "equal"]
    alike = timed_alike(records)
    phases = phase_frame(alike)
    panels = beds(phases)
    names = _phases_in_order(records)
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 3.8 * len(panels)), squeeze=False)
    for axis, (model, dataset, where) in zip(axes[:, 0], panels, strict=True):
        part = of_bed(phases, model, dataset)
        runs = part.groupby("method")[["target", "seed"]].apply(lambda g: len(g.drop_duplicates()))
        seconds = part.pivot_table(index="method", columns="phase", values="seconds", aggfunc="sum").div(runs, axis=0)
        order = seconds.sum(axis=1).sort_values(ascending=False).index
        left = pd.Series(0.0, index=order)
        for phase in (name for name in names if name in seconds):
            width = seconds[phase].reindex(order).fillna(0) / 60
            axis.barh(
                [label(m) for m in order],
                width,
                left=left,
                label=phase,
                color=plt.cm.tab10(names.index(phase)),
                height=0.7,
            )
            left += width
        all_runs = sum((record.config.model, record.config.dataset) == (model, dataset) for record in records)
        others = all_runs - part["id"].nunique()
        left_out = f" (without {others}, timed under other conditions)" if others else ""
        axis.set_xlabel(f"minutes a run{left_out}")
        words = f"{label(order[0])} trains longest, {left.max() / left.min():.1f} times {label(order[-1])}"
        set_title(axis, f"{where}: {words}", 60)
        axis.grid(axis="y", visible=False)
    shared_legend(figure, axes[:, 0], title="phase")
    return figure


def _phases_in_order(records: Sequence[RunRecord]) -> list[str]:
    """The names of all phases, those that come late in their runs last."""
    after: dict[str, int] = {}
    for record in records:
        for place, phase in enumerate(reversed(record.phases)):
            after[phase.name] = max(place, after.get(phase.name, 0))
    return sorted(after, key=lambda name: -after[name])


_NEARLY_ALL = 0.99  # above this share of a kept filter in its fused one, hardly anything is mixed in


def fusion_course(records: Sequence[RunRecord]) -> Figure:
    """How much is fused when: own share, self-mass, entropy and churn by epoch, for the methods that fuse; four
    panels a network and data set, so that a phone shows them large enough."""
    history = history_frame([record for record in records if any("fusion" in row for row in record.history)])
    quantities = {
        "own_share": "a kept filter's share\nof its fused filter",
        "self_mass": "self-mass of the\nbank's filters",
        "entropy": "entropy of the similarity\ndistributions (nats)",
        "churn": "kept filters replaced\nin the epoch",
    }
    panels = beds(history)
    figure = plt.figure(figsize=(8, 6.4 * len(panels)))
    rows = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for row, (model, dataset, where) in zip(rows, panels, strict=True):
        part = of_bed(history, model, dataset)
        axes = row.subplots(2, 2).ravel()
        for axis, (quantity, title) in zip(axes, quantities.items(), strict=True):
            for method in _methods(part):
                line = part[part["method"] == method].groupby("epoch")[f"fusion {quantity}"].mean()
                style = {"color": colour(method), "marker": marker(method), "ls": line_style(method)}
                axis.plot(line.index, line, label=label(method), clip_on=False, **style)  # marks at zero stay whole
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            # shares from 0 on, so that the networks' rows can be compared and no line at zero lies amid negative ones
            axis.set_ylim(bottom=0, top=1.05 if quantity.endswith(("share", "mass")) else max(0.05, axis.get_ylim()[1]))
            axis.set_title(title, fontsize=10, loc="left")
        axes[0].legend(fontsize=8)
        words = in_lines(f"{where}: {_fusion_finding(part)}", 95)
        row.suptitle(words, x=0.01, ha="left", fontsize=11)
    return figure


def _fusion_finding(history: pd.DataFrame) -> str:
    """How much of a fused filter the kept one is, at first and until it is nearly all; and how many were replaced."""
    sentences = []
    for method in _methods(history):
        mean = history[history["method"] == method].groupby("epoch")[["fusion own_share", "fusion churn"]].mean()
        share, last = mean["fusion own_share"], mean.index.max()
        mixed = share.index[share < _NEARLY_ALL]
        words = f"a kept filter is {100 * share.iloc[0]:.0f} % of its fused one in epoch {mean.index[0]}"
        if not len(mixed):
            words = "a kept filter is its fused one throughout, or nearly so"
        elif mixed.max() < last:
            words += f", over {100 * _NEARLY_ALL:.0f} % after epoch {mixed.max()} of {last}"
        else:
            words += f", {100 * share.iloc[-1]:.0f} % in epoch {last}, the last"
        replaced = 100 * mean["fusion churn"].sum()
        sentences.append(f"with {label(method)} {words}, and {replaced:.0f} % are replaced in all")
    return "; ".join(sentences)


def _methods(table: pd.DataFrame) -> list[str]:
    return [name for name in ordered(table["method"]) if name != "dense"]
