"""Every table the notebooks show, as a pure function of records, and the sentences that belong to them.

A page shows and stores them (:meth:`apbm_core.study.report.page.Page.table`): values are here in full, and in the units
that the columns' names are known by; how many digits are shown is said in :data:`FORMATS`.
"""

from collections.abc import Sequence

import pandas as pd
from pandas.api.types import is_numeric_dtype
from pandas.io.formats.style import Styler

from apbm_core.study.grid.calibration import Calibration
from apbm_core.study.grid.grid import Study
from apbm_core.study.methods import label
from apbm_core.study.records import RunConfig, RunRecord
from apbm_core.study.report.claims import claims_frame
from apbm_core.study.report.frames import (
    AFTER_CUT,
    BED,
    label_dataset,
    label_model,
    of_bed,
    phase_columns,
    phase_frame,
    points,
    runs_frame,
)
from apbm_core.study.report.rivals import against_rivals, cell_style, matrix, over_targets, power_notes

FORMATS = {
    "target": "{:.4g}", "accuracy": "{:.2f}", "interval": "± {:.2f}", "drop": "{:.2f}", "difference": "{:+.2f}",
    AFTER_CUT: "{:.2f}",
    "parameters": "{:,.0f}", "MACs": "{:,.0f}", "parameters removed": "{:.2f}", "MACs removed": "{:.2f}",
    "training seconds": "{:.0f}", "fastest seconds": "{:.0f}", "seconds": "{:.1f}", "images/s": "{:,.0f}",
    "epochs": "{:.0f}", "time ratio": "{:.2f}", "MACs ratio": "{:.2f}", "kB": "{:,.0f}",
    "difference of logits": "{:.0e}",
    "same class": "{:.2f}", "ms for 1": "{:.2f}", "p95 for 1": "{:.2f}", "ms for 64": "{:.1f}",
    "accuracy there": "{:.2f}", "accuracy here": "{:.2f}", "training seconds there": "{:.0f}",
    "training seconds here": "{:.0f}", "interval of difference": "± {:.2f}",
    "p": "{:.4f}", "p (Holm)": "{:.3f}",
}  # fmt: skip
"""How many digits of a column are shown; seconds of a phase, ``... (s)``, are shown whole."""
_PERCENT = {
    "target",
    AFTER_CUT,
    "same class",
    "accuracy",
    "accuracy there",
    "accuracy here",
    "parameters removed",
    "MACs removed",
}


def styled(table: pd.DataFrame, name: str, caption: str = "") -> Styler:
    """The table as it is shown: digits by :data:`FORMATS`, units in the heads, an id that is the same every time."""
    formats = {key: value for key, value in FORMATS.items() if key in table}
    formats |= {column: "{:.0f}" for column in table if column.endswith(" (s)")}
    heads = [f"{column} (%)" if column in _PERCENT else column for column in table.columns]
    styler = table.style.format(formats, na_rep="").hide(axis="index").relabel_index(heads, axis="columns")
    numbers = {column: "n" if is_numeric_dtype(table[column]) else "" for column in table}
    styler = styler.set_td_classes(pd.DataFrame(numbers, index=table.index, columns=table.columns))
    if "rival" in table and set(table.columns) - {"rival"} and table.columns[0] == "rival":  # a matrix: see matrices
        styler = styler.map(cell_style, subset=list(table.columns[1:]))
    return (styler.set_caption(caption) if caption else styler).set_uuid(name)


def summary(records: Sequence[RunRecord], calibration: Calibration | None = None) -> pd.DataFrame:
    """One row for each network, method and target: means over the seeds."""
    columns = [*BED, "method", "target", "schedule", "epochs", "accuracy", "interval", "n", "parameters", "MACs",
               "parameters removed", "training seconds"]  # fmt: skip
    return _labelled(points(runs_frame(records, calibration))[columns])


def targets(
    records: Sequence[RunRecord], by: str = "params", calibration: Calibration | None = None
) -> dict[str, tuple[pd.DataFrame, str]]:
    """For each network, data set and target all methods and dense, the best accuracy first, with the time by phase; by
    the table's name (``targets_vgg16_cifar10_92.74``), each with its caption.

    A column *timed alike* is there only if some runs were timed under other conditions than most; one of the accuracy
    right after the cut, only where networks that were trained already were cut.
    """
    phases = phase_columns(records, calibration)
    table = points(runs_frame(records, calibration)).join(phases, on=phases.index.names)
    columns = ["method", "schedule", "epochs", "accuracy", "interval", "n", "drop", "parameters", "MACs",
               "parameters removed", "MACs removed", "training seconds"]  # fmt: skip
    found = {}
    for (model, dataset, target), group in table[table["target"] > 0].groupby([*BED, "target"], sort=False):
        dense = of_bed(table, model, dataset)
        rows = pd.concat([dense[dense["target"] == 0], group]).sort_values("accuracy", ascending=False)
        others = [] if rows["timed alike"].all() else ["timed alike"]
        cut = [] if rows[AFTER_CUT].isna().all() else [AFTER_CUT]
        rows = rows[[*columns, *cut, *others, *rows[phases.columns].dropna(axis="columns", how="all")]]
        caption = f"{label_model(model)}, {label_dataset(dataset)}, {target:.4g} % of the {by} to remove"
        found[f"targets_{model}_{dataset}_{target:.4g}"] = (_labelled(rows), caption)
    return found


