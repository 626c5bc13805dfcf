"""A study in pieces: stopped by its minutes or by a signal, continued, planned by estimates, merged from folders."""

import itertools
import json
import shutil
import signal
import time

import kill_study
import pytest
import torch
from kill_study import Command, check_results, wait_until

from apbm_core.errors import RecordError
from apbm_core.files import sha256
from apbm_core.study.grid import __main__ as command_line
from apbm_core.study.grid import budget as budget_module
from apbm_core.study.grid.budget import STARTED, Budget, Estimates, choose, in_order
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.merge import merge
from apbm_core.study.records import ResultsFolder, canonical_json, read_record
from apbm_core.study.training import stopping
from apbm_core.study.training.device import describe_device
from apbm_core.study.training.stopping import Stopped

TINY = {
    "dataset": "digits", "models": ["resnet20"], "targets": {"resnet20": [0.5]}, "epochs": 2, "train_subset": 20,
    "test_subset": 20, "recipe_overrides": {"batch_size": 5, "precision": "float32", "lowering": "off"}, "workers": 1,
    "device": "cpu",
    "methods": ["scratch", "apbm"], "seeds": [0, 1],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The study that nothing interrupts, one thread."""
    threads = torch.get_num_threads()
    study = Study.of(tmp_path_factory.mktemp("whole") / "grid", **TINY)
    records = study.run()
    torch.set_num_threads(threads)
    return study, records


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second whenever it is looked at: the same on every machine, however busy."""
    ticks = itertools.count(1_000_000)
    monkeypatch.setattr(budget_module.time, "time", lambda: float(next(ticks)))


def in_pieces(folder, minutes, **changes):
    """Give the same command until it is done; returns the records, and what each command but the last one said."""
    said = []
    for _ in range(100):
        try:
            return Study.of(folder, **TINY | changes, minutes=minutes).run(), said
        except Stopped as stop:
            said.append(str(stop))
    raise AssertionError(said)


@pytest.mark.slow
def test_ten_times_stopped_and_continued_is_the_uninterrupted_study(whole, clock, tmp_path):
    _, reference = whole
    records, stops = in_pieces(tmp_path / "grid", 0.07)  # two steps a command, by that clock
    assert len(stops) >= 10, stops
    assert all("The same command goes on" in said for said in stops)
    assert sum("1 wait at a checkpoint" in said for said in stops) >= 8
    assert [record.id for record in records] == [record.id for record in reference]
    check_results(tmp_path / "grid", reference)


@pytest.mark.slow
def test_so_is_one_whose_runs_share_a_training(clock, tmp_path):
    changes = {"methods": ["l1", "hrank", "swp"], "seeds": [0]}
    reference = Study.of(tmp_path / "whole" / "grid", **TINY | changes).run()
    _, stops = in_pieces(tmp_path / "pieces" / "grid", 0.07, **changes)
    assert len(stops) >= 5
    check_results(tmp_path / "pieces" / "grid", reference)


def test_no_run_begins_when_the_time_is_up(whole, tmp_path):
    with pytest.raises(Stopped, match="0 of 4 runs are recorded, 0 wait"):
        Study.of(tmp_path / "grid", **TINY).run(budget=Budget(end=time.time() - 1, stop_at=time.time() - 1))
    study, records = whole
    assert study.run(budget=Budget(end=0, stop_at=0)) == records  # all are recorded: no time is needed


def test_asked_to_end_a_study_begins_no_run(tmp_path):
    stopping.ask()
    try:
        with pytest.raises(Stopped, match="asked to end"):
            Study.of(tmp_path / "grid", **TINY).run()
    finally:
        stopping.forget()


def test_the_notebooks_of_one_reproduction_share_their_minutes(monkeypatch):
    monkeypatch.setenv(STARTED, str(time.time() - 50))
    assert 9 < 60 * Budget.of(1).minutes_left < 10.1
    assert Budget.of(1).end - Budget.of(1).stop_at == pytest.approx(6)
    assert Budget.of(600).end - Budget.of(600).stop_at == pytest.approx(10)
    assert not Budget.of(None).is_finite


def three_methods(folder="nowhere"):
    """Runs of which one method's share a training; none is carried out."""
    return Study.of(folder, **TINY | {"methods": ["scratch", "apbm", "l1"]}).configs()


def test_one_seed_of_everything_comes_before_the_second():
    configs = three_methods()
    order = in_order(configs[::-1] + [c.model_copy(update={"schedule": "equal-time", "epochs": 9}) for c in configs])
    assert [c.seed for c in order] == [1] * 6 + [0] * 6  # seeds in the order that they are given in
    assert [c.schedule for c in order[:6]] == ["equal"] * 3 + ["equal-time"] * 3
    assert order[0].method == "l1"  # its pre-training is shared


def test_what_can_end_in_time_is_begun_first():
    waiting = in_order(three_methods())
    first, second, third = waiting[:3]
    seconds = {first.id: 100.0, second.id: 40.0, third.id: 20.0}

    def chosen(left, begun=()):
        return choose(waiting, left, lambda c: seconds.get(c.id, 1.0), lambda c: c in begun)

    assert chosen(float("inf")) == chosen(200) == first
    assert chosen(50) == second and chosen(30) == third
    assert chosen(10) == first  # none can end, and the next seed's runs, of one second, have to wait
    assert chosen(50, begun=[third]) == third
    assert chosen(0) is None and choose([], 9, None, None) is None


def test_estimates_come_from_records_of_the_kind_then_of_the_network_then_from_a_measurement(whole, monkeypatch):
    study, records = whole
    threads = records[0].environment["threads"]
    config = next(c for c in study.configs() if c.method == "apbm" and c.seed == 1)
    by_method = {r.config.method: r for r in records if r.config.seed == 0}
    monkeypatch.setattr(budget_module, "measured_step", lambda *arguments: 7.0)

    def seconds(*known, config=config, threads=threads):
        estimates = Estimates(torch.device("cpu"), threads, 1, num_images=20, side=32)
        estimates.learn(known)
        return estimates.seconds(config)

    assert seconds(*by_method.values()) == pytest.approx(by_method["apbm"].seconds)
    longer = config.model_copy(update={"epochs": 6})
    assert seconds(*by_method.values(), config=longer) == pytest.approx(3 * by_method["apbm"].seconds)
    slow = by_method["scratch"].model_copy(deep=True, update={"config": three_methods()[2]})
    slow.phases[0].seconds = 100.0
    assert seconds(by_method["scratch"], slow) == pytest.approx(slow.seconds)
    assert seconds() == 2 * 4 * 7.0  # epochs, steps of 5 of 20 images, seconds
    assert seconds(*records, threads=threads + 1) == 2 * 4 * 7.0  # another machine's records tell nothing
    assert describe_device(torch.device("cpu"))["device"] == records[0].environment["device"]


def test_a_step_is_measured_where_nothing_is_recorded():
    recipe = Study.of("nowhere", **TINY).configs()[0].recipe
    before = torch.get_rng_state()
    assert 0 < budget_module.measured_step("resnet20", recipe, 16, torch.device("cpu"), 1) < 60
    assert torch.equal(torch.get_rng_state(), before)


def make_root(folder, **changes):
    profiles = folder / "notebooks" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "tiny.yaml").write_text(json.dumps(TINY | changes))
    return folder


