"""Configurations, records and their folder: identity, integrity, and what is refused."""

import json

import pytest

from apbm_core.errors import RecordError
from apbm_core.study.records import PhaseRecord, ResultsFolder, RunConfig, RunRecord, read_record
from apbm_core.study.training.recipes import get_recipe


def config(**changes) -> RunConfig:
    values = {"method": "l1", "model": "resnet20", "dataset": "digits", "target": 0.5, "epochs": 2, "seed": 0}
    return RunConfig(**(values | {"recipe": get_recipe("fast")} | changes))


def record(**changes) -> RunRecord:
    run = config(**changes)
    return RunRecord(
        id=run.id,
        config=run,
        test_accuracy=0.123456789012345,
        test_loss=2.25,
        parameters=134_000,
        macs=20_000_000,
        dense_parameters=268_000,
        dense_macs=40_000_000,
        widths={"conv1": 16},
        phases=[
            PhaseRecord(name="pretrain", seconds=1.5, epochs=1, shared=True),
            PhaseRecord(name="finetune", seconds=2.5, epochs=1),
        ],
        history=[{"epoch": 0, "train_loss": 0.1 + 0.2}],
        environment={"device": "cpu"},
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:01:00+00:00",
    )


def test_equal_configurations_have_one_id_and_any_difference_another():
    assert config().id == config().id
    different = [
        config(seed=1),
        config(target=0.6),
        config(epochs=3),
        config(recipe=get_recipe("fast", lr=0.1)),
        config(options={"alpha": 1.0}),
        config(split="tuning"),
    ]
    assert len({run.id for run in [config(), *different]}) == 7


def test_the_id_survives_json():
    run = config(recipe=get_recipe("paper"))
    assert RunConfig.model_validate(json.loads(run.model_dump_json())).id == run.id


def test_a_record_comes_back_as_it_was(tmp_path):
    folder, original = ResultsFolder(tmp_path), record()
    folder.write(original)
    assert folder.read(original.config) == original
    assert folder.read_all() == [original]
    assert folder.read(config(seed=5)) is None
    assert original.seconds == 4.0 and original.parameters_removed == 0.5 and original.macs_removed == 0.5
    assert not list(tmp_path.rglob("*.tmp"))


FAULTS = {
    "an accuracy edited": (lambda text: text.replace("0.123456789012345", "0.923456789012345"), "changed after it was"),
    "a seed edited": (lambda text: text.replace('"seed": 0', '"seed": 1'), "changed after it was written"),
    "truncated": (lambda text: text[: len(text) // 2], "not a complete run record"),
    "empty": (lambda text: "", "not a complete run record"),
    "not a mapping": (lambda text: "[]", "not a complete run record"),
    "no checksum": (lambda text: text.replace("checksum", "chequesum"), "not a complete run record"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_edited_record_is_refused_by_name(tmp_path, fault):
    damage, words = FAULTS[fault]
    folder, original = ResultsFolder(tmp_path), record()
    path = folder.write(original)
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordError, match=words) as error:
        folder.read(original.config)
    assert path.name in str(error.value) and "delete it" in str(error.value)


def test_a_record_under_another_name_is_refused(tmp_path):
    folder, original = ResultsFolder(tmp_path), record()
    path = folder.write(original)
    other = folder.record_path(config(seed=9))
    path.rename(other)
    with pytest.raises(RecordError, match="one of the two names is wrong"):
        read_record(other)


def test_locks_exclude_each_other(tmp_path):
    folder = ResultsFolder(tmp_path)
    with folder.lock("run"):
        assert not _can_lock(folder, "run") and _can_lock(folder, "another")
    assert _can_lock(folder, "run")


def _can_lock(folder: ResultsFolder, name: str) -> bool:
    from filelock import Timeout

    lock = folder.lock(name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True
