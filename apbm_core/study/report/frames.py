"""Records as tables: one row a run, means with confidence intervals, and APBM against each rival."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy import stats

from apbm_core.study.methods import label, ordered
from apbm_core.study.networks.models import network_label
from apbm_core.study.records import RunRecord, read_record

CONFIDENCE = 0.95
PAIRS_FOR_A_VERDICT = 3  # methods.md 6
DATASET_LABELS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "scikit-learn digits"}
POINT = ["model", "dataset", "method", "schedule", "target"]  # what one mark in a plot stands for
_COSTS = ["parameters", "MACs", "parameters removed", "MACs removed", "training seconds"]
_RUN = [*POINT, "seed", "epochs", "accuracy", *_COSTS, "device", "precision", "timed on", "timed alike", "id"]
_MEANS = ["epochs", "drop", *_COSTS]


def series(records: Sequence[RunRecord]) -> list[str]:
    """What each record is a point of: its method, and ``method@rule`` where its layers' widths follow another rule than
    most of the records'."""
    rules = Counter(record.config.widths for record in records if record.config.method != "dense")
    shared = max(rules, key=lambda rule: (rules[rule], rule == "uniform"), default="uniform")
    return [
        config.method if config.widths == shared or config.target == 0 else f"{config.method}@{config.widths}"
        for config in (record.config for record in records)
    ]


def runs_frame(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row a run. Accuracy, its loss against dense, and what was removed are in percent; times in seconds. Networks
    come in the order of the records.

    *timed alike*: under the conditions that most of the network's runs were timed under.
    Without records the frame is empty, but has its columns.
    The accuracy is the test set's, or the validation images' for a tuning run.
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
                "parameters": record.parameters,
                "MACs": record.macs,
                "parameters removed": 100 * record.parameters_removed,
                "MACs removed": 100 * record.macs_removed,
                "training seconds": record.seconds,
                "device": record.environment["device"],
                "precision": record.environment["precision"],
                "timed on": record.timed_on,
                "id": record.id,
            }
        )
    frame = pd.DataFrame(rows, columns=_RUN).assign(drop=math.nan)
    if not frame.empty:
        usual = frame.groupby("model")["timed on"].agg(lambda column: column.mode().iloc[0])
        frame["timed alike"] = frame["timed on"] == frame["model"].map(usual)
        frame["method"] = pd.Categorical(frame["method"], ordered(frame["method"]))
        dense = frame[frame["method"] == "dense"].groupby(["model", "dataset"])["accuracy"].mean()
        keys = pd.MultiIndex.from_frame(frame[["model", "dataset"]])
        frame["drop"] = dense.reindex(keys).to_numpy() - frame["accuracy"]
        order = {model: place for place, model in enumerate(dict.fromkeys(frame["model"]))}
        frame = frame.sort_values(
            [*POINT, "seed"],
            key=lambda column: column.map(order) if column.name == "model" else column,
            ignore_index=True,
        )
    return frame


