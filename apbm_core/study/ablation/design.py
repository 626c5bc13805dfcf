"""The ablation: APBM with one ingredient changed at a time, judged on held-out training images.

``python -m apbm_core.study.ablation`` runs what is not recorded yet, seed by seed, so that every variant has as many as
the others whenever it is stopped; 05_ablation draws what is recorded. The test images are never seen here: variants are
compared on training images that their run did not train on, with seeds that the study itself does not use.

Two networks that disagree about one image in five differ by 0.6 points for chance alone when 5,000 images judge them.
So the beds train on part of the images, and all the others judge.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from apbm_core.errors import ApbmError, ConfigError
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.records import PUBLISHED, ResultsFolder, RunConfig, RunRecord
from apbm_core.study.report.frames import timed_alike
from apbm_core.study.report.statistics import Comparison, Noise, judge, pooled_noise
from apbm_core.study.validation import closest

FOLDER = "ablation"
"""Beside the profiles' folders: ``results/ablation``."""

SEEDS = (10, 11, 12)

_SMALL = {"models": ["resnet20"], "targets": {"resnet20": [0.75]}, "epochs": 6}
# Arithmetic is fixed, so that machines differ in rounding alone.
_CROPS = {"crop": 24, "padding": 2, "precision": "float32"}

BEDS: dict[str, dict[str, Any]] = {
    # Small and quick: 18,000 images train, 32,000 judge.
    "resnet20": _SMALL | {"train_subset": 20_000, "recipe_overrides": _CROPS},
    # The paper's headline network and target.
    "vgg16": {
        "models": ["vgg16"],
        "targets": {"vgg16": [0.9274]},
        "epochs": 6,
        "train_subset": 20_000,
        "recipe_overrides": {"precision": "float32"},
    },
    # Given up after a few runs: 45,000 images train, but the 5,000 that judge cannot tell the variants apart.
    "resnet20-45000": _SMALL | {"recipe_overrides": _CROPS},
}
"""Where the variants are compared: parameters of a study, all of them with ``split = "tuning"``."""

BASE: dict[str, Any] = {
    "settings": {
        "schedule": {"kind": "annealed", "start": 1.0, "end": 2.0, "freeze": 0.6, "scale_free": True},
        "metric": "euclidean",
        "score": "relative-entropy",
        "mass": "all",
        "rescale": True,
        "stable_slots": True,
        "fuse": True,
        "reselect": True,
        "bank": 1.0,
        "initial": "model",
        "gain": False,
        "learn_mixing": False,
    },
    "rescores_per_epoch": 4,
    "collapse": False,
    "bank_lr": 1.0,
    "bank_decay": 1.0,
    "wide": 0.0,
    "stages": 1,
    "merge": "activations",
    "widths": "shared",
    "budget_tau": 1.0,
}
"""What the variants start from, spelt out, so that it stays what it was when APBM's defaults change."""


@dataclass(frozen=True)
class Variant:
    """One line of the ablation: what differs from BASE, or a rival for comparison."""

    name: str
    group: str  # the ingredient it is about
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = "apbm"
    filters: str = "uniform"  # the rule that divides the target among the layers
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def all_options(self) -> dict[str, Any]:
        """The method's options: APBM's in full, a rival's as far as they differ from its defaults."""
        if self.method != "apbm":
            return dict(self.options)
        return {**BASE, **self.options, "settings": {**BASE["settings"], **self.settings}}


def _tau(start: float, end: float, freeze: float) -> dict[str, Any]:
    return {"schedule": {"kind": "annealed", "start": start, "end": end, "freeze": freeze, "scale_free": True}}


_SLICE = {"fuse": False, "score": "order", "reselect": False}

