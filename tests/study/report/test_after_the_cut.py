"""The picture of what a cut leaves: the numbers of the records, in words that follow from them."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import papermill
import pytest
from fake_records import fake_record

from apbm_core.errors import RecordError
from apbm_core.study.report.trained_start import after_the_cut


def cut(method: str, before: float, after: float, **config):
    record = fake_record(method, after, target=0.75, **config)
    return record.model_copy(update={"notes": {"after_cut": {"val_accuracy": before}}})


RECORDS = [
    *(cut("fused_once", 0.60 + seed / 100, 0.80, seed=seed) for seed in range(2)),
    *(cut("entropy_cut", 0.50, 0.79, seed=seed) for seed in range(2)),
    *(cut("l1", 0.55, 0.78, seed=seed) for seed in range(2)),
    *(fake_record("scratch", 0.70, target=0.75, seed=seed) for seed in range(2)),
    fake_record("dense", 0.85, target=0),
]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_line_goes_from_the_accuracy_after_the_cut_to_the_one_after_fine_tuning():
    (axis,) = after_the_cut(RECORDS).axes
    lines = {tuple(round(float(x), 6) for x in line.get_xdata()) for line in axis.lines}
    assert {(60.5, 80.0), (50.0, 79.0), (55.0, 78.0)} <= lines
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names == ["slim from scratch", "relative entropy, cut", "L1", "APBM, fused once"]
    assert {"60.5", "80.0", "70.0", "dense"} <= {text.get_text() for text in axis.texts}


def test_the_title_says_what_fusing_changes_against_the_same_cut():
    (axis,) = after_the_cut(RECORDS).axes
    title = " ".join(axis.get_title(loc="left").split())
    assert title.endswith("relative entropy fusing it once changes +10.5 points at once and +1.0 fine-tuned")
    chosen = [cut("fused_by_responses", 0.70 + seed / 100, 0.83, seed=seed) for seed in range(2)]
    (axis,) = after_the_cut(RECORDS + chosen).axes
    assert " ".join(axis.get_title(loc="left").split()).endswith(", with a choice by responses +20.5 and +4.0")


def test_means_are_of_the_seeds_that_all_methods_have():
    """A seed that only some have yet would compare the seeds as well."""
    more = [cut("fused_once", 0.90, 0.95, seed=2), cut("entropy_cut", 0.80, 0.94, seed=3)]
    (axis,) = after_the_cut(RECORDS + more).axes
    assert {"60.5", "50.0"} <= {text.get_text() for text in axis.texts}


def test_without_the_control_the_title_says_who_knows_most():
    (axis,) = after_the_cut([record for record in RECORDS if record.config.method != "entropy_cut"]).axes
    assert "APBM, fused once knows most, 60.5 %" in " ".join(axis.get_title(loc="left").split())


def test_records_without_a_cut_of_a_trained_network_are_refused():
    with pytest.raises(RecordError, match="run a profile with start_epochs"):
        after_the_cut([fake_record("l1", 0.8, target=0.75)])


@pytest.mark.slow
def test_the_page_runs_from_its_parameters_to_its_tables(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks" / "profiles"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(
        "dataset: digits\nmodels: [resnet20]\ntargets: {resnet20: [0.5]}\nmethods: [dense, fused_once, entropy_cut]\n"
        "split: tuning\nstart_epochs: 2\nepochs: 1\nrecipe_overrides: {batch_size: 64}\ndevice: cpu\nworkers: 1\n"
    )
    monkeypatch.chdir(tmp_path)
    source = Path(__file__).parents[3] / "notebooks" / "07_trained.ipynb"
    papermill.execute_notebook(source, "out.ipynb", {"profile": "tiny"}, progress_bar=False, kernel_name="python3")
    results = tmp_path / "results" / "own" / "tiny"
    assert (results / "figures" / "07_after_the_cut.png").stat().st_size > 1000
    table = pd.read_csv(results / "tables" / "07_targets_resnet20_digits_50.csv").set_index("method")
    assert table["right after the cut"].notna().to_dict() == {
        "dense": False,
        "APBM, fused once": True,
        "relative entropy, cut": True,
    }
