"""The ablation: APBM with one ingredient changed at a time, judged on held-out training images.

Here are the beds, which of the variants (:mod:`apbm_core.study.ablation.variants`) run in each, and those runs.
``make reproduce PROFILE=ablation`` carries out what is not recorded yet, seed by seed, so that every variant has as
many as the others whenever it is stopped, and renders 05_ablation. The test images are never seen here: variants are
compared on training images that their run did not train on, with seeds that the study itself does not use.

Two networks that disagree about one image in five differ by 0.6 points for chance alone when 5,000 images judge them.
So the beds train on part of the images, and all the others judge.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apbm_core.errors import ConfigError
from apbm_core.study.ablation.variants import VARIANTS
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.records import ResultsFolder, RunConfig, RunRecord
from apbm_core.study.validation import closest

FOLDER = "ablation"
"""The name of its profile, and so of its folder: ``results/ablation``."""

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

# Groups for networks without shortcuts, or costly ones.
_ELSEWHERE = ("rate", "rival", "passing", "responses", "helped", "average")
PLAN: dict[str, tuple[str, ...]] = {
    "resnet20": (
        *(name for name in VARIANTS if VARIANTS[name].group not in _ELSEWHERE),
        "passing-fused",
    ),
    "vgg16": (
        "scratch",
        "scratch-lr-2",
        "base",
        "slice",
        "bank-lr-2",
        "scratch-balanced",
        "base-balanced",
        "dirac",
        "passing",
        "passing-fused",
    ),
    "resnet20-45000": (),
}
"""The variants that are run in each bed, with every seed; in the bed that was given up none any more."""


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


def planned(beds: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[tuple[str, int], RunConfig]]:
    """For each of these beds the runs that the ablation consists of; see :data:`PLAN`.

    Raises:
        ConfigError: an unknown bed.
    """
    return {bed: configs(bed, _known(bed, PLAN, "bed"), seeds) for bed in beds}


def run(study: Study, wanted: Mapping[tuple[str, int], RunConfig]) -> list[RunConfig]:
    """Carry out, in ``study``'s folder, what is not recorded there yet; return what has no record afterwards, which is
    everything that was missing if only records are to be read."""
    missing = [config for config in wanted.values() if study.results.read(config) is None]
    if missing and not study.records_only:
        study.run(missing)
        return []
    return missing


def recorded(folder: str | Path, bed: str) -> dict[tuple[str, int], RunRecord]:
    """The records there are in ``folder``, by (variant, seed); those of other beds or of no variant are left out.

    Raises:
        RecordError: a record is damaged.
    """
    records = {record.id: record for record in ResultsFolder(folder).read_all()}
    seeds = sorted({record.config.seed for record in records.values()})
    return {key: records[config.id] for key, config in configs(bed, VARIANTS, seeds).items() if config.id in records}


def _known(name: str, known: Mapping[str, Any], what: str) -> Any:
    if name not in known:
        raise ConfigError(f"there is no {what} {name!r}{closest(name, known)} Allowed: {', '.join(known)}.")
    return known[name]
