"""Every plot the notebooks show. Each takes records, and its title says what they found."""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apbm_core.study.methods import label, ordered
from apbm_core.study.records import RunRecord
from apbm_core.study.report.frames import (
    history_frame,
    label_dataset,
    label_model,
    phase_frame,
    points,
    runs_frame,
    timed_alike,
)
from apbm_core.study.report.style import colour, in_lines, line_style, marker, set_title, shared_legend
from apbm_core.study.report.style import save as save  # the notebooks take the whole set from here
from apbm_core.study.report.style import use_style as use_style


def accuracy_curves(records: Sequence[RunRecord]) -> Figure:
    """Accuracy against the parameters and against the MACs removed: a row a network, a line a method.

    Where a network has one target only, its methods stand at one place of the first axis; they are listed instead.
    """
    table = points(runs_frame(records))
    table = table[table["schedule"] != "equal-time"]
    models = list(dict.fromkeys(table["model"]))
    figure, axes = plt.subplots(len(models), 2, figsize=(13, 4.4 * len(models)), squeeze=False)
    for (left, right), model in zip(axes, models, strict=True):
        part = table[table["model"] == model]
        if part[part["target"] > 0]["target"].nunique() > 1:
            _curves(left, part, "parameters removed")
        else:
            _list_of_methods(left, part)
        _curves(right, part, "MACs removed")
        set_title(left, f"{label_model(model)}, {_dataset(part)}: {_finding(part)}", 110)
    shared_legend(figure, axes[:, 1])
    return figure


