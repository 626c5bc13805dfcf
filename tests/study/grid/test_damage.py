"""Damaged files and folders, met by a whole study: each is refused by name with what to do, and nothing else is lost.

The faults of single files are in test_data_faults.py (data sets), test_data.py (the cache), test_checkpoint.py and
test_records.py; here they are met through ``Study.run`` and the notebooks' command line. docs/faults.md lists them all.
"""

import io
import json
import os
import shutil

import kill_study
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from fake_data import encode, make_pixels, write_parquet, write_parquet_cifar10
from kill_study import GRID, outcome

from apbm_core.errors import ApbmError, DataError, RecordError
from apbm_core.files import sha256
from apbm_core.study.grid import grid, run
from apbm_core.study.grid.grid import Study
from apbm_core.study.pages import runner

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete")


def tiny(folder, **changes) -> Study:
    return Study.of(folder, **(GRID | {"methods": ["l1"], "workers": 1} | changes))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So that runs repeat bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "plan_workers", lambda *arguments: (1, 1))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread):
    """A finished study of l1 and fpgm, with the work folders as they were just before each run was recorded."""
    folder = tmp_path_factory.mktemp("finished") / "grid"
    grid = tiny(folder, methods=["l1", "fpgm"])
    rmtree, kept = shutil.rmtree, {}

    def keep(path, **keywords):
        kept[path.name] = shutil.copytree(path, folder.parent / "kept" / path.name)
        rmtree(path, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.shutil, "rmtree", keep)
        records = {record.config.method: record for record in grid.run()}
    return folder, kept, records


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of that study in which l1's run is about to be recorded: (study, its work folder, the whole record)."""
    folder, kept, records = finished
    copy = shutil.copytree(folder, tmp_path / "grid")
    again = tiny(copy)
    config = records["l1"].config
    again.results.record_path(config).unlink()
    work = again.results.work_folder(config.id)
    shutil.copytree(kept[config.id], work, dirs_exist_ok=True)
    return again, work, records["l1"]


def flip(position: float):
    """Damage: one bit of the file, at this share of its length."""

    def damage(content: bytes) -> bytes:
        place = int(position * len(content))
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return damage


