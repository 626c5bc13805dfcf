"""One network on two data sets at one target: their runs are never in one table, panel or mean."""

import numpy as np
import pandas as pd
import pytest
from fake_records import fake_record

from apbm_core.study.pages import drawings, findings
from apbm_core.study.report import curves, tables
from apbm_core.study.report.frames import beds, history_frame, phase_columns, runs_frame

ACCURACY = {
    ("cifar10", "dense"): 0.92,
    ("cifar10", "apbm"): 0.90,
    ("cifar10", "hrank"): 0.88,
    ("cifar100", "dense"): 0.70,
    ("cifar100", "apbm"): 0.60,
    ("cifar100", "hrank"): 0.55,
}


@pytest.fixture(scope="module")
def records():
    return [
        fake_record(method, accuracy, seed, seconds=10.0 if dataset == "cifar10" else 70.0, dataset=dataset,
                    model="resnet56", target=0.0 if method == "dense" else 0.7)
        for (dataset, method), accuracy in ACCURACY.items() for seed in range(2)
    ]  # fmt: skip


def test_each_data_set_has_tables_of_its_own_that_can_be_shown(records):
    found = tables.targets(records)
    assert list(found) == ["targets_resnet56_cifar10_70", "targets_resnet56_cifar100_70"]
    for dataset, (name, (table, caption)) in zip(("cifar10", "cifar100"), found.items(), strict=True):
        expected = {f"{100 * accuracy:.4g}" for (there, _), accuracy in ACCURACY.items() if there == dataset}
        assert {f"{value:.4g}" for value in table["accuracy"]} == expected
        assert set(table["training seconds"]) == ({10.0} if dataset == "cifar10" else {70.0})
        assert caption.startswith(f"ResNet56, {'CIFAR-10' if dataset == 'cifar10' else 'CIFAR-100'}, ")
        assert "<table" in tables.styled(table, name, caption).to_html()
    for table, caption in tables.matrices(records).values():
        assert "<table" in tables.styled(table, "matrix", caption).to_html()


def test_summary_and_phases_have_a_row_for_each(records):
    summary = tables.summary(records)
    assert len(summary) == len(ACCURACY) and summary["n"].tolist() == [2] * len(ACCURACY)
    assert len(tables.phases(records)) == len(ACCURACY)
    assert phase_columns(records).index.is_unique


def test_figures_have_a_panel_for_each(records):
    for draw in (curves.training_curves, curves.phase_times, curves.accuracy_curves, curves.accuracy_against_time):
        figure = draw(records)
        titles = [axis.get_title(loc="left") or axis.get_title() for axis in figure.axes]
        assert [any(f"ResNet56, {words}:" in title for title in titles) for words in ("CIFAR-10", "CIFAR-100")] == [
            True,
            True,
        ]
        curves.plt.close(figure)
    picture, words = drawings.drawing(records)
    assert "ResNet56, CIFAR-10: APBM leads with 90.00 %" in words and "ResNet56, CIFAR-100: APBM leads" in words
    assert picture.count("dense 92.00") == picture.count("dense 70.00") == 1


def test_a_panel_is_named_after_its_data_set_only_where_there_are_several(records):
    frame = runs_frame(records)
    assert [words for _, _, words in beds(frame)] == ["ResNet56, CIFAR-10", "ResNet56, CIFAR-100"]
    assert [words for _, _, words in beds(frame[frame["dataset"] == "cifar10"])] == ["ResNet56"]
    assert set(history_frame(records)["dataset"]) == {"cifar10", "cifar100"}


def test_times_of_one_data_set_do_not_decide_what_is_usual_for_the_other(records):
    frame = runs_frame(records)
    frame_of = {name: rows for name, rows in frame.groupby("dataset")}
    assert all(rows["timed alike"].all() for rows in frame_of.values())


def test_the_front_page_says_a_sentence_for_each(records):
    slim = [
        fake_record("scratch", 0.5, seed, dataset=dataset, model="resnet56", target=0.7)
        for dataset in ("cifar10", "cifar100") for seed in range(2)
    ]  # fmt: skip
    said = findings.sentences({"own": [*records, *slim]}, pd.DataFrame(columns=["ingredient"]))
    of = {name: next(text for text in said if f"<b>ResNet56, {name}, " in text) for name in ("CIFAR-10", "CIFAR-100")}
    assert "the dense network 92.00 %" in of["CIFAR-10"] and "the dense network 70.00 %" in of["CIFAR-100"]
    assert np.all(["50.00" in text for text in of.values()])


def test_what_a_network_knows_right_after_its_cut_is_shown_where_it_is_known():
    cut = fake_record("l1", 0.8, target=0.75)
    noted = [cut.model_copy(update={"notes": {"after_cut": {"val_accuracy": value}}}) for value in (0.5, 0.6)]
    seeds = [record.model_copy(update={"config": record.config.model_copy(update={"seed": seed})})
             for seed, record in enumerate(noted)]  # fmt: skip
    scratch = fake_record("scratch", 0.7, target=0.75)
    ((table, _),) = tables.targets([*seeds, scratch]).values()
    assert table.set_index("method")["right after the cut"].round(6).dropna().to_dict() == {"L1": 55.0}
    ((without, _),) = tables.targets([cut, scratch]).values()
    assert "right after the cut" not in without
