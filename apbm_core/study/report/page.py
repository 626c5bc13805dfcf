"""What the notebooks call between their figures: opening the study, and tables that are shown and stored.

Every table is written to ``results/<profile>/tables/<name>.csv`` as well.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from IPython.display import HTML, display
from pandas.io.formats.style import Styler

from apbm_core.files import write_atomically
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.grid.run import environment
from apbm_core.study.methods import label
from apbm_core.study.records import PUBLISHED, RunConfig, RunRecord
from apbm_core.study.report.claims import claims_frame
from apbm_core.study.report.frames import (
    against_rivals,
    beside_published,
    label_model,
    phase_columns,
    phase_frame,
    points,
    runs_frame,
)

_FORMATS = {
    "target": "{:.4g}", "accuracy": "{:.2f}", "interval": "± {:.2f}", "drop": "{:.2f}", "difference": "{:+.2f}",
    "parameters": "{:,.0f}", "MACs": "{:,.0f}", "parameters removed": "{:.2f}", "MACs removed": "{:.2f}",
    "training seconds": "{:.0f}", "fastest seconds": "{:.0f}", "seconds": "{:.1f}", "images/s": "{:,.0f}",
    "epochs": "{:.0f}", "time ratio": "{:.2f}", "MACs ratio": "{:.2f}", "kB": "{:,.0f}",
    "difference of logits": "{:.0e}",
    "same class": "{:.2f}", "ms for 1": "{:.2f}", "p95 for 1": "{:.2f}", "ms for 64": "{:.1f}",
    "accuracy there": "{:.2f}", "accuracy here": "{:.2f}", "training seconds there": "{:.0f}",
    "training seconds here": "{:.0f}", "interval of difference": "± {:.2f}",
}  # fmt: skip
_PERCENT = {"target", "same class", "accuracy", "accuracy there", "accuracy here", "parameters removed", "MACs removed"}


def open_study(profile: str, results: str, shows_runs: bool = True, **parameters) -> Study:
    """The study of a notebook's parameters, all of them checked.

    Args:
        profile, results: everything goes to the folder ``profile`` in ``results``, see :func:`from_root`.
        shows_runs: False for a page of examples, which is complete without any record.

    Raises:
        ConfigError: naming each value that is unknown, of the wrong type or impossible.
    """
    return Study(StudyParameters.parse(parameters), from_root(results) / profile, shows_runs=shows_runs)


def from_root(folder: str | Path) -> Path:
    """A folder of the repository, whose root is the nearest folder that holds ``notebooks/profiles``.

    `make` starts a notebook there and JupyterLab where the notebook lies, in ``notebooks/`` or ``results/<profile>/``;
    a relative folder means the same in all of them. Outside of the repository it is taken as it is.
    """
    for depth, place in enumerate((Path.cwd(), *Path.cwd().parents)):
        if (place / "notebooks" / "profiles").is_dir():
            return Path(*[".."] * depth, folder)
    return Path(folder)


def describe(study: Study) -> None:
    """Show the versions, the machine and the data; the banner, if there is one; and which runs lack a record."""
    facts = environment(study.device)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"Python {facts['python']}, {versions}",
        f"{facts['device']}, {facts['threads']} threads; source {facts['commit'][:12]}",
        study.source,
    ]
    if study.banner:
        display(HTML(f'<p style="color:#B00020;font-size:1.4em;font-weight:bold">{study.banner}</p>'))
    if study.missing:
        lines.append(f"not recorded yet: {', '.join(config.id for config in study.missing)}")
    print("\n".join(filter(None, lines)))


def summary_table(study: Study, records: Sequence[RunRecord], name: str) -> Styler:
    """One row for each network, method and target: means over the seeds."""
    columns = ["model", "method", "target", "schedule", "epochs", "accuracy", "interval", "n", "parameters", "MACs",
               "parameters removed", "training seconds"]  # fmt: skip
    if not records:
        print("None of the methods that were asked for belongs here.")
    return _shown(study, points(runs_frame(records))[columns], name)


def timing_conditions(records: Sequence[RunRecord]) -> None:
    """Say under which conditions the runs were timed, which of them were timed under others, and which were disturbed.

    A load average that is more than one above what these runs make themselves means that something else was running as
    well.
    """
    conditions: dict[str, list[str]] = {}
    disturbed = []
    for record in records:
        facts = record.environment
        conditions.setdefault(record.timed_on, []).append(record.id)
        if facts.get("load") is not None and facts["load"] > 1 + facts["threads"] * facts["side_by_side"]:
            disturbed.append(f"{record.id} (load {facts['load']})")
    several = sorted(conditions.items(), key=lambda item: -len(item[1]))
    for place, (words, runs) in enumerate(several):
        named = f": {', '.join(runs)}; compare no seconds with the others'" if place else ""
        print(f"{len(runs)} of {len(records)} runs on {words}{named}.")
    if disturbed:
        print(f"Something else was running when these ended, so their seconds are too many: {', '.join(disturbed)}.")


def target_tables(study: Study, records: Sequence[RunRecord], name: str) -> None:
    """For each network and target all methods and dense, the best accuracy first, with the time by phase.

    A column *timed alike* is there only if some runs were timed under other conditions than most.
    """
    phases = phase_columns(records)
    table = points(runs_frame(records)).join(phases, on=phases.index.names)
    columns = ["method", "schedule", "epochs", "accuracy", "interval", "n", "drop", "parameters", "MACs",
               "parameters removed", "MACs removed", "training seconds"]  # fmt: skip
    for (model, target), group in table[table["target"] > 0].groupby(["model", "target"], sort=False):
        dense = table[(table["model"] == model) & (table["target"] == 0)]
        rows = pd.concat([dense, group]).sort_values("accuracy", ascending=False)
        if not rows["timed alike"].all():
            columns = [*columns, "timed alike"]
        rows = rows[[*columns, *rows[phases.columns].dropna(axis="columns", how="all")]]
        words = f"{label_model(model)}, {target:.4g} % of the {study.parameters.by} to remove"
        display(_shown(study, rows, f"{name}_{model}_{target:.4g}").set_caption(words))


def rivals_table(study: Study, records: Sequence[RunRecord], name: str) -> Styler:
    """APBM's accuracy minus each rival's, with interval and verdict."""
    return _shown(study, against_rivals(runs_frame(records)), name)


def equal_time_note(study: Study) -> None:
    """Say which runs stand for their own equal-time runs, because the time that is given holds as many epochs, and
    which have none, because that time was measured under other conditions."""
    for config in study.equal_time_stand_ins():
        print(
            f"{_run(config)}: L1's time holds {config.epochs} epochs, as at equal epochs, so that run answers both "
            "questions."
        )
    for record, reference in study.without_equal_time():
        print(
            f"{_run(record.config)}: no equal-time run, for its seconds cannot be compared with L1's. It was timed on "
            f"{record.timed_on}; L1 on {reference.timed_on}. Delete one of the two records and run it beside the other."
        )


def _run(config: RunConfig) -> str:
    return f"{label_model(config.model)}, {100 * config.target:.4g} %, {label(config.method)}, seed {config.seed}"


def phase_table(study: Study, records: Sequence[RunRecord], name: str) -> Styler:
    """Epochs, seconds and images per second of each phase, averaged over the seeds."""
    table = phase_frame(records)
    if len(table):
        keys = ["model", "method", "target", "schedule", "phase", "shared"]
        table = table.groupby(keys, sort=False)[["epochs", "seconds", "images/s"]].mean().reset_index()
    return _shown(study, table, name)


def notes_table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """What the methods put into their records on the way."""
    rows = [
        {"run": record.id, "note": key, "value": _brief(value)}
        for record in records
        for key, value in record.notes.items()
    ]
    return pd.DataFrame(rows, columns=["run", "note", "value"])


def claims_table(study: Study, records: Sequence[RunRecord], name: str) -> Styler:
    """The abstract's claims, what was measured, and the verdicts."""
    return _shown(study, claims_frame(records), name)


