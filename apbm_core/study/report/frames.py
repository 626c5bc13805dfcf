"""Records as tables: one row a run, one a point of the grid, phases and epochs. Comparisons are in rivals.py."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from apbm_core.study.data.named import dataset_label
from apbm_core.study.grid.calibration import Calibration
from apbm_core.study.methods import ordered
from apbm_core.study.networks.models import network_label
from apbm_core.study.records import PhaseRecord, RunRecord, read_record
from apbm_core.study.report.statistics import NO_NOISE, PAIRS_FOR_A_VERDICT, BedNoise, bed_noise

BED = ["model", "dataset"]  # what one panel of a figure is about
POINT = [*BED, "method", "schedule", "target"]  # what one mark in a plot stands for
AFTER_CUT = "right after the cut"  # accuracy of a network that was trained already, before any fine-tuning
_COSTS = ["parameters", "MACs", "parameters removed", "MACs removed", "training seconds"]
_RUN = [
    *POINT,
    "seed",
    "epochs",
    "accuracy",
    AFTER_CUT,
    *_COSTS,
    "device",
    "precision",
    "timed on",
    "timed alike",
    "network",
    "id",
]
_MEANS = ["epochs", "drop", AFTER_CUT, *_COSTS]


def series(records: Sequence[RunRecord]) -> list[str]:
    """What each record is a point of: its method, and ``method@rule`` where its layers' widths follow another rule than
    most of the records'."""
    rules = Counter(record.config.widths for record in records if record.config.method != "dense")
    shared = max(rules, key=lambda rule: (rules[rule], rule == "uniform"), default="uniform")
    return [
        config.method if config.widths == shared or config.target == 0 else f"{config.method}@{config.widths}"
        for config in (record.config for record in records)
    ]


def runs_frame(records: Sequence[RunRecord], calibration: Calibration | None = None) -> pd.DataFrame:
    """One row a run. Accuracy, its loss against dense, and what was removed are in percent; times in seconds. Networks
    come in the order of the records.

    *training seconds* are the calibration's where it covers the run, else the record's own; *timed on* says which.

    *timed alike*: under the conditions that most of the network's runs on that data set were timed under.
    Without records the frame is empty, but has its columns.
    The accuracy is the test set's, or the validation images' for a tuning run.

    *right after the cut*: that of a network which was trained already, before it is fine-tuned; NaN of other runs.
    """
    rows = []
    for record, method in zip(records, series(records), strict=True):
        config = record.config
        accuracy = record.test_accuracy if record.test_accuracy is not None else record.val_accuracy
        rows.append(
            {
                "model": config.model,
                "dataset": config.dataset,
                "method": method,
                "schedule": config.schedule,
                "target": 100 * config.target,
                "seed": config.seed,
                "epochs": config.epochs,
                "accuracy": 100 * accuracy,
                AFTER_CUT: 100 * record.notes.get("after_cut", {}).get("val_accuracy", math.nan),
                "parameters": record.parameters,
                "MACs": record.macs,
                "parameters removed": 100 * record.parameters_removed,
                "MACs removed": 100 * record.macs_removed,
                "training seconds": seconds_of(record, calibration),
                "device": record.environment["device"],
                "precision": record.environment["precision"],
                "timed on": calibration.words if _covers(calibration, record) else record.timed_on,
                "network": record.network_sha256 or record.id,
                "id": record.id,
            }
        )
    frame = pd.DataFrame(rows, columns=_RUN).assign(drop=math.nan)
    if not frame.empty:
        usual = frame.groupby(BED)["timed on"].transform(lambda column: column.mode().iloc[0])
        frame["timed alike"] = frame["timed on"] == usual
        frame["method"] = pd.Categorical(frame["method"], ordered(frame["method"]))
        dense = frame[frame["method"] == "dense"].groupby(BED)["accuracy"].mean()
        keys = pd.MultiIndex.from_frame(frame[BED])
        frame["drop"] = dense.reindex(keys).to_numpy() - frame["accuracy"]
        order = {model: place for place, model in enumerate(dict.fromkeys(frame["model"]))}
        frame = frame.sort_values(
            [*POINT, "seed"],
            key=lambda column: column.map(order) if column.name == "model" else column,
            ignore_index=True,
        )
    return frame


