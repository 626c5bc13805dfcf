"""A calibration gives every run its time from phases that were measured apart, and leaves the runs as they are."""

import json

import pytest
import torch
from fake_records import fake_record

from apbm_core.errors import RecordError
from apbm_core.study.data.datasets import load_dataset
from apbm_core.study.grid import calibration as module
from apbm_core.study.grid.budget import Estimates
from apbm_core.study.grid.calibration import Cost, ensure, fit, kind, read
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.pages.runner import main
from apbm_core.study.report.claims import claims_frame
from apbm_core.study.report.frames import phase_frame, runs_frame

CPU = torch.device("cpu")


def test_a_phase_costs_its_median_step_and_what_an_epoch_takes_beyond():
    epochs = [
        [9.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0],
        [2.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.5],
    ]  # warm-up; scored at steps 0 and 3
    cost = fit(epochs, images=70)
    assert cost.per_image == pytest.approx(0.1) and cost.per_epoch == pytest.approx(3.5)
    assert fit([[7.0, 1.0, 1.0, 1.0]], images=40).per_epoch == 0  # nothing but the warm-up
    slow_then_fast = fit([[2.0] * 4, [1.0] * 4], images=40)  # banks dropped half way
    assert slow_then_fast.per_image == pytest.approx(0.15)


def test_seconds_are_images_and_epochs_times_their_cost():
    (phase, *_) = fake_record("dense", 0.9).phases
    expected = phase.images * 0.002 + phase.epochs * 3 + 5
    assert Cost(per_image=0.002, per_epoch=3, once=5).seconds(phase) == pytest.approx(expected)