def test_a_command_that_is_asked_to_end_saves_says_so_and_goes_on(tmp_path):
    root = make_root(tmp_path, epochs=4000, methods=["scratch"], seeds=[0])
    command = Command(["-m", "apbm_core.study.grid", "--profile", "tiny"], root)
    try:
        work = root / "results" / "own" / "tiny" / "work"
        wait_until(lambda: any(work.glob("*/*.ckpt")) or command.is_over(), "the first checkpoint")
        command.process.send_signal(signal.SIGTERM)
        assert command.finish() == stopping.GO_ON, command.output
    finally:
        command.kill()
    assert "asked to end: 0 of 1 runs are recorded, 1 wait at a checkpoint" in command.output
    assert not list(root.rglob("*.tmp"))


def test_command_line_exit_codes(whole, tmp_path, monkeypatch, capsys):
    study, records = whole
    monkeypatch.chdir(make_root(tmp_path))
    shutil.copytree(study.results.path, tmp_path / "results" / "own" / "tiny")
    assert command_line.main(["--profile", "tiny"]) == 0
    assert f"All {len(records)} runs are recorded" in capsys.readouterr().out
    assert command_line.main(["plan", "--profile", "tiny", "seeds=[0,1]"]) == 0
    assert "0 of 4 runs to do, about 0 minutes" in capsys.readouterr().out
    assert command_line.main(["--profile", "tiny", "--minutes", "0.00001", "seeds=[2]"]) == stopping.GO_ON
    assert "the time is up: 0 of 2 runs are recorded" in capsys.readouterr().err
    assert command_line.main(["--profile", "tiny", "--minutes", "-1"]) == 1
    assert "minutes" in capsys.readouterr().err
    assert command_line.main(["run", "--profile", "tinny"]) == 1
    assert "tiny" in capsys.readouterr().err