# The same peak rate for the whole network; 0.2 is the recipe's, whose runs stand among the other variants.
_RATES = (
    *(
        Variant(
            f"scratch-rate-{rate}", "rate", f"slim from scratch, rate {rate}", method="scratch", recipe={"lr": rate}
        )
        for rate in (0.1, 0.8)
    ),
    *(
        Variant(
            f"fan-in-rate-{rate}",
            "rate",
            f"slim from scratch, drawn at the dense fan-in, rate {rate}",
            method="scratch",
            options={"fan_in": "dense"},
            recipe={"lr": rate},
        )
        for rate in (0.1, 0.2, 0.4, 0.8)
    ),
    *(
        Variant(f"slice-rate-{rate}", "rate", f"the slice, rate {rate}", _SLICE, recipe={"lr": rate})
        for rate in (0.1, 0.4, 0.8)
    ),
    *(Variant(f"base-rate-{rate}", "rate", f"base, rate {rate}", recipe={"lr": rate}) for rate in (0.1, 0.4, 0.8)),
)

_SIXTH = 1 / 6  # one epoch of the beds' six

_ALL = (
    Variant("scratch", "reference", "slim from scratch", method="scratch"),
    Variant("scratch-lr-2", "reference", "slim from scratch, twice the rate", method="scratch", recipe={"lr": 0.4}),
    Variant("l1", "reference", "2 epochs dense, cut by L1", method="l1"),
    Variant("dense", "reference", "dense", method="dense"),
    Variant("dcff", "reference", "DCFF's schedule", method="dcff"),
    Variant("base", "reference", "base: tau 1 to 2, all mass, rescaled"),
    Variant("no-fusion", "fusion", "nothing mixed in: the KL score selects", {"fuse": False}),
    Variant(
        "slice",
        "fusion",
        "no fusion, no score: a slice of the dense initialisation",
        _SLICE,
    ),
    Variant(
        "slice-lr-2",
        "fusion",
        "the slice, learning twice as fast",
        _SLICE,
        {"bank_lr": 2.0},
    ),
    Variant("no-reselection", "fusion", "the first selection stays", {"reselect": False}),
    Variant("shuffled-slots", "fusion", "slots not stable", {"stable_slots": False}),
    Variant("no-rescale", "fusion", "not rescaled", {"rescale": False}),
    Variant("mass-unimportant", "mass", "mass of unimportant filters only", {"mass": "unimportant"}),
    Variant("mass-assigned", "mass", "unimportant filters divide themselves", {"mass": "assigned"}),
    Variant("tau-low", "tau", "tau 0.5 to 2", _tau(0.5, 2.0, 0.6)),
    Variant("tau-high", "tau", "tau 1.5 to 3", _tau(1.5, 3.0, 0.6)),
    Variant("tau-short", "tau", "frozen after 1/3", _tau(1.0, 2.0, 1 / 3)),
    Variant("tau-long", "tau", "never frozen", _tau(1.0, 2.0, 1.0)),
    Variant("tau-constant", "tau", "tau 1 throughout", _tau(1.0, 1.0, 1.0)),
    Variant("score-entropy", "score", "score: entropy", {"score": "entropy"}),
    Variant("score-l1", "score", "score: L1", {"score": "l1"}),
    Variant("score-order", "score", "score: none, the first m", {"score": "order"}),
    Variant("cosine", "score", "cosine distance", {"metric": "cosine"}),
    Variant("gain", "bank", "unit filters with learned gains", {"gain": True}),
    Variant("learned-mixing", "bank", "P is trained", {"learn_mixing": True}),
    Variant("bank-2", "bank", "bank twice the layer", {"bank": 2.0}),
    Variant("orthogonal", "bank", "orthogonal initial bank", {"initial": "orthogonal"}),
    Variant("bank-lr-2", "bank", "banks learn twice as fast", options={"bank_lr": 2.0}),
    Variant("bank-lr-4", "bank", "banks learn four times as fast", options={"bank_lr": 4.0}),
    Variant("bank-lr-half", "bank", "banks learn half as fast", options={"bank_lr": 0.5}),
    Variant("bank-no-decay", "bank", "banks without weight decay", options={"bank_decay": 0.0}),
    Variant("collapse", "bank", "banks dropped once P is frozen", options={"collapse": True}),
    Variant("wide-1", "narrowing", "1 epoch wide, then merged", options={"wide": _SIXTH}),
    Variant("wide-1-cut", "narrowing", "1 epoch wide, then cut", options={"wide": _SIXTH, "merge": "none"}),
    Variant(
        "wide-1-similarity", "narrowing", "1 epoch wide, averaged", options={"wide": _SIXTH, "merge": "similarity"}
    ),
    Variant("wide-2", "narrowing", "2 epochs wide, then merged", options={"wide": 2 * _SIXTH}),
    Variant("wide-2-stages", "narrowing", "2 stages in 2 epochs", options={"wide": 2 * _SIXTH, "stages": 2}),
    Variant("wide-3-stages", "narrowing", "3 stages in 3 epochs", options={"wide": 3 * _SIXTH, "stages": 3}),
    Variant("scratch-balanced", "widths", "slim from scratch, balanced widths", method="scratch", filters="balanced"),
    Variant("base-balanced", "widths", "base, balanced widths", filters="balanced"),
    Variant("wide-1-budget", "widths", "1 epoch wide, entropy widths", options={"wide": _SIXTH, "widths": "entropy"}),
    Variant(
        "wide-2-stages-budget",
        "widths",
        "2 stages, entropy widths",
        options={"wide": 2 * _SIXTH, "stages": 2, "widths": "entropy"},
    ),
    *_RATES,
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}