def test_runs_of_any_seed_and_length_are_of_one_kind():
    base = fake_record("apbm", 0.9).config
    same = [{"seed": 5}, {"epochs": 22, "schedule": "equal-time"}, {"split": "tuning"}, {"train_subset": 20_000}]
    assert {kind(base.model_copy(update=change)) for change in same} == {kind(base)}
    other = [{"target": 0.5}, {"model": "vgg16"}, {"widths": "balanced"}, {"schedule": "published"}]
    assert len({kind(base.model_copy(update=change)) for change in other} | {kind(base)}) == 5


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Calibrated methods of every kind, two steps an epoch, two rounds."""
    folder = tmp_path_factory.mktemp("results")
    methods = ["dense", "apbm", "hrank", "l1", "polarization", "swp"]
    parameters = StudyParameters.parse(
        dict(dataset="digits", models=["resnet20"], methods=methods, targets={"resnet20": [0.5]}, epochs=3)
        | {"train_subset": 64, "test_subset": 60, "recipe_overrides": {"batch_size": 16, "precision": "float32"}}
    )
    configs = parameters.run_configs("digits")

    split = load_dataset("digits").split("final", 0, 64, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 3)
        patch.setattr(module, "ROUNDS", 2)
        found = ensure(configs, folder, split, CPU, threads=1)
        patch.setattr(module, "_measure", lambda *_: pytest.fail("it was measured again"))
        again = ensure(configs, folder, split, CPU, threads=1)
    assert again == found
    return folder, configs, found


def test_every_phase_of_every_method_is_measured_in_each_round(calibrated):
    folder, configs, found = calibrated
    phases = {config.method: found.runs[kind(config)] for config in configs}
    assert {name: sorted(costs) for name, costs in phases.items()} == {
        "dense": ["train"],
        "apbm": ["train"],
        "hrank": ["finetune", "pretrain", "score"],
        "l1": ["finetune", "pretrain", "score"],
        "polarization": ["finetune", "score", "sparse"],
        "swp": ["finetune", "score", "sparse"],
    }
    assert all(len(costs) == 2 for of_run in phases.values() for costs in of_run.values())
    assert phases["hrank"]["pretrain"] == phases["l1"]["pretrain"]  # shared, so measured once a round
    assert all(cost.per_image > 0 for cost in phases["swp"]["finetune"])
    assert read(folder, CPU) == read(folder) == found
    assert not (folder / "work").exists() and not (folder / "runs").exists()


def test_a_run_to_come_is_estimated_from_its_phases(calibrated):
    _, configs, found = calibrated
    l1 = next(config for config in configs if config.method == "l1").model_copy(update={"epochs": 30, "seed": 7})
    mean = {name: [sum(c.model_dump()[key] for c in costs) / 2 for key in ("per_image", "per_epoch", "once")]
            for name, costs in found.runs[kind(l1)].items()}  # fmt: skip
    by_hand = mean["score"][2]
    for name, epochs in (("pretrain", 10), ("finetune", 20)):
        by_hand += epochs * (1000 * mean[name][0] + mean[name][1])
    assert found.estimate(l1, images=1000) == pytest.approx(by_hand)
    assert found.estimate(l1.model_copy(update={"target": 0.6}), images=1000) is None
    elsewhere = found.model_copy(update={"environment": found.environment | {"device": "another"}})
    here = Estimates(CPU, 1, 1, num_images=1000, side=32, calibration=found)
    assert here.seconds(l1) == found.estimate(l1, 64) and not Estimates(CPU, 1, 1, 9, 8, elsewhere)._is_calibrated
    unnoted = {
        name: {phase: [cost.model_copy(update={"share": 0.0}) for cost in costs] for phase, costs in phases.items()}
        for name, phases in found.runs.items()
    }
    assert found.model_copy(update={"runs": unnoted}).estimate(l1, 1000) is None


def test_runs_as_short_as_a_calibration_are_not_calibrated(calibrated, tmp_path):
    _, configs, _ = calibrated
    digits = load_dataset("digits").split("final", 0, 64, 60)
    assert ensure(configs, tmp_path, digits, CPU, 1) is None  # 4 steps an epoch, fewer than STEPS
    assert not list(tmp_path.iterdir())


def test_tables_show_calibrated_seconds_where_all_phases_are_known(calibrated):
    _, configs, found = calibrated
    own = {"dataset": "digits", "recipe": configs[0].recipe, "target": 0.5}
    options = {config.method: config.options for config in configs}
    records = [fake_record(name, 0.9, options=options[name], **own) for name in ("apbm", "l1")]
    stranger = fake_record("fpgm", 0.9, **own)
    frame = runs_frame([*records, stranger], found).set_index("method")
    assert frame.loc["apbm", "training seconds"] == pytest.approx(found.seconds(records[0]))
    assert frame.loc["fpgm", "training seconds"] == stranger.seconds
    assert frame.loc["l1", "timed on"].endswith("calibrated") and not frame.loc["fpgm", "timed alike"]
    phases = phase_frame(records, found)
    assert phases.groupby("method")["seconds"].sum()["l1"] == pytest.approx(found.seconds(records[1]))


def test_a_claim_about_time_is_judged_by_the_rounds(calibrated):
    _, _, found = calibrated
    records = [fake_record(name, 0.9, model="resnet56", target=0.4884) for name in ("apbm", "hrank")]
    costs = {"apbm": (1.0, 1.02, 0.99), "hrank": (2.0, 2.01, 2.03)}
    runs = {
        kind(record.config): {
            phase.name: [Cost(once=value) for value in costs[record.config.method]] for phase in record.phases[:1]
        }
        for record in records
    }
    records = [record.model_copy(update={"phases": record.phases[:1]}) for record in records]
    table = claims_frame(records, found.model_copy(update={"runs": runs})).set_index("claim")
    assert table.loc["less training time than HRank", "verdict"] == "supported"  # one seed, but three rounds
    assert table.loc["less training time than HRank", "measured"].startswith("0.50 times the time (0.4")


def test_a_damaged_calibration_is_refused(calibrated, tmp_path):
    folder, *_ = calibrated
    (path,) = (folder / "calibration").glob("*.json")
    content = json.loads(path.read_text()) | {"machine": "a faster one"}
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / path.name).write_text(json.dumps(content))
    with pytest.raises(RecordError, match="was changed after it was written.*Delete it, and the machine is calibrated"):
        read(tmp_path, CPU)
    assert read(tmp_path / "nowhere") is None


def test_the_command_line_leaves_short_runs_alone(tmp_path, capsys):
    assert main(["calibrate", "--profile", "smoke", "--results", str(tmp_path)]) == 0
    assert "too short to be calibrated" in capsys.readouterr().out
    assert main(["calibrate", "--profile", "quick", "--results", str(tmp_path), "--only", "01_method"]) == 0
    assert capsys.readouterr().out == ""  # a page that shows no times
