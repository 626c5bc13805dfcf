"""A whole study on the digits: the grid, what is skipped, what is resumed, what is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from apbm_core.counting import count_macs
from apbm_core.errors import ApbmError, ConfigError, DataError, TrainingDiverged
from apbm_core.study.grid import run
from apbm_core.study.grid.budget import in_order
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.grid.workers import plan_workers, run_side_by_side
from apbm_core.study.methods import default_methods, get_method, label
from apbm_core.study.networks.models import build_model
from apbm_core.study.networks.published_widths import PUBLISHED_WIDTHS
from apbm_core.study.networks.storage import load_compact
from apbm_core.study.report import curves, page, tables
from apbm_core.study.report.frames import points, runs_frame
from apbm_core.study.report.rivals import against_rivals
from apbm_core.study.training.device import autocast

TINY = {
    "dataset": "digits", "models": ["resnet20"], "targets": {"resnet20": [0.5]}, "epochs": 2, "train_subset": 128,
    "test_subset": 60, "recipe_overrides": {"batch_size": 64}, "workers": 1, "device": "cpu",
}  # fmt: skip


def tiny(folder, **changes) -> Study:
    return Study.of(folder, **(TINY | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = tiny(folder)
    return study, study.run()


def test_every_method_is_recorded_once(finished):
    study, records = finished
    assert sorted(r.config.method for r in records) == sorted(default_methods())
    assert len(list(study.results.runs.glob("*.json"))) == len(default_methods())
    left = [path.name for path in study.results.work.iterdir() if path.is_dir()]
    assert not [name for name in left if not name.startswith(("pretrain-", "sparse-"))]


def test_ranking_methods_have_identical_widths_and_all_meet_the_target(finished):
    _, records = finished
    ranking = [r for r in records if r.config.method in ("apbm", "dcff", "scratch", "hrank", "l1", "fpgm", "random")]
    assert len({tuple(r.widths.items()) for r in ranking}) == 1
    for record in records:
        if record.config.method != "dense":
            assert abs(record.parameters_removed - 0.5) < 0.005, record.id
    assert {r.parameters for r in records if r.config.method == "dense"} == {r.dense_parameters for r in records}


def test_every_method_gets_the_same_number_of_epochs(finished):
    _, records = finished
    for record in records:
        assert sum(phase.epochs for phase in record.phases) == 2 == len(record.history)
        assert all(phase.seconds > 0 for phase in record.phases)


def test_the_pretraining_is_shared_and_charged(finished):
    _, records = finished
    shared = [
        p for r in records if get_method(r.config.method).starts_from == "pretrained" for p in r.phases if p.shared
    ]
    assert len(shared) == 4 and len({phase.seconds for phase in shared}) == 1


def test_stored_networks_score_what_the_record_says(finished):
    study, records = finished
    split = study.data().split("final", 0, TINY["train_subset"], TINY["test_subset"])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (split.mean, split.std))
    images = (split.test.images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    for record in records:
        model = load_compact(study.results.networks / record.network)
        with torch.no_grad(), autocast(torch.device("cpu"), record.environment["precision"]):
            accuracy = (model(images).argmax(1) == split.test.labels).double().mean().item()
        assert accuracy == pytest.approx(record.test_accuracy), record.id


def test_a_table_of_no_runs_is_empty_but_has_its_columns(finished, tmp_path):
    study, records = finished
    full, none = points(runs_frame(records)), points(runs_frame([]))
    assert len(none) == 0 and list(none.columns) == list(full.columns)
    shown = tables.styled(tables.summary([]), "none").data
    assert len(shown) == 0 and {"model", "accuracy", "n"} <= set(shown.columns)


def test_what_is_recorded_is_not_run_again(finished, monkeypatch):
    study, records = finished

    def never(*arguments, **keywords):
        raise AssertionError("a recorded run was executed")

    monkeypatch.setattr("apbm_core.study.grid.work.execute", never)
    assert study.run() == records


def test_records_only_reads_and_never_trains(finished, tmp_path):
    study, records = finished
    assert Study(study.parameters, study.results.path, records_only=True).run() == records
    with pytest.raises(ApbmError, match="none of 10 runs is recorded"):
        Study(study.parameters, tmp_path, records_only=True).run()


def test_what_lacks_a_record_is_named_above_every_figure(finished, tmp_path, capsys):
    study, records = finished
    some = Study(study.parameters, tmp_path, records_only=True)
    for record in records[:7]:
        some.results.write(record)
    assert some.run() == records[:7]
    assert some.banner == "INCOMPLETE: 3 of 10 runs are not recorded yet."
    page.Page("02_some", some).describe()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.split(": ")[1].split(", ") == [record.id for record in records[7:]]
    assert study.banner == Study(study.parameters, study.results.path, records_only=True).banner == ""


def test_tables_from_records(finished):
    _, records = finished
    frame = runs_frame(records)
    table = points(frame)
    assert len(table) == len(default_methods()) and set(table["n"]) == {1} and table["interval"].isna().all()
    rivals = against_rivals(frame)
    apbm, l1 = (frame[frame["method"] == name]["accuracy"].item() for name in ("apbm", "l1"))
    assert rivals[rivals["rival"] == "L1"]["difference"].item() == pytest.approx(apbm - l1)
    assert (rivals["verdict"] == "too few pairs (1 of 3)").all() and rivals["interval"].isna().all()


def test_runs_repeat_bit_for_bit(finished, tmp_path):
    _, records = finished
    again = tiny(tmp_path, methods=["apbm"]).run()[0]
    first = next(r for r in records if r.config.method == "apbm")
    assert again.network_sha256 == first.network_sha256 and again.test_loss == first.test_loss


def test_an_interrupted_run_ends_as_if_it_had_not_been(finished, tmp_path):
    _, records = finished
    for method in ("apbm", "l1", "polarization", "swp"):
        study = tiny(tmp_path / method, methods=[method])
        config = study.configs()[0]
        calls = [0]

        def interrupt(said, calls=calls):
            calls[0] += 1
            if calls[0] % 3 == 0:
                raise KeyboardInterrupt

        from apbm_core.study.grid.run import execute

        for _ in range(20):
            try:
                record = execute(config, str(study.results.path), "cpu", 1, report=interrupt)
                break
            except KeyboardInterrupt:
                continue
        whole = next(r for r in records if r.config == config)
        assert calls[0] > 3 and record.network_sha256 == whole.network_sha256, method
        assert [strip(row) for row in record.history] == [strip(row) for row in whole.history]


def strip(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("seconds", "images_per_second")}


def test_a_failing_run_does_not_stop_the_others(tmp_path):
    study = tiny(tmp_path, methods=["dense", "scratch"], recipe_overrides={"batch_size": 64, "lr": 1e30})
    with pytest.raises(ApbmError, match="2 of 2 runs failed") as error:
        study.run()
    assert TrainingDiverged.__name__ in str(error.value) and "epoch" in str(error.value)


def test_the_fallback_is_announced(tmp_path, monkeypatch):
    monkeypatch.setenv("APBM_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr("apbm_core.study.data.cifar.download", _no_network)
    study = tiny(tmp_path, dataset="cifar10", fallback="digits", train_subset=None, test_subset=None)
    assert study.dataset == "digits" and "NOT cifar10" in study.banner
    with pytest.raises(DataError):
        tiny(tmp_path, dataset="cifar10", fallback=None).data()


def _no_network(name, root):
    raise DataError("the network is unreachable")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": 3}, "'epoch' is not a parameter; did you mean 'epochs'"),
        ({"epochs": "3"}, "epochs = '3'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": 2.5}, "epochs = 2.5"),
        ({"targets": {"resnet20": [0.0]}}, "above 0 and below 1"),
        ({"targets": {"resnet20": [1.2]}}, "above 0 and below 1"),
        ({"targets": {"resnet20": [0.99999]}}, "Cannot remove 99.999 %"),
        ({"targets": {}}, "no target is given for resnet20"),
        ({"models": ["resnet21"]}, "did you mean 'resnet20'"),
        ({"methods": ["abpm"]}, "did you mean 'apbm'"),
        ({"methods": []}, "methods"),
        ({"recipe": "slow"}, "no recipe 'slow'"),
        ({"recipe_overrides": {"lr": "0.1"}}, "lr"),
        ({"options": {"apbm": {"tau": 1}}}, "'tau' is not a parameter"),
        ({"widths": "dcff"}, "no widths 'dcff'"),
        ({"widths": "dcff-vgg16-cifar10"}, "vgg16's, not resnet20's"),
        ({"recipe_overrides": {"padding": 32}}, "padding is 32, so a random crop of 32 pixels may hold none of the"),
        ({"recipe_overrides": {"padding": 10**30}}, "use at most 31"),
        ({"recipe_overrides": {"padding": 8, "crop": 8}}, "padding is 8, so a random crop of 8 pixels"),
        ({"recipe_overrides": {"crop": 41}}, "crop is 41, larger than the padded image"),
        ({"recipe_overrides": {"padding": 0, "crop": 1}}, "resnet20 cannot train on crops of 1 pixels"),
        ({"recipe_overrides": {"padding": 0, "crop": 7}}, "at least 8, or to None"),
        ({"models": ["vgg16"], "targets": {"vgg16": [0.5]}, "recipe_overrides": {"crop": 24}}, "vgg16 cannot train on"),
        ({"dataset": "mine", "fallback": None, "recipe_overrides": {"crop": 2}}, "resnet20 cannot train on crops of 2"),
        ({"seeds": [0, 0]}, "different"),
        ({"device": "tpu"}, "'tpu'"),
        ({"schedules": ["same"]}, "schedules"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(tmp_path, changes, words):
    with pytest.raises(ConfigError) as error:
        tiny(tmp_path, **changes)
    assert words in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("crop", [8, 24, 40, None])
def test_crops_that_a_network_can_train_on_are_taken(tmp_path, crop):
    (config,) = tiny(tmp_path, methods=["scratch"], recipe_overrides={"crop": crop}).configs()
    assert config.recipe.crop == crop


@pytest.mark.parametrize(
    ("name", "model", "dataset", "by"),
    [
        ("apbm-vgg16-cifar10", "vgg16", "cifar10", "params"),
        ("apbm-vgg16-cifar10", "vgg16", "cifar10", "macs"),
        ("apbm-vgg16-cifar100", "vgg16", "cifar100", "params"),
        ("dcff-resnet56-cifar10", "resnet56", "digits", "params"),
    ],
)
def test_published_widths_take_only_the_target_that_they_meet(tmp_path, name, model, dataset, by):
    widths = PUBLISHED_WIDTHS[name].widths
    classes = 100 if dataset == "cifar100" else 10
    small, dense = build_model(model, classes, widths), build_model(model, classes)
    if by == "params":
        size = [sum(parameter.numel() for parameter in network.parameters()) for network in (small, dense)]
    else:
        size = [count_macs(network, (3, 32, 32)) for network in (small, dense)]
    removed = 1 - size[0] / size[1]

    def study(*targets):
        values = {"methods": ["scratch"], "widths": name, "models": [model], "dataset": dataset, "by": by}
        return Study.of(tmp_path, **values, targets={model: list(targets)})

    for close in (round(removed, 4), removed - 0.004, removed + 0.004):
        assert [config.target for config in study(close).configs()] == [close]
    for wrong in (removed - 0.006, removed + 0.006, 0.05):
        with pytest.raises(ConfigError) as error:
            study(wrong)
        for part in (str(wrong), name, f"{removed:.4f} of the {by}", f"{{'{model}': [{removed:.4f}]}}", "'uniform'"):
            assert part in str(error.value)
    with pytest.raises(ConfigError, match=f"the widths '{name}' are one network.*give one target"):
        study(round(removed, 4), round(removed, 4) + 0.001)


def test_all_wrong_parameters_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        StudyParameters.parse({"epochs": -1, "seed": 3, "workers": "two"})
    assert all(name in str(error.value) for name in ("epochs", "seed", "workers"))


def with_seconds(record, seconds, **config):
    """The record with one phase of so many seconds, and the configuration changed."""
    (first, *_) = record.phases
    phases = [first.model_copy(update={"seconds": seconds})]
    return record.model_copy(update={"phases": phases, "config": record.config.model_copy(update=config)})


def test_equal_time_gives_the_slim_methods_as_many_epochs_as_l1s_time_holds(finished, tmp_path):
    study = Study.of(tmp_path, **(TINY | {"schedules": ["equal", "equal-time"]}))
    seconds = {"apbm": 10.0, "dcff": 31.0, "scratch": 4.0, "l1": 20.5}  # in two epochs
    for record in finished[1]:
        study.results.write(with_seconds(record, seconds.get(record.config.method, 99.0)))
    epochs = {config.method: config.epochs for config in study.equal_time_configs()}
    assert epochs == {"apbm": 4, "dcff": 1, "scratch": 10}


def test_where_l1s_time_holds_no_other_number_of_epochs_the_run_stands_for_both(finished, tmp_path):
    base, records = finished
    values = TINY | {"schedules": ["equal", "published", "equal-time"], "methods": ["apbm", "scratch", "l1", "hrank"]}
    study = Study.of(tmp_path, **values)
    seconds = {"apbm": 10.0, "scratch": 4.0, "l1": 14.9, "hrank": 99.0}  # in two epochs; l1's hold 2 or 7 of theirs
    for record in records:
        if record.config.method in seconds:
            study.results.write(with_seconds(record, seconds[record.config.method]))
    assert [(c.method, c.epochs) for c in study.equal_time_configs()] == [("scratch", 7)]
    (stand_in,) = study.equal_time_stand_ins()
    assert study.results.read(stand_in).config.method == "apbm"
    (said,) = tables.equal_time(study)
    assert said.startswith("ResNet20, 50 %, APBM, seed 0: L1's time holds 2 epochs")


@pytest.mark.parametrize("changes", [{"schedules": ["equal-time"]}, {"methods": ["apbm", "scratch"]}])
def test_equal_time_without_what_gives_the_time_is_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match="'equal-time' gives the time that l1 takes at equal epochs"):
        tiny(tmp_path, **({"schedules": ["equal", "equal-time"]} | changes))


def test_equal_time_runs_are_set_beside_those_whose_time_they_got(finished):
    _, records = finished
    by_method = {record.config.method: record for record in records}
    known = {"apbm": 0.50, "scratch": 0.40, "l1": 0.45, "swp": 0.30}
    equal = [by_method[name].model_copy(update={"test_accuracy": value}) for name, value in known.items()]
    longer = {"schedule": "equal-time", "epochs": 7}
    long = [with_seconds(record, 30.0, **longer) for record in equal[:2]]
    long = [record.model_copy(update={"test_accuracy": record.test_accuracy + 0.25}) for record in long]
    wide = equal[0].model_copy(
        update={"test_accuracy": 0.6, "config": equal[0].config.model_copy(update={"widths": "balanced"})}
    )
    rivals = against_rivals(runs_frame([*equal, *long, wide]))
    found = {
        (row.schedule, row.method, row.rival, row[rivals.columns.get_loc("rival's schedule") + 1]): row.difference
        for row in rivals.itertuples()
    }
    own, slim, own_wide = "apbm", "slim from scratch", "apbm@balanced"
    assert found == {
        ("equal", own, "APBM, balanced widths", "equal"): pytest.approx(-10),
        ("equal", own, slim, "equal"): pytest.approx(10),
        ("equal", own, "L1", "equal"): pytest.approx(5),
        ("equal", own, "SWP", "equal"): pytest.approx(20),
        ("equal", own_wide, slim, "equal"): pytest.approx(20),
        ("equal", own_wide, "L1", "equal"): pytest.approx(15),
        ("equal", own_wide, "SWP", "equal"): pytest.approx(30),
        ("equal-time", own, "APBM, balanced widths", "equal"): pytest.approx(15),
        ("equal-time", own, slim, "equal-time"): pytest.approx(10),
        ("equal-time", own, "L1", "equal"): pytest.approx(30),
        ("equal-time", own, "SWP", "equal"): pytest.approx(45),
    }
    beside_l1 = rivals[(rivals["schedule"] == "equal-time") & (rivals["rival"] == "L1")]
    assert beside_l1["time ratio"].item() == pytest.approx(30 / by_method["l1"].seconds)


def test_the_tables_of_04_have_the_time_of_every_phase(finished, tmp_path):
    study, records = finished
    ((name, (table, caption)),) = tables.targets(records).items()
    assert caption == "ResNet20, scikit-learn digits, 50 % of the params to remove"
    page.Page("04_compare", Study(study.parameters, tmp_path)).table(table, name, caption)
    table = pd.read_csv(tmp_path / "tables" / "04_targets_resnet20_digits_50.csv").set_index("method")
    assert len(table) == len(default_methods())
    for record in records:
        row = table.loc[label(record.config.method)]
        for phase in record.phases:
            assert row[f"{phase.name} (s)"] == pytest.approx(phase.seconds, rel=1e-4)
        told = row[[column for column in table if column.endswith(" (s)")]].sum()
        assert told == pytest.approx(row["training seconds"], rel=1e-4)


def test_the_shared_pretraining_is_started_by_one_run(finished):
    order = [config.method for config in in_order(finished[0].configs())]
    assert order[0] == "hrank" and set(order[-3:]) == {"l1", "fpgm", "random"}


def test_workers_share_the_cores_as_far_as_they_may(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers, threads = plan_workers(0, 100, torch.device("cpu"))
    assert workers == min(4, cores) and threads == max(1, cores // workers)
    assert plan_workers(0, 100, torch.device("cuda"))[0] == 1
    assert plan_workers(3, 2, torch.device("cpu"))[0] == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert plan_workers(1, 100, torch.device("cpu")) == (1, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1000,2")
    assert plan_workers(1, 100, torch.device("cpu")) == (1, cores)


def double(x, report):
    report(f"at {x}")
    if x == 3:
        raise ValueError("three")
    return 2 * x


@pytest.mark.parametrize("workers", [1, 2])
def test_side_by_side_yields_every_result_and_every_error(workers):
    jobs = iter([(1,), (3,), (5,)])
    ended = run_side_by_side(double, lambda: next(jobs, None), workers, 1, print)
    found = {i: (result, error) for i, result, error in ended}
    assert found[0] == (2, None) and found[2] == (10, None)
    assert found[1][0] is None and str(found[1][1]) == "three"


SCRIPT = """
import sys
from apbm_core.study.grid.grid import Study
if __name__ == "__main__":
    Study.of(sys.argv[1], dataset="digits", models=["resnet20"], targets={"resnet20": [0.5]}, epochs=60, workers=2,
             methods=["scratch", "dense"], train_subset=128, test_subset=60).run()