def seconds_of(record: RunRecord, calibration: Calibration | None) -> float:
    """A run's training time: the calibration's where it covers the run, else what the run itself took."""
    return calibration.seconds(record) if _covers(calibration, record) else record.seconds


def _covers(calibration: Calibration | None, record: RunRecord) -> bool:
    return calibration is not None and calibration.covers(record)


def timed_alike(records: Sequence[RunRecord], calibration: Calibration | None = None) -> list[RunRecord]:
    """Those records whose seconds were measured under the conditions that most of their network's were."""
    frame = runs_frame(records, calibration)
    ids = set(frame["id"][frame["timed alike"].astype(bool)])
    return [record for record in records if record.id in ids]


_ENOUGH = 8  # degrees of freedom: with fewer at a target, all targets of the network are pooled


def noises(frame: pd.DataFrame) -> dict[tuple[str, str, float], BedNoise]:
    """How much one run's accuracy spreads, by (network, data set, target): the residual of method x seed, and by
    itself that of a method that spreads far more than the others over all the network's targets.

    Where a target has too few repetitions, and for the dense network, the common one is that of all targets together.
    """
    found = {}
    for (model, dataset), runs in frame.groupby(BED, sort=False):
        overall = bed_noise(runs, ["method", "schedule", "target"], network="network")
        for target, there in runs.groupby("target"):
            own = bed_noise(there, ["method", "schedule"], network="network", apart=overall.own)
            common = own.common if own.common.df >= _ENOUGH else overall.common
            known = {name: noise for name, noise in own.own.items() if noise.df}
            found[model, dataset, target] = BedNoise(common, dict(overall.own) | known)
    return found


