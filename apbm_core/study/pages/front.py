"""The front page of a results folder: one file that needs nothing but itself, made from the records.

It opens with what was found, readable without scripts; then the runs as a chart and a table, the ablation, one layer of
a trained network, the courses of training, and where everything comes from.
"""

import html
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from apbm_core.errors import RecordError
from apbm_core.files import sha256, write_atomically
from apbm_core.study.methods import label
from apbm_core.study.pages import drawings, explorer, findings
from apbm_core.study.pages.html_page import TEMPLATES, style, text_page
from apbm_core.study.pages.index import about
from apbm_core.study.records import OWN, TRAINED, RunRecord, canonical_json, read_record
from apbm_core.study.report.frames import label_dataset, label_model, series
from apbm_core.study.report.style import colour

_OWN = Path(OWN).name
_COLUMNS = ["key", "id", "profile", "method", "network", "data", "target", "schedule", "widths", "seed", "epochs",
            "accuracy", "judged", "interval", "repeats", "removed", "macs", "minutes", "machine", "colour",
            "course"]  # fmt: skip
_WORDS = ("profile", "method", "network", "data", "target", "schedule", "widths", "judged", "machine", "colour")


def write(results: Path) -> Path:
    """Write index.html into ``results``. Its README.md is written by hand.

    Returns:
        The path of index.html.
    """
    return write_atomically(results / "index.html", page(results))


def page(results: Path) -> str:
    """The front page of the records in ``results``, as HTML. Without a record it says so, and has no charts."""
    records = read_all(results)
    if not any(records.values()):
        names = [path.parent.name for path in sorted(results.glob("*/index.html")) if path.parent.name != _OWN]
        lines = [f"- [{name}]({name}/index.html)" for name in names]
        return text_page("Results", "\n".join(["# Results", "", "There is no record here yet.", "", *lines]))
    first = findings.headline(records) or next(iter(records))
    beds = {"VGG16, 92.74 % removed": "vgg16", "ResNet20, 75 % removed": "resnet20"}
    pairs = {words: findings.ingredients(results, bed) for words, bed in beds.items()}
    headline, small = pairs.values()
    forests = "".join(_figure(*drawings.forest(table, words)) for words, table in pairs.items())
    parts = {
        "style": f"{style()} {explorer.asset('front.css')}",
        "findings": "".join(f"<li>{said}</li>" for said in findings.sentences(records, small, headline)),
        "drawing": _first_figure(records, first),
        "forest": _section("ablation", "The ablation: one ingredient at a time", forests),
        "layer": _section("layer", "One layer, under your hands", _layers(results)),
        "provenance": _provenance(records),
        "pages": "".join(
            f'<a href="{name}/index.html">{name}</a>' for name in records if (results / name / "index.html").exists()
        ),
        "runs": _json(_packed(_rows(records)) | {"first": findings.curves(records) or first}),
        "scripts": f"{explorer.scripts()}<script>{explorer.asset('front.js')}</script>",
    }
    names = {"findings": "Findings", "runs-section": "Runs", "ablation": "Ablation", "layer": "One layer",
             "courses": "Courses", "provenance": "Provenance"}  # fmt: skip
    absent = {name for name in ("ablation", "layer") if not parts[{"ablation": "forest"}.get(name, name)]}
    parts["sections"] = "".join(f'<a href="#{name}">{words}</a>' for name, words in names.items() if name not in absent)
    return re.sub(r"@([a-z]+)@", lambda found: parts[found[1]], (TEMPLATES / "front.html").read_text(encoding="utf-8"))


def _first_figure(records: Mapping[str, Sequence[RunRecord]], first: str) -> str:
    """The curves, where there are any; else the methods' accuracies in the profile that was trained longest."""
    if profile := findings.curves(records):
        beds = findings.curve_points(records[profile])
        return "".join(_curve(table, bed) for bed, table in beds)
    return _figure(*drawings.drawing(records[first]))


def _curve(table: pd.DataFrame, bed: tuple[str, str]) -> str:
    """A curve with its names beside it and one with them below: the page shows the one that it has room for."""
    beside, words = drawings.curve(table, *bed)
    below, _ = drawings.curve(table, *bed, narrow=True)
    both = f'<div class="drawn wide">{beside}</div><div class="drawn narrow">{below}</div>'
    return f"<figure>{both}<figcaption>{html.escape(words)}.</figcaption></figure>"


