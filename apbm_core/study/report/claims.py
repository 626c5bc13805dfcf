"""The sentences of the paper's abstract, each beside what the records say about it, with a verdict.

The claims are quoted from the abstract of Qu, Zhang and Wang (2022); methods.md 0.
"""

from collections.abc import Sequence

import pandas as pd

from apbm_core.study.methods import get_method
from apbm_core.study.records import RunRecord
from apbm_core.study.report.frames import PAIRS_FOR_A_VERDICT, label_dataset, label_model, mean_and_interval, runs_frame

CLAIMED_REMOVED = {  # percent of the parameters
    ("vgg16", "cifar10"): 92.74,
    ("vgg16", "cifar100"): 72.91,
    ("resnet56", "cifar10"): 48.84,
    ("resnet56", "cifar100"): 44.18,
}
CLAIMED_RIVALS = ("hrank", "polarization", "swp")
SUPPORTED, NOT_SUPPORTED, NOT_TESTED = "supported", "not supported", "not tested yet"
_NEAR = 0.5  # points between the target that was claimed and the one that was run


def claims_frame(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row a claim: the sentence, the setting, what was measured, n, and the verdict."""
    frame = runs_frame([record for record in records if record.config.schedule == "equal"])
    rows = []
    for (model, dataset), removed in CLAIMED_REMOVED.items():
        setting = f"{label_model(model)}, {label_dataset(dataset)}"
        here = frame[(frame["model"] == model) & (frame["dataset"] == dataset)] if len(frame) else frame
        near = here[(here["target"] - removed).abs() <= _NEAR] if len(here) else here
        rows.append(_removal(setting, removed, here, near))
        for rival in CLAIMED_RIVALS:
            rows.append(_comparison(setting, "less training time than", rival, near, "training seconds", -1))
            rows.append(_comparison(setting, "better accuracy than", rival, near, "accuracy", +1))
    return pd.DataFrame(rows, columns=["claim", "setting", "measured", "n", "verdict"])


def _removal(setting: str, removed: float, here: pd.DataFrame, near: pd.DataFrame) -> dict:
    row = {"claim": f"{removed} % of the parameters removed", "setting": setting, "n": 0}
    apbm = _of(near, "apbm")
    if apbm.empty:
        return row | {"measured": "no run at this target", "verdict": NOT_TESTED}
    measured = f"{apbm['parameters removed'].mean():.2f} % removed"
    n = len(apbm)
    if apbm["drop"].notna().any():
        drop, half = mean_and_interval(apbm["drop"].tolist())
        measured += f", {drop:.2f} points of accuracy lost" + (f" (± {half:.2f})" if n > 1 else "")
    return row | {"measured": measured, "n": n, "verdict": SUPPORTED}


def _comparison(setting: str, words: str, rival: str, near: pd.DataFrame, column: str, sign: int) -> dict:
    row = {"claim": f"{words} {get_method(rival).label}", "setting": setting, "n": 0}
    both = _of(near, "apbm").merge(_of(near, rival), on="seed", suffixes=("", " of rival"))
    if both.empty:
        return row | {"measured": "no pair of runs", "verdict": NOT_TESTED}
    if column == "training seconds":
        both = both[both["timed on"] == both["timed on of rival"]]
        if both.empty:
            return row | {"measured": "no pair of runs timed under equal conditions", "verdict": NOT_TESTED}
    ours, theirs = both[column], both[f"{column} of rival"]
    difference = ours - theirs
    mean, half = mean_and_interval(difference.tolist())
    if column == "accuracy":
        measured = f"{mean:+.2f} points" + (f" (± {half:.2f})" if len(difference) > 1 else "")
    else:
        measured = f"{(ours / theirs).mean():.2f} times the time"
    row |= {"measured": measured, "n": len(difference)}
    if len(difference) < PAIRS_FOR_A_VERDICT:
        return row | {"verdict": f"{NOT_TESTED}: needs {PAIRS_FOR_A_VERDICT} seeds"}
    return row | {"verdict": SUPPORTED if sign * mean > half else NOT_SUPPORTED}


def _of(frame: pd.DataFrame, method: str) -> pd.DataFrame:
    columns = ["method", "seed", "accuracy", "training seconds", "parameters removed", "drop", "timed on"]
    return frame[frame["method"] == method] if len(frame) else pd.DataFrame(columns=columns)