def accuracy_against_time(records: Sequence[RunRecord]) -> Figure:
    """Accuracy against the total training time of a run, shared pre-training included: one panel a network.

    Runs that were timed under other conditions than most of the network's are faint.
    """
    table = points(runs_frame(records))
    models = list(dict.fromkeys(table["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(6.4 * len(models), 4.4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        part = table[table["model"] == model]
        for method in (*_methods(part), "dense"):
            for schedule, line in part[part["method"] == method].groupby("schedule", sort=False):
                for alike, marks in line.groupby("timed alike"):
                    hollow = schedule == "equal-time"
                    minutes = marks["training seconds"] / 60
                    _points(axis, minutes, marks, method, joined=False, hollow=hollow, faint=not alike)
        set_title(axis, f"{label_model(model)}, {_dataset(part)}: {_time_finding(part)}", 60)
        axis.set_xlabel(f"training time of the run (minutes; {_marks_of_time(part)})")
        axis.set_ylabel("test accuracy (%)")
    shared_legend(figure, axes[0])
    return figure


def _marks_of_time(part: pd.DataFrame) -> str:
    return "hollow: equal-time runs" + ("" if part["timed alike"].all() else "; faint: timed under other conditions")


def _time_finding(part: pd.DataFrame) -> str:
    """What equal time made of APBM and of the same network from scratch; else who takes how much longer than whom."""
    means = part.groupby(["target", "schedule", "method"], observed=True)["accuracy"].mean()
    for target in sorted(part[part["schedule"] == "equal-time"]["target"].unique()):
        names = [("equal-time", "apbm"), ("equal-time", "scratch"), ("equal", "l1")]
        there = [(method, means.get((target, schedule, method))) for schedule, method in names]
        if all(accuracy is not None for _, accuracy in there):
            words = ", ".join(f"{label(method)} {accuracy:.1f} %" for method, accuracy in there)
            return f"at {target:.4g} % removed, in L1's time: {words}"
    timed = part[part["timed alike"]]
    if timed.empty:
        return "every mark is of runs timed under different conditions"
    slowest, fastest = (timed.loc[timed["training seconds"].agg(pick)] for pick in ("idxmax", "idxmin"))
    ratio = slowest["training seconds"] / fastest["training seconds"]
    return f"{label(slowest['method'])} takes {ratio:.1f} times as long as {label(fastest['method'])}"


def training_curves(records: Sequence[RunRecord]) -> Figure:
    """Training accuracy by epoch, all phases in a row; the last mark of each line is the test accuracy."""
    history, runs = history_frame(records), runs_frame(records)
    models = list(dict.fromkeys(history["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(6.4 * len(models), 4.2), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        part = history[history["model"] == model]
        final = runs[runs["model"] == model].set_index("id")
        for method in ordered(part["method"]):
            for identifier, line in part[part["method"] == method].groupby("id", sort=False):
                first = identifier == part[part["method"] == method]["id"].iloc[0]
                axis.plot(
                    line["epoch"],
                    100 * line["train_accuracy"],
                    color=colour(method),
                    lw=1.4,
                    ls=line_style(method),
                    label=label(method) if first else None,
                )
                axis.plot(
                    line["epoch"].max(),
                    final.loc[identifier, "accuracy"],
                    marker(method) if method != "dense" else "h",
                    color=colour(method),
                    ms=7,
                )
        best = final["accuracy"].idxmax()
        name, accuracy = label(final.loc[best, "method"]), final.loc[best, "accuracy"]
        set_title(axis, f"{label_model(model)}: {name} ends highest, at {accuracy:.1f} % on the test images", 60)
        axis.set_xlabel("epoch, all phases counted")
        axis.set_ylabel("training accuracy (%), marks: test")
    shared_legend(figure, axes[0])
    return figure


def phase_times(records: Sequence[RunRecord]) -> Figure:
    """Where the time of each method goes, phase by phase; the mean over targets and seeds, one panel a network.

    Runs that were timed under other conditions than most of the network's are left out, and counted below.
    """
    records = [record for record in records if record.config.schedule == "equal"]
    alike = timed_alike(records)
    phases = phase_frame(alike)
    models = list(dict.fromkeys(phases["model"]))
    names = _phases_in_order(records)
    figure, axes = plt.subplots(1, len(models), figsize=(6.2 * len(models), 3.8), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        part = phases[phases["model"] == model]
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
        others = sum(record.config.model == model for record in records) - part["id"].nunique()
        left_out = f" (without {others}, timed under other conditions)" if others else ""
        axis.set_xlabel(f"minutes a run{left_out}")
        words = f"{label(order[0])} trains longest, {left.max() / left.min():.1f} times {label(order[-1])}"
        set_title(axis, f"{label_model(model)}: {words}", 60)
        axis.grid(axis="y", visible=False)
    shared_legend(figure, axes[0], title="phase")
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
    """How much is fused when: own share, self-mass, entropy and churn by epoch, for the methods that fuse; a row a
    network."""
    history = history_frame([record for record in records if any("fusion" in row for row in record.history)])
    quantities = {
        "own_share": "a kept filter's share\nof its fused filter",
        "self_mass": "self-mass of the\nbank's filters",
        "entropy": "entropy of the similarity\ndistributions (nats)",
        "churn": "kept filters replaced\nin the epoch",
    }
    models = list(dict.fromkeys(history["model"]))
    figure = plt.figure(figsize=(13, 3.6 * len(models)))
    rows = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    for row, model in zip(rows, models, strict=True):
        part = history[history["model"] == model]
        axes = row.subplots(1, 4)
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
        words = in_lines(f"{label_model(model)}: {_fusion_finding(part)}", 150)
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


def _curves(axis: Axes, part: pd.DataFrame, removed: str) -> None:
    """Accuracy against what was removed, a line a method, the dense network as a band."""
    _dense_band(axis, part, axis.axhspan, axis.axhline)
    for method in _methods(part):
        line = part[part["method"] == method].sort_values(removed)
        _points(axis, line[removed], line, method)
    axis.set_xlabel(f"{removed} (%)")
    axis.set_ylabel("test accuracy (%)")


def _list_of_methods(axis: Axes, part: pd.DataFrame) -> None:
    """One line of text for each method, the best on top, its accuracy as a mark."""
    _dense_band(axis, part, axis.axvspan, axis.axvline)
    pruned = part[part["target"] > 0].sort_values("accuracy")
    for place, row in enumerate(pruned.itertuples()):
        axis.errorbar(
            row.accuracy,
            place,
            xerr=None if pd.isna(row.interval) else row.interval,
            marker=marker(row.method),
            color=colour(row.method),
            ms=9,
            capsize=3,
            ls="none",
        )
        beside = axis.get_yaxis_transform()  # a column at the right edge, where no mark or line is
        axis.text(1.01, place, f"{row.accuracy:.2f}", transform=beside, va="center", fontsize=8)
    axis.set_yticks(range(len(pruned)), [label(method) for method in pruned["method"]])
    axis.set_ylim(-0.6, len(pruned) - 0.4)
    axis.margins(x=0.12)
    axis.grid(axis="y", visible=False)
    counts = sorted(set(pruned["n"]))
    seeds = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    axis.set_xlabel(f"test accuracy (%), {seeds}; dashed: dense")


def _methods(table: pd.DataFrame) -> list[str]:
    return [name for name in ordered(table["method"]) if name != "dense"]


def _points(
    axis: Axes,
    x: pd.Series,
    line: pd.DataFrame,
    method: str,
    joined: bool = True,
    hollow: bool = False,
    faint: bool = False,
) -> None:
    emphasis = method.partition("@")[0] == "apbm"
    axis.errorbar(
        x,
        line["accuracy"],
        yerr=None if line["interval"].isna().all() else line["interval"].fillna(0),
        color=colour(method),
        capsize=3,
        marker="h" if method == "dense" else marker(method),
        ms=9 if emphasis else 6.5,
        markerfacecolor="none" if hollow else colour(method),
        lw=2.2 if emphasis else 1.2,
        ls="-" if joined and len(line) > 1 else "none",
        zorder=5 if marker(method) == "x" else 4 if emphasis else 3,  # a thin cross hides nothing, but is hidden
        alpha=0.35 if faint else None,
        label=None if hollow else f"{label(method)} (n={line['n'].min()})",
    )


def _dense_band(axis: Axes, part: pd.DataFrame, span: Callable, line: Callable) -> None:
    """The dense network's accuracy and its interval, across the whole axis."""
    dense = part[part["method"] == "dense"]
    if dense.empty:
        return
    row = dense.iloc[0]
    half = 0 if pd.isna(row["interval"]) else row["interval"]
    span(row["accuracy"] - half, row["accuracy"] + half, color=colour("dense"), alpha=0.15, lw=0)
    line(row["accuracy"], color=colour("dense"), lw=1.2, ls="--", label=f"dense (n={row['n']})")


_NAMED_IN_A_TIE = 3  # more names than that make no title


def _finding(part: pd.DataFrame) -> str:
    """The one sentence that a row of curves supports, at the target most methods share."""
    pruned = part[part["method"] != "dense"]
    if pruned.empty:
        return "the dense network alone"
    target = pruned["target"].value_counts().idxmax()
    there = pruned[pruned["target"] == target]
    highest = there["accuracy"].max()
    best = there[there["accuracy"] > highest - 0.1]  # less than the sentence shows is no lead
    names = [label(method) for method in best.sort_values("accuracy", ascending=False)["method"]]
    leader = f"{names[0]} leads" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} tie"
    leader = leader if len(names) <= _NAMED_IN_A_TIE else f"{len(names)} methods tie"
    sentence = f"at {target:.4g} % removed, {leader} with {highest:.1f} %"
    apbm, scratch = (there[there["method"] == name]["accuracy"] for name in ("apbm", "scratch"))
    if len(apbm) and len(scratch):
        sentence += f"; APBM {apbm.iloc[0] - scratch.iloc[0]:+.1f} points against slim from scratch"
    return sentence


def _dataset(part: pd.DataFrame) -> str:
    return label_dataset(part["dataset"].iloc[0])