def _figure(picture: str, words: str) -> str:
    if not picture:
        return ""
    return f'<figure><div class="drawn">{picture}</div><figcaption>{html.escape(words)}.</figcaption></figure>'


def _section(name: str, heading: str, content: str) -> str:
    return f'<section id="{name}"><h2>{heading}</h2>{content}</section>' if content else ""


def read_all(results: Path) -> dict[str, list[RunRecord]]:
    """The readable records of each folder in ``results``, by the folder's name; the reader's own are left out."""
    found: dict[str, list[RunRecord]] = {}
    for folder in sorted(path.parent for path in results.glob("*/runs") if path.is_dir()):
        if folder.name == _OWN:
            continue
        for path in sorted((folder / "runs").glob("*.json")):
            try:
                found.setdefault(folder.name, []).append(read_record(path))
            except RecordError:
                continue  # named on the profile's own page
    return found


def _rows(records: Mapping[str, Sequence[RunRecord]]) -> list[list[Any]]:
    rows = []
    for profile, runs in records.items():
        groups: dict[str, list[float]] = defaultdict(list)
        for record in runs:
            groups[_repeated(record)].append(_accuracy(record))
        for record, method in zip(runs, series(runs), strict=True):
            config, values = record.config, groups[_repeated(record)]
            rows.append(
                [
                    len(rows),
                    record.id,
                    profile,
                    label(method),
                    label_model(config.model),
                    label_dataset(config.dataset)
                    + (f", {config.train_subset:,} images" if config.train_subset else "")
                    + (f", from a network of {config.start_epochs} epochs" if config.start_epochs else ""),
                    "dense" if config.target == 0 else f"{100 * config.target:.4g} %",
                    config.schedule,
                    config.widths,
                    config.seed,
                    config.epochs,
                    round(_accuracy(record), 3),
                    "test images" if record.test_accuracy is not None else "held-out images",
                    _half_width(values),
                    len(values),
                    round(100 * record.parameters_removed, 3),
                    round(100 * record.macs_removed, 3),
                    round(record.seconds / 60, 3),
                    record.timed_on,
                    drawings.on_paper(colour(method)),
                    _course(record),
                ]
            )
    return rows


def _packed(rows: list[list[Any]]) -> dict[str, Any]:
    """The rows with their words as places in a list of each column's: front.js puts them back."""
    words = {name: list(dict.fromkeys(row[_COLUMNS.index(name)] for row in rows)) for name in _WORDS}
    places = {_COLUMNS.index(name): {word: i for i, word in enumerate(each)} for name, each in words.items()}
    packed = [[places[i][cell] if i in places else cell for i, cell in enumerate(row)] for row in rows]
    return {"columns": _COLUMNS, "words": words, "rows": packed}


def _accuracy(record: RunRecord) -> float:
    return 100 * (record.test_accuracy if record.test_accuracy is not None else record.val_accuracy)


def _repeated(record: RunRecord) -> str:
    """What a run shares with its repetitions: everything but the seed."""
    return sha256(canonical_json(record.config.model_dump(mode="json", exclude={"seed"})).encode())


def _half_width(values: Sequence[float]) -> float | None:
    """Of Student's 95 % interval of the mean; None for one value."""
    if len(values) < 2:
        return None
    return round(float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)), 3)


def _course(record: RunRecord) -> dict[str, list[float | None]]:
    """By epoch, over all phases, in percent; what a method does not have is left out."""
    course = {"train_accuracy": [_percent(row["train_accuracy"]) for row in record.history]}
    for name in ("own_share", "churn"):
        values = [_percent(row.get("fusion", {}).get(name)) for row in record.history]
        if any(value is not None for value in values):
            course[name] = values
    return course


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 1)


def _layers(results: Path) -> str:
    """The explorer on the trained network that is kept here; empty where none is."""
    if not any((results / TRAINED / "networks").glob("*.safetensors")):
        return ""
    moments, words = explorer.network_to_explore(results=results)
    words += (
        " Move tau and the number of kept filters: who is kept, whom each filter resembles, and how much of a fused "
        "filter is the kept one itself. At initialisation all filters are about equally far apart, so there is little "
        "to score."
    )
    return explorer.box(explorer.network_layers(moments, explorer.explorable(moments["trained"])), words)


def _provenance(records: Mapping[str, Sequence[RunRecord]]) -> str:
    return "".join(
        f"<p><b>{html.escape(name)}</b>: {html.escape(about(runs))}</p>" for name, runs in records.items() if runs
    )


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
