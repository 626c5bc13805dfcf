"""The tables of 05_ablation, as pure functions of records by (variant, seed)."""

import math
from collections.abc import Mapping

import pandas as pd

from apbm_core.study.ablation.variants import INGREDIENTS, VARIANTS
from apbm_core.study.records import RunRecord
from apbm_core.study.report.frames import timed_alike
from apbm_core.study.report.statistics import Comparison, Noise, judge, pooled_noise

Records = Mapping[tuple[str, int], RunRecord]


def noise(records: Records) -> Noise:
    """How much one run's held-out accuracy spreads on this bed, in points, over all variants that were repeated."""
    rows = [
        {"variant": name, "seed": seed, "accuracy": 100 * record.val_accuracy, "network": record.network_sha256 or key}
        for key, record in records.items()
        for name, seed in [key]
    ]
    return pooled_noise(
        pd.DataFrame(rows, columns=["variant", "seed", "accuracy", "network"]), "variant", network="network"
    )


def compared(records: Records, ours: str, theirs: str) -> Comparison:
    """Held-out accuracy of one variant minus another's, in points, paired by seed."""
    seeds = sorted(seed for name, seed in records if name == ours and (theirs, seed) in records)
    pairs = [(records[ours, seed], records[theirs, seed]) for seed in seeds]
    same = [a.network_sha256 is not None and a.network_sha256 == b.network_sha256 for a, b in pairs]
    return Comparison(tuple(100 * (a.val_accuracy - b.val_accuracy) for a, b in pairs), sum(same))


def variants(records: Records, reference: str = "scratch") -> pd.DataFrame:
    """One row a variant: mean held-out accuracy, and its difference to the reference, paired by seed.

    Accuracies in percent, differences in points, intervals of 95 % from the bed's pooled noise, verdicts after Holm's
    correction over the rows: see :mod:`apbm_core.study.report.statistics`. Seconds are of the runs that were timed
    under the conditions that most were, NaN for a variant without any.
    """
    spread, rows = noise(records), []
    comparable = {record.id for record in timed_alike(list(records.values()))}
    shown = [variant for variant in VARIANTS.values() if any(name == variant.name for name, _ in records)]
    against = [variant.name for variant in shown if variant.name != reference]
    judged = judge([compared(records, name, reference) for name in against], spread).set_index(pd.Index(against))
    for variant in shown:
        mine = {seed: record for (name, seed), record in records.items() if name == variant.name}
        seconds = [record.seconds for record in mine.values() if record.id in comparable]
        is_reference = variant.name == reference
        found = {"difference": 0.0, "interval": 0.0, "pairs": len(mine), "p": math.nan, "p (Holm)": math.nan}
        found = found | {"verdict": "the reference"} if is_reference else judged.loc[variant.name].to_dict()
        rows.append(
            {
                "variant": variant.name,
                "ingredient": variant.group,
                "what": variant.label,
                "accuracy": sum(100 * record.val_accuracy for record in mine.values()) / len(mine),
                "interval": spread.half_width_of_mean(len(mine)),
                "n": len(mine),
                "difference": found["difference"],
                "interval of difference": found["interval"],
                "pairs": found["pairs"],
                "p": found["p"],
                "p (Holm)": found["p (Holm)"],
                "verdict": found["verdict"],
                "parameters removed": 100 * next(iter(mine.values())).parameters_removed,
                "MACs removed": sum(100 * record.macs_removed for record in mine.values()) / len(mine),
                "training seconds": sum(seconds) / len(seconds) if seconds else math.nan,
                "fastest seconds": min(seconds, default=math.nan),
            }
        )
    return pd.DataFrame(rows)


def ingredients(records: Records) -> pd.DataFrame:
    """What each ingredient is worth: accuracy with it minus without it, in points, paired by seed.

    Pairs of which nothing is recorded are left out. Intervals and verdicts as in :func:`variants`, corrected over these
    comparisons; each names its baseline, the variant without the ingredient.
    """
    found = [(what, on, off, compared(records, on, off)) for what, on, off in INGREDIENTS]
    found = [row for row in found if row[3].n]
    judged = judge([comparison for *_, comparison in found], noise(records))
    names = pd.DataFrame(
        [(what, on, off, list(comparison.each)) for what, on, off, comparison in found],
        columns=["ingredient", "with", "without", "each"],
    )
    both = pd.concat([names, judged.rename(columns={"interval": "interval of difference"})], axis=1)
    return both[
        [
            "ingredient",
            "with",
            "without",
            "difference",
            "interval of difference",
            "pairs",
            "each",
            "p",
            "p (Holm)",
            "verdict",
        ]
    ]


def provenance(records: Mapping[str, Records]) -> pd.DataFrame:
    """One row for each bed, source and machine: how many of its records were made there."""
    rows = [
        {
            "bed": bed,
            "commit": record.environment["commit"][:12],
            "device": record.environment["device"],
            "threads": record.environment["threads"],
            "side by side": record.environment["side_by_side"],
        }
        for bed, found in records.items()
        for record in found.values()
    ]
    columns = ["bed", "commit", "device", "threads", "side by side"]
    return pd.DataFrame(rows, columns=columns).groupby(columns, sort=False).size().rename("runs").reset_index()
