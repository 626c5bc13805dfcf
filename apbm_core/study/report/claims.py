"""The sentences of the paper's abstract, each beside what the records say about it, with a verdict.

The claims are quoted from the abstract of Qu, Zhang and Wang (2022); methods.md 0. A verdict is one of three, or the
reason why there is none: *supported* and *contradicted* are differences that stand Holm's correction over the
comparisons of their setting, for the claim or against it; *inconclusive* is a difference that chance explains.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from apbm_core.study.grid.calibration import Calibration
from apbm_core.study.methods import get_method, label
from apbm_core.study.records import RunRecord
from apbm_core.study.report.frames import label_dataset, label_model, noises, runs_frame
from apbm_core.study.report.rivals import over_targets, paired
from apbm_core.study.report.statistics import (
    ABOVE,
    BELOW,
    INCONCLUSIVE,
    NO_NOISE,
    PAIRS_FOR_A_VERDICT,
    BedNoise,
    Comparison,
    Noise,
    judge,
    pooled_noise,
)

CLAIMED_REMOVED = {  # percent of the parameters
    ("vgg16", "cifar10"): 92.74,
    ("vgg16", "cifar100"): 72.91,
    ("resnet56", "cifar10"): 48.84,
    ("resnet56", "cifar100"): 44.18,
}
CLAIMED_RIVALS = ("hrank", "polarization", "swp")
CONTROLS = {
    "scratch": "fusing loses less accuracy than no fusion",
    "passing": "fusing loses less accuracy than passing the input on alone",
    "l1": "no pre-trained network needed: better accuracy than cutting one",
}
"""What the abstract says of fusion and of pre-training, each against the method that lacks APBM's part; those that run
only where they are named have a row where they ran."""
SUPPORTED, CONTRADICTED, NOT_TESTED = "supported", "contradicted", "not tested"
_NEAR = 0.5  # points between the target that was claimed and the one that was run
_COLUMNS = ["claim", "setting", "verdict", "measured", "n"]


def claims_frame(records: Sequence[RunRecord], calibration: Calibration | None = None) -> pd.DataFrame:
    """One row a claim: the sentence with the rival it names, the setting, the verdict, what was measured, and n.

    Claims with a verdict come first, those that are not tested last.

    Args:
        records: whichever there are; those at equal epochs count.
        calibration: the seconds of the phases, if they were measured apart; else the records' own are compared.
    """
    equal = [record for record in records if record.config.schedule == "equal"]
    frame = runs_frame(equal)
    means = over_targets(frame)
    rows = []
    for (model, dataset), removed in CLAIMED_REMOVED.items():
        setting = f"{label_model(model)}, {label_dataset(dataset)}"
        here = frame[(frame["model"] == model) & (frame["dataset"] == dataset)]
        near = here[(here["target"] - removed).abs() <= _NEAR]
        if here.empty:
            unrun = {"claim": f"all claims, with {removed} % of the parameters removed", "setting": setting, "n": 0}
            rows.append(unrun | {"measured": "", "verdict": f"{NOT_TESTED}: nothing was run here"})
            continue
        there = [record for record in equal if record.id in set(near["id"])]
        rows.append(_removal(setting, removed, near))
        rows += _accuracy(setting, near, noises(here))
        rows += _time(setting, there, near, calibration)
        rows += _compression(setting, here, means[(means["model"] == model) & (means["dataset"] == dataset)])
    order = {SUPPORTED: 0, CONTRADICTED: 0, INCONCLUSIVE: 1}
    return pd.DataFrame(sorted(rows, key=lambda row: order.get(row["verdict"], 2)), columns=_COLUMNS)


def _removal(setting: str, removed: float, near: pd.DataFrame) -> dict:
    """The share is given to every method, so that reaching it is no finding; what it costs is."""
    row = {"claim": f"{removed} % of the parameters removed", "setting": setting, "n": 0}
    apbm = near[near["method"] == "apbm"]
    if apbm.empty:
        return row | {"measured": "", "verdict": f"{NOT_TESTED}: no run at this target"}
    measured = f"{apbm['parameters removed'].mean():.2f} % removed"
    if apbm["drop"].notna().any():
        measured += f", {apbm['drop'].mean():.2f} points below dense"
    reason = f"{NOT_TESTED}: the share is imposed on every method"
    return row | {"measured": measured, "n": len(apbm), "verdict": reason}


def _accuracy(setting: str, near: pd.DataFrame, known: Mapping[tuple, BedNoise]) -> list[dict]:
    """APBM against the paper's rivals, and against the controls, corrected together; ``known`` is the noise of all the
    network's targets, as the other tables have it."""
    claims = {rival: f"better accuracy than {label(rival)}" for rival in CLAIMED_RIVALS}
    ran = set(near["method"])
    controls = [rival for rival in CONTROLS if rival in ran or get_method(rival).default]
    claims |= {rival: f"{CONTROLS[rival]} ({label(rival)})" for rival in controls}
    beds = near[["model", "dataset", "target"]].itertuples(index=False, name=None)
    noise = next((known[bed] for bed in beds), BedNoise(NO_NOISE))
    found = {rival: paired(_both(near, rival)) for rival in claims}
    judged = judge(list(found.values()), [noise.between("apbm", rival) for rival in found])
    rows = []
    for (rival, comparison), row in zip(found.items(), judged.to_dict("records"), strict=True):
        measured = f"{comparison.mean:+.2f}" + ("" if math.isnan(row["interval"]) else f" ± {row['interval']:.2f}")
        rows.append(
            {"claim": claims[rival], "setting": setting}
            | _said(row, comparison, f"{measured} points", noise.between("apbm", rival), len(found), sign=+1)
        )
    return rows


