"""The comparison on other people's networks: its numbers by hand, what it keeps, and that a case ends as a row."""

import csv
import os
import time

import pytest
import torch
from torch import nn

from apbm_core.errors import ConfigError, RecordError
from apbm_core.study.bench import network_case, networks
from apbm_core.study.bench.measure import Settings, render_markdown
from apbm_core.study.bench.zoo import members
from apbm_core.study.bench.zoo.members import ZOO

CPU = torch.device("cpu")


def linears(*widths: int) -> int:
    return sum(a * b + b for a, b in zip(widths, widths[1:], strict=False))


def convs(taps: int, *widths: int) -> int:
    return sum(a * b * taps + b for a, b in zip(widths, widths[1:], strict=False))


# Name -> parameters of the dense network and of the one with half of the filters, counted from the architecture.
BY_HAND = {
    "perceptron": (linears(64, 128, 128, 128, 10), linears(64, 64, 64, 64, 10)),
    "1-d": (
        convs(3, 3, 16, 32, 64) + 2 * 112 + linears(64, 10),
        convs(3, 3, 8, 16, 32) + 2 * 56 + linears(32, 10),
    ),
    "strided channels": (
        27 * 32 + 2 * 32 + convs(9, 32, 64) + 9 * 32 * 64 + 2 * 64 + linears(64, 10),
        27 * 16 + 2 * 16 + convs(9, 16, 32) + 9 * 16 * 32 + 2 * 32 + linears(32, 10),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_row_says_what_was_removed(name):
    *_, row = network_case.measure(name)
    dense, slim = BY_HAND[name]
    assert row["parameters"] == dense and row["ours"] == pytest.approx(1 - slim / dense)
    assert row["difference"] < 1e-4 and 0 < row["left alone"] < row["layers"]
    if name != "strided channels":  # which torch-pruning does not follow
        assert row["torch-pruning"] == pytest.approx(1 - slim / dense)


def test_a_network_that_nobody_can_prune_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setitem(ZOO, "lonely", (lambda: nn.Sequential(nn.Conv2d(3, 6, 3)), lambda: torch.randn(1, 3, 8, 8)))
    *_, row = network_case.measure("lonely")
    assert "ours" not in row and "own output" in row["ours says"] and row["parameters"] == 168
    with pytest.raises(ConfigError, match="no network 'nobody'"):
        members.build("nobody")


def test_the_outputs_layers_are_found_along_the_gradients():
    model, inputs = members.build("YOLO-like")
    assert set(network_case.output_layers(model, inputs)) == set(model.heads)


def test_what_is_done_is_not_done_again_until_the_library_changes(tmp_path, monkeypatch, capsys):
    asked, known = [], []

    def case(name, theirs):
        asked.append(name)
        known.append(theirs)
        if len(asked) == 2:
            raise KeyboardInterrupt
        row = {"network": name, "parameters": 7, "ours": 0.5, "difference": 0.0, "ours says": 'so, "it" says'}
        return row | {"ours seconds": float(10 - len(name)), "torch-pruning": 0.25, "torch-pruning seconds": 2.0}

    monkeypatch.setattr(networks, "run_case", case)
    settings = Settings(CPU, threads=1, quick=True, folder=tmp_path)
    (table,) = networks.networks(settings)
    assert [row["network"] for row in table.rows] == ["perceptron"]
    assert table.notes[0].endswith("Missing: 1-d, strided channels.")
    (table,) = networks.networks(settings)
    assert "Missing" not in "".join(table.notes)
    assert asked == ["perceptron", "1-d", "1-d", "strided channels"]
    assert [row["network"] for row in table.rows] == list(networks.QUICK)
    again = networks.networks(settings)[0]
    assert len(asked) == 4 and render_markdown(again.to_json()) == render_markdown(table.to_json())
    monkeypatch.setattr(networks, "code_digest", lambda: "another")
    networks.networks(settings)
    assert asked[4:] == ["strided channels", "perceptron", "1-d"]  # the quickest first
    assert known == [None] * 4 + [{"torch-pruning": 0.25, "torch-pruning seconds": 2.0}] * 3
    monkeypatch.setattr(networks, "zoo_digest", lambda: "others")
    networks.networks(settings)
    assert len(asked) == 10 and known[7:] == [None] * 3
    with (tmp_path / "networks-quick.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["network"] for row in rows] == [name for name in ZOO if name in networks.QUICK]
    assert rows[0]["ours says"] == 'so, "it" says' and rows[0]["code"] == "another"
    (tmp_path / "networks-quick.csv").write_text("network,ours\nx,1\n")
    with pytest.raises(RecordError, match="not a table of networks"):
        networks.networks(settings)


def computes_without_end(name, *_):
    while True:
        pass
    yield


def waits_for_nothing(name, *_):
    time.sleep(3600)
    yield


def ends(name, *_):
    os._exit(7)
    yield


def is_half_done(name, *_):
    yield {"network": name, "ours": 0.7}
    yield from computes_without_end(name)


def says_what_it_was_told(name, keep, theirs):
    yield {"network": name, "ours": keep}
    yield {"network": name, "ours": keep, "threads": torch.get_num_threads()} | theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "why"),
    [
        (computes_without_end, "not done within 1 s of computing"),
        (waits_for_nothing, "it computed nothing for 2 s"),
        (ends, "its process ended with status 7"),
    ],
)
def test_a_process_that_does_not_end_well_is_a_row_with_the_reason(measure, why):
    limits = networks.LIMITS | {"seconds": 1, "idle seconds": 2}
    assert networks.run_case("1-d", limits, measure) == {"network": "1-d", "ours says": why}
    row = networks.run_case("1-d", limits, is_half_done)
    why = "not done within 1 s of computing"
    assert row == {"network": "1-d", "ours": 0.7, "torch-pruning says": why}


@pytest.mark.slow
def test_a_process_is_told_the_threads_and_what_is_known():
    row = networks.run_case("1-d", measure=says_what_it_was_told, theirs={"torch-pruning": 0.25})
    expected = {"network": "1-d", "ours": networks.KEEP, "threads": torch.get_num_threads(), "torch-pruning": 0.25}
    assert row == expected


def test_the_other_pruners_part_of_a_row_is_kept_where_it_is_known():
    known = {"torch-pruning": 0.25, "torch-pruning seconds": 3.0}
    *_, row = network_case.measure("perceptron", theirs=known)
    assert row["ours"] > 0.6 and row["torch-pruning"] == 0.25 and row["torch-pruning seconds"] == 3.0


def test_goals_count_what_does_not_run_as_nothing_removed():
    rows = [
        {"network": "a", "ours": 0.75, "difference": 0.0, "torch-pruning": 0.5, "layers": 3, "left alone": 1},
        {"network": "b", "ours": 0.72, "difference": 2e-4, "ours says": "enough", "torch-pruning says": "IndexError"},
        {"network": "c", "ours says": "it has no layer"},
        {"network": "d"},
    ]
    said = "\n".join(networks.table_of(rows).notes)
    assert "on all. Missed: 3 of 4." in said and "Missed: 0.360" in said and "(torch-pruning's: 0.000)" in said
    assert "Missed: b do not." in said
    text = render_markdown(networks.table_of(rows).to_json())
    assert "enough" not in text and "it has no layer" in text and "(torch-pruning: IndexError)" in text


@pytest.mark.slow
def test_the_section_runs_each_network_in_a_process_of_its_own(tmp_path):
    (table,) = networks.networks(Settings(CPU, threads=1, quick=True, folder=tmp_path))
    assert [row["ours"] > 0.6 for row in table.rows] == [True] * 3
    assert not [note for note in table.notes if note.startswith("Goal") and "Missed" in note and "median" not in note]