"""


@pytest.mark.slow
def test_workers_die_with_their_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "results"
    parent = subprocess.Popen([sys.executable, str(script), str(folder)], start_new_session=True)
    _wait(lambda: list(folder.rglob("*.ckpt")), 120)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _wait(lambda: not _processes_of(parent.pid), 20)


def _wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def _processes_of(session: int) -> list[int]:
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            alive.append(int(stat.parent.name))
    return alive


def test_dense_counts_come_from_the_models(finished):
    _, records = finished
    dense = build_model("resnet20", 10)
    assert {r.dense_parameters for r in records} == {sum(p.numel() for p in dense.parameters())}


def test_a_method_with_widths_of_its_own_is_a_series_of_its_own(finished, tmp_path):
    _, records = finished
    study = tiny(
        tmp_path, methods=["apbm", "scratch", "l1"], own_widths={"resnet20": {"apbm": "balanced", "l1": "balanced"}}
    )
    configs = study.configs()
    assert [(c.method, c.widths) for c in configs] == [
        ("apbm", "uniform"), ("apbm", "balanced"), ("scratch", "uniform"), ("l1", "uniform"), ("l1", "balanced"),
    ]  # fmt: skip
    assert len({c.id for c in configs}) == 5 and configs[0].id in {r.id for r in records}
    shared = [r for r in records if r.config.method in ("apbm", "scratch", "dense")]
    own = shared[1].model_copy(update={"config": configs[1], "test_accuracy": 0.5})
    frame = runs_frame([*shared, own])
    assert list(frame["method"].cat.categories) == ["dense", "apbm", "apbm@balanced", "scratch"]
    assert frame.set_index("method").loc["apbm@balanced", "accuracy"] == 50
    assert label("apbm@balanced") == "APBM, balanced widths"
    rivals = against_rivals(frame)
    assert list(zip(rivals["method"], rivals["rival"], strict=True)) == [
        ("apbm", "APBM, balanced widths"), ("apbm", "slim from scratch"), ("apbm@balanced", "slim from scratch"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"swp": "balanced"}, "own_widths names 'swp'"),
        ({"dense": "balanced"}, "own_widths names 'dense'"),
        ({"dcff": "balanced"}, "own_widths names 'dcff'"),  # not in this study
        ({"apbm": "balnced"}, "'balnced'; did you mean 'balanced'"),
        ({"apbm": "uniform"}, "the rule 'uniform'"),  # which is the shared one
    ],
)
def test_own_widths_that_cannot_be_are_refused(tmp_path, own, words):
    with pytest.raises(ConfigError, match=words):
        tiny(tmp_path, methods=["dense", "apbm", "swp"], own_widths={"resnet20": own})


@pytest.mark.parametrize(
    ("model", "words"),
    [("resnet2", "no network 'resnet2'; did you mean 'resnet20'"), ("vgg16", "'vgg16', which is not among the")],
)
def test_own_widths_for_another_network_are_refused(tmp_path, model, words):
    with pytest.raises(ConfigError, match=words):
        tiny(tmp_path, methods=["dense", "apbm"], own_widths={model: {"apbm": "balanced"}})


def test_own_widths_are_one_networks(tmp_path):
    models, targets = ["resnet20", "resnet56"], {"resnet20": [0.5], "resnet56": [0.5]}
    own = {"resnet56": {"apbm": "balanced"}}
    configs = tiny(tmp_path, methods=["apbm"], models=models, targets=targets, own_widths=own).configs()
    assert [(c.model, c.widths) for c in configs] == [
        ("resnet20", "uniform"), ("resnet56", "uniform"), ("resnet56", "balanced"),
    ]  # fmt: skip


def test_runs_timed_under_other_conditions_are_named(finished):
    def record(number, **facts):
        base = finished[1][number]
        known = {"device": "Some CPU", "precision": "float32", "threads": 1, "side_by_side": 2, "load": 2.9}
        known["cpu_bfloat16"] = []  # on whatever processor the test runs
        return base.model_copy(update={"environment": base.environment | known | facts})

    (said,) = tables.timing_conditions([record(0), record(1), record(2, load=None)])
    assert said == "3 of 3 runs on Some CPU, float32, 1 thread a run, 2 at a time."
    alone, busy = record(3, side_by_side=1, threads=2), record(4, load=3.1)
    first, second, third = tables.timing_conditions([alone, record(0), record(1), busy])
    assert first == "3 of 4 runs on Some CPU, float32, 1 thread a run, 2 at a time."
    assert second.startswith(
        f"1 of 4 runs on Some CPU, float32, 2 threads a run, 1 at a time: {alone.id}; compare no seconds"
    )
    assert third.endswith(f"their seconds are too many: {busy.id} (load 3.1).")
    _, second = tables.timing_conditions([record(0), record(1), record(2, precision="bfloat16")])
    assert second.startswith("1 of 3 runs on Some CPU, bfloat16, 1 thread a run")


def test_a_title_breaks_between_words_but_not_before_a_percent_sign():
    words = "in the same time: APBM 87.9 %, slim from scratch 88.2 %"
    for width in range(12, 60):
        lines = curves.in_lines(words, width).split("\n")
        assert " ".join(lines) == words and all(len(line) <= width and line[0] != "%" for line in lines)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.6, 0.98, 0.995), "60 % of its fused one in epoch 1, over 99 % after epoch 2 of 3, and 30 % are replaced"),
        ((0.2, 0.3, 0.4), "20 % of its fused one in epoch 1, 40 % in epoch 3, the last, and 30 % are replaced"),
        ((1.0, 1.0, 0.999), "is its fused one throughout, or nearly so, and 30 % are replaced"),
    ],
)
def test_the_course_of_fusion_says_how_much_is_mixed(finished, shares, words):
    _, records = finished
    apbm = next(record for record in records if record.config.method == "apbm")
    rows = [
        {
            "phase": "train",
            "epoch": epoch,
            "fusion": {"own_share": share, "self_mass": 0.5, "entropy": 1.0, "churn": 0.1},
        }
        for epoch, share in enumerate(shares)
    ]
    figure = curves.fusion_course([apbm.model_copy(update={"history": rows})])
    assert words in " ".join(figure.subfigs[0].get_suptitle().split())
    plt.close(figure)


@pytest.mark.parametrize("place", [".", "notebooks", "results/quick"])
def test_a_notebook_finds_the_results_wherever_jupyter_starts_it(tmp_path, monkeypatch, place):
    for folder in ("notebooks/profiles", "results/quick"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / place)
    assert page.from_root("results/own").resolve() == tmp_path / "results" / "own"
    assert page.from_root(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    (tmp_path / "notebooks/profiles/tiny.yaml").write_text("dataset: digits")
    opened = page.open_page("02_train", "tiny", "results/own")
    assert opened.folder.resolve() == tmp_path / "results" / "own" / "tiny"


@pytest.mark.parametrize(
    ("shows_runs", "banner"), [(True, "INCOMPLETE: 10 of 10 runs are not recorded yet."), (False, "")]
)
def test_a_page_of_examples_is_complete_without_records(tmp_path, monkeypatch, capsys, shows_runs, banner):
    monkeypatch.setenv("APBM_RECORDS_ONLY", "1")
    opened = page.open_page("01_method", "smoke", tmp_path, TINY | {"own_widths": {}}, shows_runs=shows_runs)
    assert opened.study.banner == banner
    assert ("not recorded yet" in capsys.readouterr().out) is shows_runs


def test_outside_of_the_repository_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert page.from_root("results") == Path("results")


@pytest.mark.parametrize(("given", "recorded"), [("0123abc", "0123abc"), (None, "unknown")])
def test_outside_of_a_checkout_a_variable_says_which_commit_computes(tmp_path, monkeypatch, given, recorded):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "apbm_core" / "study" / "grid" / "run.py"))
    monkeypatch.delenv("APBM_COMMIT", raising=False)
    if given:
        monkeypatch.setenv("APBM_COMMIT", given)
    run._commit.cache_clear()
    try:
        assert run._commit() == recorded
    finally:
        run._commit.cache_clear()
