"""Progress bars: seldom in a log file, epochs over all runs, and a time left that resumed epochs do not shorten."""

import io
import itertools

import pytest
import tqdm.std

from apbm_core.study.grid.bars import LOG_SECONDS, EpochsBar, bar
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.run import execute
from apbm_core.study.training import stopping

TINY = {
    "dataset": "digits", "models": ["resnet20"], "methods": ["l1"], "targets": {"resnet20": [0.5]}, "epochs": 3,
    "train_subset": 20, "test_subset": 10, "recipe_overrides": {"batch_size": 5, "precision": "float32", "crop": 16},
    "workers": 1, "device": "cpu",
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, least, most", [(io.StringIO(), 2, 12), (Terminal(), 50, 210)])
def test_a_bar_in_a_log_file_is_a_line_in_half_a_minute(stream, least, most, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("sys.stderr", stream)
    with bar(total=200.0) as shown:
        shown._time = lambda: float(next(clock))  # a second a look, so 200 updates last minutes
        shown.start_t = shown.last_print_t = 0.0
        for _ in range(200):
            shown.set_postfix_str("somewhere", refresh=False)
            shown.update(1)
    lines = stream.getvalue().count("\r")
    assert least <= lines <= most
    assert LOG_SECONDS == 30


def test_epochs_of_all_runs_are_counted_and_resumed_ones_leave_the_rate_alone(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with EpochsBar(10) as shown:
        shown.stand("one", 2.25, "train 2.2 of 4", before=2.0)
        assert shown.epochs == 2.25 and shown._bar.initial == 2.0  # a quarter was trained in this time
        shown.stand("one", 3.0, "train 3.0 of 4", before=2.0)
        shown.end("one", 4, "last l1 50.0 %", total=10)
        shown.end("two", 4, "last swp 60.0 %", total=12)  # another process had recorded it
        assert shown.epochs == 8 and shown._bar.initial == 6.0 and shown._bar.total == 12
        shown.stand("three", 0.5, "train 0.5 of 4")
        assert "8.5/12 epochs" in str(shown._bar) and "three: train 0.5 of 4, last swp 60.0 %" in str(shown._bar)


def test_a_run_says_where_it_stands_and_from_where_it_goes_on(tmp_path):
    config, standings = Study.of(tmp_path, **TINY).configs()[0], []

    def stop_in_the_fine_tuning(standing):
        standings.append(standing)
        if standing.epochs == 2.25:
            stopping.ask()

    try:
        with pytest.raises(stopping.Stopped):
            execute(config, str(tmp_path), "cpu", 1, report=stop_in_the_fine_tuning)
    finally:
        stopping.forget()
    assert [s.epochs for s in standings[:5]] == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert standings[0].words == "pretrain 0.2 of 1" and standings[0].before == 0
    assert standings[5].words == "finetune 0.5 of 2"
    again = []
    record = execute(config, str(tmp_path), "cpu", 1, report=again.append)
    went_on_at = standings[-1].epochs
    assert again[0].before == went_on_at and again[0].epochs == went_on_at + 0.25
    assert f"going on from epoch {went_on_at - 1:.1f}" in again[0].words
    shown = 100 * record.history[-1]["train_accuracy"]
    assert again[-1].epochs == 3 and again[-1].words.endswith(f"{shown:.1f} % on the way")


def test_a_study_fills_its_bar(tmp_path, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    made = []
    monkeypatch.setattr(
        tqdm.std.tqdm, "close", lambda self, close=tqdm.std.tqdm.close: (made.append(self), close(self))
    )
    Study.of(tmp_path, **TINY | {"methods": ["scratch", "random"], "epochs": 1}).run()
    assert [(bar.n, bar.total) for bar in made if bar.total == 2] == [(2, 2)]