def published_table(study: Study, records: Sequence[RunRecord], name: str) -> Styler | None:
    """Each run beside its published record; a sentence and None where there is nothing to set beside it."""
    published = from_root(PUBLISHED) / study.results.path.name
    if study.results.path.resolve() == published.resolve():
        print("These are the published records themselves.")
        return None
    table = beside_published(records, published)
    if table.empty:
        print(f"{published.as_posix()} holds no record of the same run.")
        return None
    return _shown(study, table, name)


def deployment_table(study: Study, rows: Sequence[dict], name: str, caption: str) -> Styler:
    """One row for each method and file format: size, agreement and latency (deploy.measure_files)."""
    return _shown(study, pd.DataFrame(rows), name).set_caption(caption)


def ablation_table(table: pd.DataFrame, folder: Path, name: str) -> Styler:
    """A table of :func:`apbm_core.study.ablation.design.table` or ``ingredients``, stored under ``folder`` as well."""
    return _styled(table.drop(columns="each", errors="ignore"), folder, name)


def ablation_provenance(records: Mapping[str, Mapping[tuple[str, int], RunRecord]]) -> pd.DataFrame:
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


def provenance_table(study: Study, records: Sequence[RunRecord]) -> pd.DataFrame:
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


def _shown(study: Study, table: pd.DataFrame, name: str) -> Styler:
    return _styled(table, study.results.path, name)


def _styled(table: pd.DataFrame, folder: Path, name: str) -> Styler:
    table = table.copy()
    if "method" in table:
        table["method"] = [label(method) for method in table["method"]]
    write_atomically(folder / "tables" / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
    formats = {key: value for key, value in _FORMATS.items() if key in table}
    formats |= {column: "{:.0f}" for column in table if column.endswith(" (s)")}
    styler = table.style.format(formats, na_rep="")
    return (
        styler.hide(axis="index")
        .relabel_index([f"{column} (%)" if column in _PERCENT else column for column in table.columns], axis="columns")
        .set_uuid(name)
    )  # a fixed id: equal tables render to equal pages


def _brief(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."