def split(study, folders, parts):
    for folder, records in zip(folders, parts, strict=True):
        for record in records:
            ResultsFolder(folder).write(record)
            (folder / "networks").mkdir(exist_ok=True)
            shutil.copy(study.results.networks / record.network, folder / "networks" / record.network)


def test_records_of_several_folders_merge_and_duplicates_agree(whole, tmp_path, capsys):
    study, records = whole
    one, two, three = folders = [tmp_path / name for name in ("one", "two", "three")]
    split(study, folders, [records[:2], records[1:3], records[2:]])
    assert command_line.main(["merge", str(one), str(two), str(three)]) == 0
    assert "2 records added" in capsys.readouterr().out
    check_results(one, records)
    assert merge(one, [two, three]) == []
    elsewhere = records[0].model_copy(update={"environment": records[0].environment | {"device": "another"}})
    ResultsFolder(two).write(elsewhere)
    assert merge(one, [two]) == [] and read_record(ResultsFolder(one).record_path(records[0].config)) == records[0]


def test_records_that_disagree_are_refused_by_name_and_nothing_is_added(whole, tmp_path, capsys):
    study, records = whole
    one, two = tmp_path / "one", tmp_path / "two"
    split(study, [one, two], [records[:1], records[1:2]])
    other = records[0].model_copy(update={"test_accuracy": records[0].test_accuracy / 2 + 0.1})
    ResultsFolder(two).write(other)
    assert command_line.main(["merge", str(one), str(two)]) == 1
    said = capsys.readouterr().err
    assert f"{records[0].id}: test_accuracy" in said and "nothing was merged" in said
    assert len(list((one / "runs").glob("*"))) == 1
    with pytest.raises(RecordError, match="no folder"):
        merge(one, [tmp_path / "nowhere"])


def test_a_record_under_another_runs_name_is_not_merged(whole, tmp_path):
    study, records = whole
    one, two = tmp_path / "one", tmp_path / "two"
    split(study, [one, two], [records[:1], records[1:2]])
    path = ResultsFolder(two).record_path(records[1].config)
    content = json.loads(path.read_text())
    content["config"]["seed"], checksum = 77, content.pop("checksum")
    path.write_text(json.dumps(content | {"checksum": sha256(canonical_json(content).encode())}))
    assert checksum and kill_study.read_record(path).config.id != records[1].id
    with pytest.raises(RecordError, match="holds the configuration of"):
        merge(one, [two])