def rivals(records: Sequence[RunRecord], calibration: Calibration | None = None) -> pd.DataFrame:
    """APBM's accuracy minus each rival's, with interval and verdict."""
    return _labelled(against_rivals(runs_frame(records, calibration)))


def matrices(
    records: Sequence[RunRecord], calibration: Calibration | None = None
) -> dict[str, tuple[pd.DataFrame, str]]:
    """APBM against each rival at each target, a row a rival: difference, interval, verdict, time ratio; by the table's
    name (``rivals_vgg16_92.74``), each with a caption that says what difference the design can see."""
    frame = runs_frame(records, calibration)
    table, found = against_rivals(frame), {}
    notes = dict(power_notes(frame, table))
    for (model, dataset, target), rows in table.groupby([*BED, "target"], sort=False):
        place = f"{label_model(model)}, {label_dataset(dataset)}, {target:.4g} % removed"
        caption = f"{place}. {notes.get((model, dataset, target), '')}".strip()
        found[f"rivals_{model}_{dataset}_{target:.4g}"] = (matrix(rows), caption)
    return found


def over_all_targets(records: Sequence[RunRecord]) -> pd.DataFrame:
    """APBM's accuracy minus each rival's, the mean over all targets that both have."""
    return _labelled(over_targets(runs_frame(records)))


def phases(records: Sequence[RunRecord], calibration: Calibration | None = None) -> pd.DataFrame:
    """Epochs, seconds and images per second of each phase, averaged over the seeds."""
    table = phase_frame(records, calibration)
    if len(table):
        keys = [*BED, "method", "target", "schedule", "phase", "shared"]
        table = table.groupby(keys, sort=False)[["epochs", "seconds", "images/s"]].mean().reset_index()
    return _labelled(table)


def notes(records: Sequence[RunRecord]) -> pd.DataFrame:
    """What the methods put into their records on the way."""
    rows = [
        {"run": record.id, "note": key, "value": _brief(value)}
        for record in records
        for key, value in record.notes.items()
    ]
    return pd.DataFrame(rows, columns=["run", "note", "value"])


def claims(records: Sequence[RunRecord], calibration: Calibration | None = None) -> pd.DataFrame:
    """The abstract's claims, what was measured, and the verdicts."""
    return _labelled(claims_frame(records, calibration))


def deployment(rows: Sequence[dict]) -> pd.DataFrame:
    """One row for each method and file format: size, agreement and latency (deployment.measure_files)."""
    return _labelled(pd.DataFrame(rows))


def provenance(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row a run: its record, when, where and from which source it was made."""
    return pd.DataFrame(
        [
            {
                "record": f"runs/{record.id}.json",
                "finished": record.finished,
                "commit": record.environment["commit"][:12],
                "device": record.environment["device"],
                "threads": record.environment["threads"],
                "side by side": record.environment["side_by_side"],
                "precision": record.environment["precision"],
            }
            for record in records
        ]
    )


def timing_conditions(records: Sequence[RunRecord], calibration: Calibration | None = None) -> list[str]:
    """Sentences: which seconds are shown. A calibration's, where it covers a run; else the run's own, under which
    conditions they were measured, which of them under others, and which were disturbed.

    A load average that is more than one above what these runs make themselves means that something else was running as
    well.
    """
    conditions: dict[str, list[str]] = {}
    disturbed, said, everything = [], [], len(records)
    covered = [record for record in records if calibration is not None and calibration.covers(record)]
    if covered:
        spread = 100 * max(calibration.spread(record) for record in covered)
        said.append(
            f"Seconds of {len(covered)} of {everything} runs are calibrated: measured apart, alone, on "
            f"{calibration.machine} ({calibration.made[:10]}), times the epochs; its rounds spread by sd {spread:.1f} "
            "% at most."
        )
        records = [record for record in records if record not in covered]
    for record in records:
        facts = record.environment
        conditions.setdefault(record.timed_on, []).append(record.id)
        if facts.get("load") is not None and facts["load"] > 1 + facts["threads"] * facts["side_by_side"]:
            disturbed.append(f"{record.id} (load {facts['load']})")
    several = sorted(conditions.items(), key=lambda item: -len(item[1]))
    for place, (words, runs) in enumerate(several):
        named = f": {', '.join(runs)}; compare no seconds with the others'" if place else ""
        said.append(f"{len(runs)} of {everything} runs on {words}{named}.")
    if disturbed:
        ids = ", ".join(disturbed)
        said.append(f"Something else was running when these ended, so their seconds are too many: {ids}.")
    return said


def equal_time(study: Study) -> list[str]:
    """Sentences: which runs stand for their own equal-time runs, because the time that is given holds as many epochs,
    and which have none, because that time was measured under other conditions."""
    said = [
        f"{_run(config)}: L1's time holds {config.epochs} epochs, as at equal epochs, so that run answers both "
        "questions."
        for config in study.equal_time_stand_ins()
    ]
    return said + [
        f"{_run(record.config)}: no equal-time run, for its seconds cannot be compared with L1's. It was timed on "
        f"{record.timed_on}; L1 on {reference.timed_on}. Delete one of the two records and run it beside the other."
        for record, reference in study.without_equal_time()
    ]


def _run(config: RunConfig) -> str:
    return f"{label_model(config.model)}, {100 * config.target:.4g} %, {label(config.method)}, seed {config.seed}"


def _labelled(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(method=[label(method) for method in table["method"]]) if "method" in table else table


def _brief(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."
