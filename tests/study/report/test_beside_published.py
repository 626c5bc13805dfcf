"""A reproduction trains anew in results/own, whatever is published, and sets its runs beside the published ones."""

import json
import subprocess
from pathlib import Path

import kill_study
import nbformat
import pandas as pd
import pytest
from kill_study import GRID, outcome

from apbm_core.errors import RecordError
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.run import execute
from apbm_core.study.pages import runner
from apbm_core.study.records import ResultsFolder, read_record
from apbm_core.study.report import page
from apbm_core.study.report.frames import beside_published

STUDY_CELL = """
from apbm_core.study.report import page
opened = page.open_page("01_grid", profile, results, changes)
records = opened.run()
"""
TABLE_CELL = "opened.beside_published(records)"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository whose profile `tiny` has been run into results/, where its record is published."""
    root = kill_study.make_repository(tmp_path_factory.mktemp("repository") / "root")
    (root / "notebooks" / "02_table.ipynb").unlink()
    values = GRID | {"methods": ["apbm"], "workers": 1, "fallback": None}
    (root / "notebooks" / "profiles" / "tiny.yaml").write_text(json.dumps(values))
    kill_study.write_notebook(root, "01_grid", kill_study.ONE_THREAD, STUDY_CELL, TABLE_CELL)
    assert runner.main(["run", "--profile", "tiny", "--results", "results"], root) == 0
    return root


def said_by_the_table(page: Path) -> str:
    outputs = nbformat.read(page, as_version=4).cells[-1].outputs
    return "".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs)


@pytest.mark.slow
def test_published_records_are_set_beside_nothing(root):
    assert "These are the published records themselves." in said_by_the_table(root / "results/tiny/01_grid.ipynb")
    assert not (root / "results/tiny/tables").exists()


@pytest.mark.slow
def test_by_default_every_published_run_is_trained_again_and_set_beside(root, capsys):
    before = {path: path.read_bytes() for path in (root / "results/tiny").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert runner.main(["run", "--profile", "tiny"], root) == 0
    assert {path: path.read_bytes() for path in (root / "results/tiny").rglob("*") if path.is_file()} == before

    (there,) = (root / "results/tiny/runs").glob("*.json")
    here = root / "results/own/tiny/runs" / there.name
    there, here = read_record(there), read_record(here)
    assert here.finished > there.finished and here.seconds != there.seconds  # it was trained, not copied
    assert outcome(here) == outcome(there)

    printed = capsys.readouterr().out
    assert "Your runs (here) beside the published ones (there, results/tiny):" in printed
    assert here.id in printed and "1 runs; their accuracies differ by at most 0.00 points." in printed
    (row,) = pd.read_csv(root / "results/own/tiny/tables/beside_published.csv").to_dict("records")
    assert row == {
        "id": here.id,
        "accuracy there": pytest.approx(100 * there.test_accuracy, rel=1e-5),
        "accuracy here": pytest.approx(100 * here.test_accuracy, rel=1e-5),
        "difference": 0,
        "training seconds there": pytest.approx(there.seconds, rel=1e-5),
        "training seconds here": pytest.approx(here.seconds, rel=1e-5),
        "device there": there.environment["device"],
        "device here": here.environment["device"],
        "precision there": there.environment["precision"],
        "precision here": here.environment["precision"],
    }
    assert here.id in said_by_the_table(root / "results/own/tiny/01_grid.ipynb")
    assert "beside_published.csv" in (root / "results/own/tiny/README.md").read_text()


@pytest.mark.slow
def test_other_runs_have_nothing_to_be_set_beside(root, capsys, tmp_path):
    arguments = ["run", "--profile", "tiny", "--results", str(tmp_path), "epochs=1"]
    assert runner.main(arguments, root) == 0
    assert "beside" not in capsys.readouterr().out and not (tmp_path / "tiny/tables").exists()
    page = tmp_path / "tiny/01_grid.ipynb"
    assert "results/tiny holds no record of the same run." in said_by_the_table(page)


# ---- the table itself ----


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Two records of this machine."""
    folder = tmp_path_factory.mktemp("here") / "tiny"
    values = GRID | {"methods": ["dense", "scratch"], "epochs": 1, "workers": 1}
    study = Study.of(folder, **values)
    return [execute(config, str(folder), "cpu", 1) for config in study.configs()]


def test_each_run_is_matched_by_its_id_and_differences_are_in_points(records, tmp_path):
    dense, scratch = records
    phase = scratch.phases[0].model_copy(update={"seconds": 12.5})
    there = scratch.model_copy(
        update={
            "test_accuracy": 0.25,
            "environment": scratch.environment | {"device": "a GPU", "precision": "bfloat16"},
            "phases": [phase],
        }
    )
    ResultsFolder(tmp_path).write(there)
    table = beside_published([dense, scratch], tmp_path)
    (row,) = table.to_dict("records")
    assert row["id"] == scratch.id and (row["device there"], row["precision there"]) == ("a GPU", "bfloat16")
    assert row["difference"] == pytest.approx(100 * scratch.test_accuracy - 25)
    assert (row["training seconds there"], row["training seconds here"]) == (12.5, scratch.seconds)


def test_without_published_records_the_table_is_empty_and_the_notebook_says_so(records, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert beside_published(records, tmp_path / "absent").empty and beside_published([], tmp_path).empty
    page.Page("04_compare", Study.of(tmp_path / "own" / "tiny", **GRID)).beside_published(records)
    assert capsys.readouterr().out == "results/tiny holds no record of the same run.\n"


def test_a_damaged_published_record_is_named(records, tmp_path):
    path = ResultsFolder(tmp_path).write(records[0])
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(RecordError, match=f"{path.name} was changed after it was written.*Restore it from version"):
        beside_published(records, tmp_path)


# ---- what is published, and what is not ----


def test_git_ignores_the_readers_own_results_and_nothing_that_is_published():
    repository = Path(__file__).parents[3]
    if not (repository / ".git").exists():
        pytest.skip("this is no checkout")
    files = ["results/own/quick/runs/a.json", "results/own/index.html", "results/cpu/runs/a.json", "results/index.html"]
    git = subprocess.run(["git", "check-ignore", *files], cwd=repository, capture_output=True, text=True)
    assert git.stdout.split() == files[:2]
