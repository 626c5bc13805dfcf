"""A notebook's page: whose value each parameter has, what is refused, and how errors look in a kernel."""

import json
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pandas as pd
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from apbm_core.errors import ApbmError, ConfigError
from apbm_core.study.grid.profiles import Profile, lay_over, load_profile, profile_names
from apbm_core.study.report import kernel, page

ROOT = Path(__file__).parents[3]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A repository with the profile `tiny`, and the working directory in it."""
    folder = tmp_path / "notebooks" / "profiles"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text("dataset: digits\nepochs: 2\nmethods: [apbm, scratch]\ntrain_subset: 128\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_given_here_goes_over_the_profile_and_that_over_the_defaults():
    profile = Profile("mine", "", {"epochs": 5, "seeds": [1]})
    effective = lay_over(profile, {"seeds": [2, 3]})
    assert (effective.parameters.epochs, effective.parameters.seeds, effective.parameters.by) == (5, [2, 3], "params")
    assert effective.origins["epochs"] == "profile mine" and effective.origins["by"] == "default"
    assert effective.origins["seeds"] == "given here"
    assert set(effective.origins) == set(type(effective.parameters).model_fields)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epoch": 3}, "the study has no parameter 'epoch'; did you mean epochs?"),
        ({"epochs": "3"}, "epochs = '3' is not allowed"),
        ({"epochs": 0}, "epochs = 0 is not allowed"),
        ({"methods": ["apbn"]}, "apbn"),
        ({"results": "x"}, "results is set with --results"),
        ([3], "changes must map parameter names to values"),
    ],
)
def test_a_wrong_change_is_refused_when_the_page_opens(here, changes, sentence):
    with pytest.raises(ConfigError) as error:
        page.open_page("02_train", "tiny", "results/own", changes)
    assert sentence in str(error.value) and len(kernel.brief(error.value)) <= 5
    assert not (here / "results").exists()


def test_many_missing_runs_are_counted_and_few_are_named(here, monkeypatch, capsys):
    monkeypatch.setenv("APBM_RECORDS_ONLY", "1")
    few = page.open_page("02_train", "tiny")
    assert f"not recorded yet: {few.study.missing[0].id}, {few.study.missing[1].id}\n" in capsys.readouterr().out
    page.open_page("02_train", "tiny", changes={"seeds": [3, 4, 5, 6, 7, 8]})
    counts = "; ".join(f"2 runs of ResNet20 on scikit-learn digits, seed {seed}" for seed in (3, 4, 5, 6, 7, 8))
    assert f"not recorded yet: {counts}\n" in capsys.readouterr().out


def test_a_page_that_heeds_few_parameters_refuses_the_others(here):
    with pytest.raises(ConfigError, match="05_ablation does not take the parameter 'epochs'. There is: seeds"):
        page.open_page("05_ablation", "tiny", changes={"epochs": 3}, takes=["seeds"])


def test_every_parameter_is_shown_with_its_origin(here, capsys):
    opened = page.open_page("02_train", "tiny", "results/own", {"seeds": [4]})
    shown = page._Opening(opened.effective, [])._repr_html_()
    assert "<summary>" in shown and "given here: seeds = [4]" in shown
    cells = [[cell.text or cell[0].text for cell in row] for row in ElementTree.fromstring(shown).find("table/tbody")]
    row = {name: origin for name, _, origin in cells}
    assert sorted(row) == sorted(type(opened.parameters).model_fields)
    assert (row["seeds"], row["epochs"], row["by"]) == ("given here", "profile tiny", "default")
    assert "seeds = [4]  (given here)" in capsys.readouterr().out


def test_every_profile_of_the_repository_can_be_laid_over_the_defaults():
    assert {"quick", "cpu", "gpu", "smoke", "ablation"} <= set(profile_names(ROOT))
    for name in profile_names(ROOT):
        profile = load_profile(ROOT, name)
        assert profile.description and profile.notebooks
        assert all((ROOT / "notebooks" / f"{notebook}.ipynb").exists() for notebook in profile.notebooks)
        lay_over(profile, {})


def test_tables_and_figures_are_stored_under_the_pages_number(here):
    import matplotlib.pyplot as plt

    opened = page.open_page("03_prune", "tiny", "results/own")
    opened.table(pd.DataFrame({"method": ["APBM"], "accuracy": [12.3456789]}), "pruned")
    figure, axis = plt.subplots()
    axis.set_title("APBM  leads", loc="left")
    assert page._titles(figure) == "APBM leads"
    opened.figure(figure, "curves")
    assert (here / "results/own/tiny/tables/03_pruned.csv").read_text() == "method,accuracy\nAPBM,12.3457\n"
    assert (here / "results/own/tiny/figures/03_curves.png").stat().st_size > 1000
    assert not plt.get_fignums()


def test_long_messages_are_cut_and_an_interrupt_says_what_to_do():
    lines = kernel.brief(ApbmError("\n".join("abcdefgh")))
    assert lines == ["ApbmError: a", "b", "c", "d", "... 4 more"]
    assert "Run this cell again" in kernel.brief(KeyboardInterrupt())[-1]


SETTINGS = {"device": "cpu", "workers": 1, "test_subset": 60, "recipe_overrides": {"batch_size": 64}}
"""What papermill is given by name, beside what a test is about."""


def called_by_papermill(here: Path, **given) -> nbformat.NotebookNode:
    """02_train's first cells, through papermill itself as a user would call it."""
    notebook = nbformat.read(ROOT / "notebooks" / "02_train.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:2]
    notebook.cells.append(nbformat.v4.new_code_cell("print('effective:', page.parameters.model_dump_json())"))
    nbformat.write(notebook, here / "02.ipynb")
    given = {"profile": "tiny"} | SETTINGS | given
    return papermill.execute_notebook("02.ipynb", "out.ipynb", given, progress_bar=False, kernel_name="python3")


def test_papermills_flat_names_work_without_the_runner(here):
    cells = called_by_papermill(here, epochs=3).cells
    said = "".join(output.get("text", "") for output in cells[-1].outputs)
    parameters = json.loads(said.removeprefix("effective: "))
    assert parameters["epochs"] == 3 and parameters["methods"] == ["apbm", "scratch"] and parameters["device"] == "cpu"


def test_papermills_unknown_name_is_refused_in_few_lines(here):
    with pytest.raises(PapermillExecutionError, match="the study has no parameter 'epoch'; did you mean epochs?"):
        called_by_papermill(here, epoch=3)
    cells = nbformat.read(here / "out.ipynb", as_version=4).cells
    (error,) = [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert error.ename == "ConfigError" and len(error.traceback) == 1
    assert error.traceback[0].startswith("ConfigError: the study has no parameter 'epoch'")
