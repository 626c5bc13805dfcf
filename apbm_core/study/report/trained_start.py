"""Networks that were trained already: what each method's cut leaves of what they know, and what fine-tuning adds."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apbm_core.errors import RecordError
from apbm_core.study.methods import label
from apbm_core.study.records import RunRecord
from apbm_core.study.report.frames import (
    AFTER_CUT,
    BED,
    label_dataset,
    label_model,
    of_shared_seeds,
    points,
    runs_frame,
)
from apbm_core.study.report.style import colour, set_title

_BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # a number stands before the dense network's line
OURS, BY_RESPONSES, CONTROL = "fused_once", "fused_by_responses", "entropy_cut"


def after_the_cut(records: Sequence[RunRecord]) -> Figure:
    """For each method a line from its accuracy right after the cut to that after fine-tuning; a panel a target.

    Methods that cut nothing at once have their end alone. The dashed line is the dense network, trained as long.

    Raises:
        RecordError: nothing was cut that was trained already.
    """
    table = points(of_shared_seeds(runs_frame(records)))
    pruned = table[(table["target"] > 0) & (table["schedule"] == "equal")]
    panels = [
        (key, part)
        for key, part in pruned.sort_values("target", kind="stable").groupby([*BED, "target"], sort=False)
        if part[AFTER_CUT].notna().any()
    ]
    if not panels:
        raise RecordError(
            "no record says what a trained network knows right after its cut: run a profile with start_epochs and "
            "split = tuning, such as pretrained."
        )
    heights = [1.4 + 0.34 * len(part) for _, part in panels]
    shape = {"figsize": (8.4, sum(heights)), "height_ratios": heights, "squeeze": False}
    figure, axes = plt.subplots(len(panels), 1, **shape)
    for axis, ((model, dataset, target), part) in zip(axes[:, 0], panels, strict=True):
        dense = table[(table["target"] == 0) & (table["model"] == model) & (table["dataset"] == dataset)]
        _draw(axis, part, dense)
        where = f"{label_model(model)}, {label_dataset(dataset)}, {target:.4g} % removed"
        set_title(axis, f"{where}: {in_words(part)}", 84)
    return figure


def in_words(part: pd.DataFrame) -> str:
    """What fusing once, and a choice by responses with it, change against the cut by relative entropy, at once and
    fine-tuned; else who knows most."""
    part = part.set_index(part["method"].astype(str))
    if not {OURS, CONTROL} <= set(part.index):
        best = part[AFTER_CUT].idxmax()
        return f"right after the cut {label(best)} knows most, {part[AFTER_CUT][best]:.1f} %"

    def changes(method: str) -> list[str]:
        return [f"{part[column][method] - part[column][CONTROL]:+.1f}" for column in (AFTER_CUT, "accuracy")]

    said = "against the cut by relative entropy fusing it once changes {} points at once and {} fine-tuned"
    said = said.format(*changes(OURS))
    if BY_RESPONSES in part.index:
        said += ", with a choice by responses {} and {}".format(*changes(BY_RESPONSES))
    return said


def _draw(axis: Axes, part: pd.DataFrame, dense: pd.DataFrame) -> None:
    part = part.assign(key=part[AFTER_CUT].fillna(-1)).sort_values(["key", "accuracy"])
    names = [str(method) for method in part["method"]]
    for place, (method, row) in enumerate(zip(names, part.to_dict("records"), strict=True)):
        before, after = row[AFTER_CUT], row["accuracy"]
        ink = colour(method)
        if before == before:
            axis.plot([before, after], [place, place], color=ink, linewidth=2.5, alpha=0.45, solid_capstyle="round")
            axis.plot(before, place, "o", color="white", markeredgecolor=ink, markeredgewidth=1.8, markersize=8)
            axis.annotate(
                f"{before:.1f}", (before, place), (-8, 0), textcoords="offset points", ha="right", va="center"
            )
        axis.plot(after, place, "o", color=ink, markersize=8)
        axis.annotate(f"{after:.1f}", (after, place), (8, 0), textcoords="offset points", va="center", bbox=_BEHIND)
    for accuracy in dense["accuracy"]:
        axis.axvline(accuracy, color="#444444", linestyle="--", linewidth=1)
        axis.annotate(
            "dense", (accuracy, 1), (-3, -2), ("data", "axes fraction"), "offset points", ha="right", va="top"
        )
    axis.set_yticks(range(len(names)), [label(method) for method in names])
    for tick, method in zip(axis.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if method in (OURS, BY_RESPONSES) else "normal")
    axis.set_ylim(-0.6, len(names) - 0.2)
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.1)
    axis.set_xlabel(f"accuracy on held-out images (%): hollow right after the cut, full fine-tuned, {_seeds(part)}")


def _seeds(part: pd.DataFrame) -> str:
    counts = sorted(set(part["n"]))
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