class CreatesAFolder:
    """Unpickling an instance runs os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def malicious(content: bytes) -> bytes:
    """A checkpoint whose digest is right and whose payload would create the folder ./code-ran."""
    buffer = io.BytesIO()
    torch.save({"model": CreatesAFolder("code-ran")}, buffer)
    identity = content.split(b"\n", 1)[0].split(b" ", 3)[3]
    body = identity + b"\n" + buffer.getvalue()
    return b"APBM-CHECKPOINT 1 %s %s" % (sha256(body).encode(), body)


CHECKPOINT_FAULTS = {
    "empty": (lambda content: b"", "not a checkpoint of this package, or its beginning is damaged"),
    "truncated": (lambda content: content[:-1000], "its content does not match its SHA-256 digest"),
    "a bit flipped": (flip(0.5), "its content does not match its SHA-256 digest"),
    "pickled code, with a right digest": (malicious, "so it was not loaded: loading it could run code"),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
@pytest.mark.parametrize("which", ["phase", "shared pre-training"])
def test_a_damaged_checkpoint_stops_its_run_and_deleting_it_helps(interrupted, monkeypatch, tmp_path, which, fault):
    again, work, whole = interrupted
    monkeypatch.chdir(tmp_path)
    damage, words = CHECKPOINT_FAULTS[fault]
    path = work / "finetune.ckpt" if which == "phase" else next(again.results.work.glob("pretrain-*/*.ckpt"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ApbmError) as error:
        again.run()
    message = str(error.value)
    assert "1 of 1 runs failed" in message and str(path) in message and words in message
    assert "Delete it to start this phase again." in message and not (tmp_path / "code-ran").exists()
    path.unlink()
    assert outcome(again.run()[0]) == outcome(whole)


def test_a_checkpoint_of_another_configuration_is_refused_and_both_are_named(interrupted, finished):
    again, work, whole = interrupted
    _, kept, records = finished
    other = records["fpgm"].config.id
    shutil.copy(kept[other] / "finetune.ckpt", work / "finetune.ckpt")
    with pytest.raises(ApbmError) as error:
        again.run()
    assert f"it holds:  {other}/finetune" in str(error.value) and f"wanted:    {whole.id}/finetune" in str(error.value)


REMEMBERED_FAULTS = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not a mapping": lambda text: "[]",
    "a digit edited": lambda text: text.replace(": [0,", ": [1,", 1) if ": [0," in text else text.replace("1", "2", 1),
    "no checksum": lambda text: json.dumps({key: json.loads(text)[key] for key in ("value", "seconds")}),
}


@pytest.mark.parametrize("fault", REMEMBERED_FAULTS)
def test_a_damaged_result_of_a_phase_stops_its_run_and_deleting_it_helps(interrupted, fault):
    again, work, whole = interrupted
    path = work / "score.json"
    path.write_text(REMEMBERED_FAULTS[fault](path.read_text()))
    with pytest.raises(ApbmError) as error:
        again.run()
    assert f"CheckpointError: {path} is damaged (" in str(error.value)
    assert "delete it, and it is computed again" in str(error.value)
    path.unlink()
    assert outcome(again.run()[0]) == outcome(whole)


RECORD_FAULTS = {
    "edited by hand": (lambda text: text.replace('"seed": 0', '"seed": 1'), "was changed after it was written"),
    "truncated": (lambda text: text[: len(text) // 2], "is not a complete run record"),
    "not text": (lambda text: "\x00\x01", "is not a complete run record"),
}


@pytest.mark.parametrize("fault", RECORD_FAULTS)
def test_a_damaged_record_is_refused_before_anything_runs_and_deleting_it_helps(finished, tmp_path, monkeypatch, fault):
    folder, _, records = finished
    again = tiny(shutil.copytree(folder, tmp_path / "grid"), methods=["fpgm", "l1", "random"])
    damage, words = RECORD_FAULTS[fault]
    path = again.results.record_path(records["fpgm"].config)
    path.write_text(damage(path.read_text()))
    with monkeypatch.context() as patch:
        patch.setattr("apbm_core.study.grid.work.execute", lambda *arguments: pytest.fail("a run was started"))
        with pytest.raises(RecordError, match=words) as error:
            again.run()
    assert path.name in str(error.value) and "delete it and the run is repeated" in str(error.value)
    path.unlink()
    assert [outcome(record) for record in tiny(again.results.path, methods=["fpgm"]).run()] == [
        outcome(records["fpgm"])
    ]


UNWRITABLE = {
    "a file in the folder's place": lambda tmp_path: tmp_path / "file",
    "a file in a parent's place": lambda tmp_path: tmp_path / "file" / "deeper",
    "a file system that takes no files": lambda tmp_path: "/proc/apbm",
}


@pytest.mark.parametrize("fault", UNWRITABLE)
def test_an_unwritable_results_folder_is_named_before_anything_is_trained(tmp_path, monkeypatch, fault):
    (tmp_path / "file").write_text("in the way")
    folder = UNWRITABLE[fault](tmp_path)
    monkeypatch.setattr(
        "apbm_core.study.methods.task.train", lambda *arguments, **keywords: pytest.fail("a training was started")
    )
    with pytest.raises(ApbmError) as error:
        tiny(folder).run()
    assert f"ApbmError: cannot write to {folder}: " in str(error.value)
    assert "choose a folder you may write to" in str(error.value)
    assert (tmp_path / "file").read_text() == "in the way"


# ---- the data ----


def _rewrite(path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def _another_schema(path) -> None:
    pa.parquet.write_table(pa.table({"picture": [b"x"], "label": [1]}), path)


DATA_FAULTS = {
    "truncated parquet": (lambda p: _rewrite(p, lambda c: c[: len(c) // 3]), "not a readable Parquet file"),
    "a bit flipped in an image": (
        lambda p: _rewrite(p, lambda c: c.replace(i := encode(make_pixels(20, 0)[7]), flip(0.5)(i))),
        "image 7 cannot be decoded",
    ),
    "wrong columns": (_another_schema, "needs a struct column 'img'"),
    "31 x 31 pixels": (lambda p: write_parquet(p, make_pixels(20, 0, size=31), [0] * 20), "is 31 x 31 pixels"),
    "a label out of range": (
        lambda p: write_parquet(p, make_pixels(3, 0), [0, 11, 2]),
        "has the label 11, outside 0..9",
    ),
    "a missing split": (lambda p: p.unlink(), "is missing"),
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The training file of a small CIFAR-10, found through the environment, with a cache of its own."""
    write_parquet_cifar10(tmp_path / "data", train=40, test=20)
    monkeypatch.setenv("APBM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("APBM_CACHE", str(tmp_path / "cache"))
    for cached in (run._dataset, grid._load):
        cached.cache_clear()
    yield tmp_path / "data" / "cifar10" / "train.parquet"
    for cached in (run._dataset, grid._load):
        cached.cache_clear()


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_damaged_data_stop_the_study_before_anything_is_trained(data, tmp_path, fault):
    damage, words = DATA_FAULTS[fault]
    damage(data)
    again = tiny(tmp_path / "grid", dataset="cifar10", train_subset=None, test_subset=None)
    with pytest.raises(ApbmError) as error:
        again.run()
    assert isinstance(error.value, DataError) or "DataError: " in str(error.value)
    assert str(data) in str(error.value) and words in str(error.value)
    assert not list(again.results.path.rglob("*.ckpt")) and not list(again.results.path.rglob("*.json"))


def test_damaged_data_are_not_hidden_by_the_fallback(data, tmp_path, capsys):
    DATA_FAULTS["truncated parquet"][0](data)
    again = tiny(tmp_path / "grid", dataset="cifar10", fallback="digits")
    assert again.dataset == "digits" and again.banner.startswith("NOT cifar10")
    said = capsys.readouterr().err
    assert f"{data} is not a readable Parquet file" in said and "Using digits instead." in said


# ---- through the command line ----


@pytest.fixture
def root(tmp_path):
    """A repository with one notebook, which runs l1, and a rendered page of an earlier time."""
    root = kill_study.make_repository(tmp_path / "root")
    for path in (root / "notebooks").glob("*.ipynb"):
        path.unlink()
    cells = (kill_study.ONE_THREAD, kill_study.STUDY_CELL, kill_study.FINDING)
    kill_study.write_notebook(root, "01_grid", *cells)
    (root / "results/own/tiny").mkdir(parents=True)
    (root / "results/own/tiny" / "01_grid.html").write_text("what was rendered before")
    return root


def _damage_record(folder):
    path = next((folder / "runs").glob("*-l1-*.json"))
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    return path


def _damage_pretraining(folder):
    next((folder / "runs").glob("*-l1-*.json")).unlink()
    path = next((folder / "work").glob("pretrain-*/*.ckpt"))
    path.write_bytes(flip(0.5)(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(
            _damage_record, "Restore it from version control, or delete it and the run is repeated", id="record"
        ),
        pytest.param(
            _damage_pretraining, "Delete it to start this phase again", id="pre-training", marks=pytest.mark.slow
        ),
    ],
)
def test_the_command_line_names_the_damaged_file_and_keeps_what_was_rendered(finished, root, capsys, damage, words):
    folder = root / "results/own/tiny"
    shutil.copytree(finished[0], folder, dirs_exist_ok=True)
    path = damage(folder)
    assert runner.main(["run", "--profile", "tiny", "methods=[l1]"], root) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 01_grid: ") and path.name in error and words in error
    assert "The notebook with its traceback is results/own/tiny/failed/01_grid.ipynb" in error
    assert (folder / "01_grid.html").read_text() == "what was rendered before"


def test_the_command_line_refuses_a_profile_that_is_no_text(root, capsys):
    (root / "notebooks" / "profiles" / "tiny.yaml").write_bytes(b"epochs: 3\xff")
    assert runner.main(["run", "--profile", "tiny"], root) == 1
    assert "error: profile tiny cannot be read as UTF-8 text" in capsys.readouterr().err