def points(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each network, method, schedule and target: means over the seeds, the interval of the accuracy, n.

    The interval is 95 %, from the pooled noise (:func:`noises`), of the method's mean without what a seed does to all
    methods: it serves to compare methods, whose runs share their seeds. It is NaN where nothing was repeated.
    """
    known, rows = noises(frame), []
    for key, group in frame.groupby(POINT, observed=True, sort=False):
        names = dict(zip(POINT, key, strict=True))
        of_bed = known.get((names["model"], names["dataset"], names["target"]), BedNoise(NO_NOISE))
        noise = of_bed.of(names["method"])
        rows.append(
            names
            | {"accuracy": group["accuracy"].mean(), "interval": noise.half_width_of_mean(len(group))}
            | {"n": len(group), "timed alike": group["timed alike"].all()}
            | group[_MEANS].mean().to_dict()
        )
    return pd.DataFrame(rows, columns=[*POINT, "accuracy", "interval", "n", "timed alike", *_MEANS])


def of_shared_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Of a frame of :func:`runs_frame` the runs whose seed all methods have at that target and schedule.

    Means of different seeds would compare the seeds as well as the methods, while a study is under way. Where some
    methods have enough seeds for a verdict, it is those that the seeds are taken of, and one with fewer keeps what it
    has of them: it does not take the others' away. The dense network stays as it is, and so does a target, or a method,
    that shares no seed.
    """
    pruned = frame["method"] != "dense"
    keep = ~pruned
    for _, there in frame[pruned].groupby(["model", "dataset", "target", "schedule"], observed=True, sort=False):
        seeds = {method: set(found) for method, found in there.groupby("method", observed=True)["seed"]}
        many = [found for found in seeds.values() if len(found) >= PAIRS_FOR_A_VERDICT]
        shared = set.intersection(*(many or seeds.values()))
        for method, found in seeds.items():
            kept = found & shared or found
            keep[there.index[(there["method"] == method) & there["seed"].isin(kept)]] = True
    return frame[keep]


def phase_frame(records: Sequence[RunRecord], calibration: Calibration | None = None) -> pd.DataFrame:
    """One row for each phase of each run, with its epochs, seconds and images per second; the calibration's where it
    covers the run."""

    def seconds(record: RunRecord, phase: PhaseRecord) -> float:
        return calibration.phase_seconds(record, phase) if _covers(calibration, record) else phase.seconds

    return pd.DataFrame(
        [
            {
                "model": record.config.model,
                "dataset": record.config.dataset,
                "method": method,
                "target": 100 * record.config.target,
                "schedule": record.config.schedule,
                "seed": record.config.seed,
                "id": record.id,
                "phase": phase.name,
                "epochs": phase.epochs,
                "seconds": seconds(record, phase),
                "images/s": phase.images / seconds(record, phase) if phase.images else None,
                "shared": phase.shared,
            }
            for record, method in zip(records, series(records), strict=True)
            for phase in record.phases
        ]
    )


def phase_columns(records: Sequence[RunRecord], calibration: Calibration | None = None) -> pd.DataFrame:
    """The seconds of each phase, a column a phase, by network, data set, method, target (in percent) and schedule;
    means over the seeds. A method that lacks a phase has NaN there."""
    keys = [*BED, "method", "target", "schedule"]
    phases = phase_frame(records, calibration)
    if phases.empty:
        return pd.DataFrame(index=pd.MultiIndex.from_tuples([], names=keys))
    each = phases.groupby([*keys, "seed", "phase"], sort=False)["seconds"].sum()
    table = each.groupby([*keys, "phase"], sort=False).mean().unstack("phase")
    return table[list(dict.fromkeys(phases["phase"]))].add_suffix(" (s)")


def beds(frame: pd.DataFrame) -> list[tuple[str, str, str]]:
    """The (network, data set) pairs of a frame, in its order, each with the words for it: the network's name alone
    where the frame has one data set."""
    pairs = list(dict.fromkeys(frame[BED].itertuples(index=False, name=None)))
    several = len({dataset for _, dataset in pairs}) > 1
    return [
        (model, dataset, label_model(model) + (f", {label_dataset(dataset)}" if several else ""))
        for model, dataset in pairs
    ]


def of_bed(frame: pd.DataFrame, model: str, dataset: str) -> pd.DataFrame:
    """The rows of one network on one data set."""
    return frame[(frame["model"] == model) & (frame["dataset"] == dataset)]


def history_frame(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row for each epoch of each run, counted over all its phases from 1."""
    rows = []
    for record, method in zip(records, series(records), strict=True):
        for count, row in enumerate(record.history, start=1):
            fusion = {f"fusion {name}": value for name, value in row.get("fusion", {}).items()}
            plain = {name: value for name, value in row.items() if not isinstance(value, dict)}
            config = record.config
            rows.append(
                {
                    "model": config.model,
                    "dataset": config.dataset,
                    "method": method,
                    "target": 100 * config.target,
                    "schedule": config.schedule,
                    "seed": config.seed,
                    "id": record.id,
                }
                | plain
                | fusion
                | {"epoch": count}
            )
    return pd.DataFrame(rows)


def beside_published(records: Sequence[RunRecord], published: Path) -> pd.DataFrame:
    """Each run beside the published record of the same run: accuracy in percent, training seconds, device,
    precision.

    An id carries a hash of the run's whole configuration, so equal ids are equal configurations. What has no published
    record is left out; the table is empty if nothing has.

    Args:
        records: this machine's.
        published: the folder with the published ``runs/*.json``; need not exist.

    Raises:
        RecordError: a published record is damaged.
    """
    paths = [published / "runs" / f"{record.id}.json" for record in records]
    there = [read_record(path) for path in paths if path.exists()]
    if not there:
        return pd.DataFrame()
    both = runs_frame(records).merge(runs_frame(there), on="id", suffixes=(" here", " there"))
    both["difference"] = both["accuracy here"] - both["accuracy there"]
    pairs = [
        f"{column} {where}" for column in ("training seconds", "device", "precision") for where in ("there", "here")
    ]
    return both[["id", "accuracy there", "accuracy here", "difference", *pairs]]


def label_model(model: str) -> str:
    return network_label(model)


def label_dataset(dataset: str) -> str:
    return dataset_label(dataset)
