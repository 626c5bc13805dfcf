"""The sentence over a panel of the curves: what its points say, in words."""

from collections.abc import Sequence

import pandas as pd

from apbm_core.study.methods import label
from apbm_core.study.report.claims import CLAIMED_REMOVED
from apbm_core.study.report.statistics import ABOVE, BELOW

_NEAREST = 0.1  # points of accuracy; a lead below it is none
_NAMED_IN_A_TIE = 3  # more names than that make no title
_SAME_MACS = 0.1  # a share; widths that meet a target of parameters differ by less in rounding


def in_accuracy(part: pd.DataFrame, means: pd.DataFrame) -> str:
    """Over several targets whom APBM is above and whom below, corrected; without such a verdict, who leads."""
    decided = means[means["verdict"].isin([ABOVE, BELOW]) & (means["points"] > 1)] if len(means) else means
    if decided.empty:
        return _leader(part[part["schedule"] != "equal-time"])
    said = []
    for (points, seeds), rows in sorted(decided.groupby(["points", "n"]), key=lambda group: group[0], reverse=True):
        sides = {word: rows[rows["verdict"] == word]["rival"] for word in (ABOVE, BELOW)}
        words = " and ".join(f"{word} {_names(rivals)}" for word, rivals in sides.items() if len(rivals))
        said.append(
            f"over {points} x {seeds}, {words}" if said else f"over {points} targets x {seeds} seeds APBM is {words}"
        )
    return "; ".join(said)


def _names(labels: pd.Series) -> str:
    """A list of methods, in which a comma stands between two of them only."""
    return ", ".join(name.replace(", ", " with ") for name in labels)


def _leader(part: pd.DataFrame) -> str:
    """Who is ahead at the target that most methods share."""
    there = _at_the_shared_target(part)
    if there.empty:
        return "the dense network alone"
    target = there["target"].iloc[0]
    highest = there["accuracy"].max()
    best = there[there["accuracy"] > highest - _NEAREST]  # less than the sentence shows is no lead
    names = [label(method) for method in best.sort_values("accuracy", ascending=False)["method"]]
    leader = f"{names[0]} leads" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} tie"
    leader = leader if len(names) <= _NAMED_IN_A_TIE else f"{len(names)} methods tie"
    sentence = f"at {target:.4g} % removed, {leader} with {highest:.1f} %"
    apbm, scratch = (there[there["method"] == name]["accuracy"] for name in ("apbm", "scratch"))
    if len(apbm) and len(scratch):
        sentence += f"; APBM {apbm.iloc[0] - scratch.iloc[0]:+.1f} points against slim from scratch"
    return sentence


def _at_the_shared_target(part: pd.DataFrame) -> pd.DataFrame:
    """The compressed networks at the target that most methods have, the paper's if it is one; empty without any."""
    pruned = part[part["method"] != "dense"]
    if pruned.empty:
        return pruned
    counts, first = pruned["target"].value_counts(), pruned.iloc[0]
    claimed = CLAIMED_REMOVED.get((first["model"], first["dataset"]), 100)
    target = min(counts[counts == counts.max()].index, key=lambda target: abs(target - claimed))
    return pruned[pruned["target"] == target]


def in_macs(part: pd.DataFrame, methods: Sequence[str]) -> str:
    """How many times APBM's multiply-accumulates those of the ``methods`` keep that differ from it."""
    there = _at_the_shared_target(part[part["schedule"] != "equal-time"])
    kept = 1 - there.set_index("method")["MACs removed"] / 100
    if "apbm" not in kept.index:
        return _leader(part)
    factors = (kept / kept["apbm"]).groupby(level=0).mean()
    others = {name: factors[name] for name in methods if name in factors.index and name != "apbm"}
    said = [f"{label(name)} {factor:.1f}" for name, factor in others.items() if abs(factor - 1) > _SAME_MACS]
    words = f"MACs kept as a multiple of APBM's: {', '.join(said)}" if said else "all keep about as many MACs as APBM"
    return f"at {there['target'].iloc[0]:.4g} % removed, {words}"


def in_time(part: pd.DataFrame) -> str:
    """What equal time made of APBM and of the same network from scratch; else who takes how much longer than whom."""
    means = part.groupby(["target", "schedule", "method"], observed=True)["accuracy"].mean()
    for target in sorted(part[part["schedule"] == "equal-time"]["target"].unique()):
        names = [("equal-time", "apbm"), ("equal-time", "scratch"), ("equal", "l1")]
        there = [(method, means.get((target, schedule, method))) for schedule, method in names]
        if all(accuracy is not None for _, accuracy in there):
            words = ", ".join(f"{label(method)} {accuracy:.1f} %" for method, accuracy in there)
            return f"at {target:.4g} % removed, in L1's time: {words}"
    timed = _at_the_shared_target(part[part["timed alike"]])
    if timed.empty:
        return "every mark is of runs timed under different conditions"
    slowest, fastest = (timed.loc[timed["training seconds"].agg(pick)] for pick in ("idxmax", "idxmin"))
    ratio = slowest["training seconds"] / fastest["training seconds"]
    where = f"at {timed['target'].iloc[0]:.4g} % removed, "
    return f"{where}{label(slowest['method'])} takes {ratio:.1f} times as long as {label(fastest['method'])}"