INGREDIENTS: tuple[tuple[str, str, str], ...] = (
    ("starting as a slice of the dense network", "slice", "scratch"),
    ("scoring the filters, instead of the first m", "no-fusion", "slice"),
    ("mixing the others in", "base", "no-fusion"),
    ("choosing anew as training goes on", "base", "no-reselection"),
    ("relative entropy as the score, instead of the first m", "base", "score-order"),
    ("relative entropy, instead of L1", "base", "score-l1"),
    ("annealing tau, instead of a constant one", "base", "tau-constant"),
    ("a lower tau, 0.5 to 2", "tau-low", "base"),
    ("a higher tau, 1.5 to 3", "tau-high", "base"),
    ("freezing P", "base", "tau-long"),
    ("freezing P after a third, instead of 60 %", "tau-short", "base"),
    ("cosine distance, instead of Euclidean", "cosine", "base"),
    ("entropy as the score, instead of relative entropy", "score-entropy", "base"),
    ("mass of unimportant filters only", "mass-unimportant", "base"),
    ("unimportant filters divide themselves", "mass-assigned", "base"),
    ("rescaling to the kept filters' norm", "base", "no-rescale"),
    ("stable slots", "base", "shuffled-slots"),
    ("training P", "learned-mixing", "base"),
    ("learned gains", "gain", "base"),
    ("a bank twice the layer", "bank-2", "base"),
    ("an orthogonal initial bank", "orthogonal", "base"),
    ("banks that learn twice as fast", "bank-lr-2", "base"),
    ("banks that learn four times as fast", "bank-lr-4", "base"),
    ("banks that learn half as fast", "bank-lr-half", "base"),
    ("twice the learning rate, for the slice alone", "slice-lr-2", "slice"),
    ("twice the learning rate, for slim from scratch", "scratch-lr-2", "scratch"),
    ("banks without weight decay", "bank-no-decay", "base"),
    ("dropping the banks once P is frozen", "collapse", "base"),
    ("starting wide, for one epoch", "wide-1", "slice"),
    ("merging what goes, instead of cutting it", "wide-1", "wide-1-cut"),
    ("merging by least squares, instead of by similarity", "wide-1", "wide-1-similarity"),
    ("two stages in two epochs, instead of one in one", "wide-2-stages", "wide-1"),
    ("widths from the entropy budget, one stage", "wide-1-budget", "wide-1"),
    ("widths from the entropy budget, two stages", "wide-2-stages-budget", "wide-2-stages"),
    ("balanced widths, with fusion", "base-balanced", "base"),
    ("balanced widths, from scratch", "scratch-balanced", "scratch"),
    ("all of it: APBM against slim from scratch", "base", "scratch"),
    ("all of it, both learning twice as fast", "bank-lr-2", "scratch-lr-2"),
    ("all of it, at balanced widths", "base-balanced", "scratch-balanced"),
)
"""Each ingredient as a pair of variants that differ by it: (what, with it, without it)."""