def _compression(setting: str, here: pd.DataFrame, means: pd.DataFrame) -> list[dict]:
    """More accurate at equal compression, on the mean over the targets, is more compressed at equal accuracy."""
    rows = []
    for rival in CLAIMED_RIVALS:
        row = {"claim": f"higher compression at the same accuracy than {label(rival)}", "setting": setting, "n": 0}
        against = means[means["rival"] == label(rival)].to_dict("records")
        if not against or against[0]["points"] < 2:
            several = here[here["method"] == "apbm"]["target"].nunique() > 1
            why = "no seed in all of its targets" if several else "takes more than one target"
            rows.append(row | {"measured": "", "verdict": f"{NOT_TESTED}: {why}"})
            continue
        (found,) = against
        interval = "" if math.isnan(found["interval"]) else f" ± {found['interval']:.2f}"
        measured = f"{found['difference']:+.2f}{interval} points, mean of {found['points']} targets"
        rows.append(row | {"measured": measured, "n": found["n"], "verdict": _in_words(found["verdict"], +1)})
    return rows


def _time(
    setting: str, records: Sequence[RunRecord], near: pd.DataFrame, calibration: Calibration | None
) -> list[dict]:
    """Logarithms of training times, paired by the calibration's rounds, or by the runs' seeds."""
    calibrated = calibration is not None and all(calibration.covers(record) for record in records)
    if calibrated and records:
        runs = {record.config.method: record for record in records}  # what was measured does not depend on the seed
        rows = [
            {"method": method, "seed": number, "training seconds": seconds, "timed on": calibration.words}
            for method, record in runs.items()
            for number, seconds in enumerate(calibration.rounds(record))
        ]
        times = pd.DataFrame(rows)
    else:
        times = near[["method", "seed", "training seconds", "timed on"]]
    times = times.assign(accuracy=np.log(times["training seconds"].astype(float)), network=range(len(times)))
    noise = pooled_noise(times, "method")
    found = {rival: _both(times, rival) for rival in CLAIMED_RIVALS}
    alike = {rival: both[both["timed on"] == both["timed on of rival"]] for rival, both in found.items()}
    comparisons = {rival: paired(both) for rival, both in alike.items()}
    judged = judge(list(comparisons.values()), noise)
    rows = []
    for (rival, comparison), row in zip(comparisons.items(), judged.to_dict("records"), strict=True):
        low, high = (math.exp(comparison.mean + side * row["interval"]) if comparison.n else 0 for side in (-1, 1))
        spread = "" if math.isnan(row["interval"]) else f" ({low:.2f} to {high:.2f})"
        ratio = math.exp(comparison.mean) if comparison.n else math.nan
        words = {"claim": f"less training time than {label(rival)}", "setting": setting}
        if not comparison.n and len(found[rival]):
            why = f"{NOT_TESTED}: no pair of runs timed under equal conditions"
            rows.append(words | {"measured": "", "n": 0, "verdict": why})
        else:
            measured = f"{ratio:.2f} times the time{spread}" + (", calibrated" if calibrated else "")
            rows.append(words | _said(row, comparison, measured, None, 1, sign=-1))
    return rows


def _both(rows: pd.DataFrame, rival: str) -> pd.DataFrame:
    ours, theirs = (rows[rows["method"] == name] for name in ("apbm", rival))
    return ours.merge(theirs, on="seed", suffixes=("", " of rival"))


def _said(row: dict, comparison: Comparison, measured: str, noise: Noise | None, comparisons: int, sign: int) -> dict:
    if not comparison.n:
        return {"measured": "", "n": 0, "verdict": f"{NOT_TESTED}: no pair of runs"}
    if comparison.n < PAIRS_FOR_A_VERDICT:
        seeds = f"needs {PAIRS_FOR_A_VERDICT} seeds, has {comparison.n}"
        return {"measured": measured, "n": comparison.n, "verdict": f"{NOT_TESTED}: {seeds}"}
    verdict = _in_words(row["verdict"], sign)
    if verdict == INCONCLUSIVE and noise is not None:
        measured += f"; {noise.detectable(comparison.n, comparisons):.1f} would have been seen"
    return {"measured": measured, "n": comparison.n, "verdict": verdict}


def _in_words(verdict: str, sign: int) -> str:
    """A comparison's verdict as one on the claim that it is above (sign +1) or below (-1)."""
    if verdict in (ABOVE, BELOW):
        return SUPPORTED if (verdict == ABOVE) == (sign > 0) else CONTRADICTED
    return verdict if verdict == INCONCLUSIVE else f"{NOT_TESTED}: {verdict}"