def timed_alike(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those records whose seconds were measured under the conditions that most of their network's were."""
    frame = runs_frame(records)
    ids = set(frame["id"][frame["timed alike"].astype(bool)])
    return [record for record in records if record.id in ids]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half-width of its 95 % confidence interval (Student's t); the latter is NaN for one value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)


def points(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each network, method, schedule and target: means over the seeds, the interval of the accuracy, n."""
    rows = []
    for key, group in frame.groupby(POINT, observed=True, sort=False):
        mean, half_width = mean_and_interval(group["accuracy"].tolist())
        rows.append(
            dict(zip(POINT, key, strict=True))
            | {"accuracy": mean, "interval": half_width, "n": len(group), "timed alike": group["timed alike"].all()}
            | group[_MEANS].mean().to_dict()
        )
    return pd.DataFrame(rows, columns=[*POINT, "accuracy", "interval", "n", "timed alike", *_MEANS])


def against_rivals(frame: pd.DataFrame, method: str = "apbm") -> pd.DataFrame:
    """``method``'s accuracy minus each rival's, at the same network and target, paired by seed; in points.

    At equal epochs all have the same schedule. ``method``'s equal-time runs are set beside the other equal-time runs,
    and beside the equal-epochs runs of rivals that have none: those the time was measured by. With widths of its own
    (``method@rule``) it is set beside all, too.

    The time ratio is of the pairs that were timed under equal conditions, and NaN without any.
    """
    rows = []
    keys = ["model", "dataset", "target"]
    for key, group in frame[frame["method"] != "dense"].groupby(keys, observed=True, sort=False):
        for schedule in group["schedule"].unique():
            same = group[group["schedule"] == schedule]
            ours = [name for name in ordered(same["method"]) if name.partition("@")[0] == method]
            others = group[(group["schedule"] == "equal") & ~group["method"].isin(same["method"])]
            beside = pd.concat([same, others]) if schedule == "equal-time" else same
            for place, own in enumerate(ours):
                for rival in ordered(beside["method"]):
                    if rival not in ours[: place + 1]:
                        row = _pair(same[same["method"] == own], beside[beside["method"] == rival])
                        rows += [dict(zip(keys, key, strict=True)) | row] if row else []
    return pd.DataFrame(rows)


def _pair(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict | None:
    """One row of :func:`against_rivals`; None if no seed is in both."""
    both = ours.merge(theirs, on="seed", suffixes=("", " of rival"))
    if both.empty:
        return None
    mean, half_width = mean_and_interval((both["accuracy"] - both["accuracy of rival"]).tolist())
    timed = both[both["timed on"] == both["timed on of rival"]]
    return {
        "schedule": both["schedule"].iloc[0],
        "method": both["method"].iloc[0],
        "rival": label(both["method of rival"].iloc[0]),
        "rival's schedule": both["schedule of rival"].iloc[0],
        "difference": mean,
        "interval": half_width,
        "n": len(both),
        "time ratio": (timed["training seconds"] / timed["training seconds of rival"]).mean(),
        "MACs ratio": (both["MACs"] / both["MACs of rival"]).mean(),
        "verdict": verdict(mean, half_width, len(both)),
    }


def verdict(difference: float, half_width: float, n: int) -> str:
    """What n paired differences allow one to say."""
    if n < 2:
        return f"{'above' if difference > 0 else 'below'} by one seed: no interval"
    if abs(difference) <= half_width:
        return "no difference shown"
    return "above" if difference > 0 else "below"


def phase_frame(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row for each phase of each run, with its epochs, seconds and images per second."""
    return pd.DataFrame(
        [
            {
                "model": record.config.model,
                "method": method,
                "target": 100 * record.config.target,
                "schedule": record.config.schedule,
                "seed": record.config.seed,
                "id": record.id,
                "phase": phase.name,
                "epochs": phase.epochs,
                "seconds": phase.seconds,
                "images/s": phase.images_per_second,
                "shared": phase.shared,
            }
            for record, method in zip(records, series(records), strict=True)
            for phase in record.phases
        ]
    )


def phase_columns(records: Sequence[RunRecord]) -> pd.DataFrame:
    """The seconds of each phase, a column a phase, by network, method, target (in percent) and schedule; means over the
    seeds. A method that lacks a phase has NaN there."""
    keys = ["model", "method", "target", "schedule"]
    phases = phase_frame(records)
    if phases.empty:
        return pd.DataFrame(index=pd.MultiIndex.from_tuples([], names=keys))
    each = phases.groupby([*keys, "seed", "phase"], sort=False)["seconds"].sum()
    table = each.groupby([*keys, "phase"], sort=False).mean().unstack("phase")
    return table[list(dict.fromkeys(phases["phase"]))].add_suffix(" (s)")


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
    return DATASET_LABELS.get(dataset, dataset)