def configs(bed: str, names: Iterable[str], seeds: Iterable[int]) -> dict[tuple[str, int], RunConfig]:
    """The runs of some variants, by (variant, seed), seed by seed.

    Raises:
        ConfigError: an unknown bed or variant.
    """
    found = {}
    for seed in seeds:
        for name in names:
            variant, parameters = _known(name, VARIANTS, "variant"), _known(bed, BEDS, "bed")
            values = {"methods": [variant.method], "seeds": [seed], "split": "tuning", "widths": variant.filters}
            values["recipe_overrides"] = parameters["recipe_overrides"] | variant.recipe
            if variant.all_options():
                values["options"] = {variant.method: variant.all_options()}
            (found[name, seed],) = StudyParameters.parse(parameters | values).run_configs("cifar10")
    return found


def run(folder: str | Path, bed: str, names: Sequence[str], seeds: Sequence[int]) -> list[RunRecord]:
    """Carry out what is not recorded in ``folder`` and return the records; see :func:`configs`."""
    wanted = configs(bed, names, seeds)
    parameters = StudyParameters.parse(BEDS[bed] | {"split": "tuning"})
    return Study(parameters, folder).run(list(wanted.values()))


def recorded(folder: str | Path, bed: str) -> dict[tuple[str, int], RunRecord]:
    """The records there are in ``folder``, by (variant, seed); those of other beds or of no variant are left out.

    Raises:
        RecordError: a record is damaged.
    """
    records = {record.id: record for record in ResultsFolder(folder).read_all()}
    seeds = sorted({record.config.seed for record in records.values()})
    return {key: records[config.id] for key, config in configs(bed, VARIANTS, seeds).items() if config.id in records}


def noise(records: Mapping[tuple[str, int], RunRecord]) -> Noise:
    """How much one run's held-out accuracy spreads on this bed, in points, over all variants that were repeated."""
    rows = [
        {"variant": name, "seed": seed, "accuracy": 100 * record.val_accuracy, "network": record.network_sha256 or key}
        for key, record in records.items()
        for name, seed in [key]
    ]
    return pooled_noise(
        pd.DataFrame(rows, columns=["variant", "seed", "accuracy", "network"]), "variant", network="network"
    )


def compared(records: Mapping[tuple[str, int], RunRecord], ours: str, theirs: str) -> Comparison:
    """Held-out accuracy of one variant minus another's, in points, paired by seed."""
    seeds = sorted(seed for name, seed in records if name == ours and (theirs, seed) in records)
    pairs = [(records[ours, seed], records[theirs, seed]) for seed in seeds]
    same = [a.network_sha256 is not None and a.network_sha256 == b.network_sha256 for a, b in pairs]
    return Comparison(tuple(100 * (a.val_accuracy - b.val_accuracy) for a, b in pairs), sum(same))


def table(records: Mapping[tuple[str, int], RunRecord], reference: str = "scratch") -> pd.DataFrame:
    """One row a variant: mean held-out accuracy, and its difference to the reference, paired by seed.

    Accuracies in percent, differences in points, intervals of 95 % from the bed's pooled noise, verdicts after Holm's
    correction over the rows: see :mod:`apbm_core.study.report.statistics`. Seconds are of the runs that were timed
    under the conditions that most were, NaN for a variant without any.
    """
    spread, rows = noise(records), []
    comparable = {record.id for record in timed_alike(list(records.values()))}
    shown = [variant for variant in _ALL if any(name == variant.name for name, _ in records)]
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


def ingredients(records: Mapping[tuple[str, int], RunRecord]) -> pd.DataFrame:
    """What each ingredient is worth: accuracy with it minus without it, in points, paired by seed.

    Pairs of which nothing is recorded are left out. Intervals and verdicts as in :func:`table`, corrected over these
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


def _known(name: str, known: Mapping[str, Any], what: str) -> Any:
    if name not in known:
        raise ConfigError(f"there is no {what} {name!r}{closest(name, known)} Allowed: {', '.join(known)}.")
    return known[name]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m apbm_core.study.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--bed", default="resnet20", help=f"where to compare: {', '.join(BEDS)}")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), metavar="NAME", help="all by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--folder", default=f"{PUBLISHED}/{FOLDER}", help="where the records are")
    given = parser.parse_args(arguments)
    try:
        run(given.folder, given.bed, given.variants, given.seeds)
        print(table(recorded(given.folder, given.bed)).round(2).to_string(index=False))
    except ApbmError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
