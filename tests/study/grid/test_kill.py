"""Nothing finished is lost and nothing half written is left: SIGKILL, a full disk, Ctrl-C, two at once."""

import json
import os
import re
import resource
import signal
import subprocess
from collections import Counter

import kill_study
import pytest
import torch
from kill_study import GRID, SCRIPT, Command, check_results, outcome, undisturbed, wait_until

from apbm_core.errors import ApbmError
from apbm_core.files import remove_stale_temporaries, write_atomically
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.run import execute
from apbm_core.study.pages import runner
from apbm_core.study.records import read_record


@pytest.fixture
def noted(record_property):
    """Puts kills into the test report, which lists them at its end."""

    def note(kills):
        for kill in kills:
            record_property("fault", str(kill))
        return kills

    return note


def half_written(kills, what: str) -> int:
    """How many kills left a half-written file of this kind."""
    return sum(any(what in name for name in kill.half_written) for kill in kills)


def test_a_grid_killed_while_writing_a_checkpoint_and_a_record_ends_as_if_undisturbed(tmp_path, noted):
    moments = ["a checkpoint being written", "a record being written"]
    kills = noted(kill_study.kill_grid(tmp_path, 2, methods=("apbm", "l1"), moments=moments))
    assert [kill.moment for kill in kills] == moments
    assert half_written(kills, ".ckpt.") and half_written(kills, ".json.")


@pytest.mark.slow
def test_a_grid_of_six_methods_killed_twenty_times_ends_as_if_undisturbed(tmp_path, noted):
    kills = noted(kill_study.kill_grid(tmp_path, 20))
    assert len(kills) == 20 and set(Counter(kill.moment for kill in kills)) == set(kill_study.MOMENTS)
    assert half_written(kills, ".ckpt.") >= 2 and half_written(kills, ".json.") and half_written(kills, ".safetensors.")
    assert any(kill.only_parent for kill in kills)


def test_notebooks_killed_while_a_page_is_written_end_as_if_undisturbed(tmp_path, noted):
    kills = noted(kill_study.kill_notebooks(tmp_path, 1, moments=["a page being written"]))
    assert kills[0].half_written


@pytest.mark.slow
def test_notebooks_killed_while_they_execute_and_render_end_as_if_undisturbed(tmp_path, noted):
    moments = list(kill_study.NOTEBOOK_MOMENTS)
    kills = noted(kill_study.kill_notebooks(tmp_path, len(moments), moments=moments))
    assert [kill.moment for kill in kills] == moments and half_written(kills, ".ipynb.")


# ---- what a killed process leaves behind ----


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A study of one run that is recorded: (study, its only configuration)."""
    monkeypatch.setattr("apbm_core.study.grid.work.plan_workers", lambda *arguments: (1, 1))
    study = Study.of(tmp_path / "grid", **GRID | {"methods": ["scratch"], "epochs": 1, "workers": 1})
    return study, study.run()[0].config


def test_work_of_a_run_killed_between_its_record_and_its_clean_up_goes_at_the_next_start(finished):
    study, config = finished
    folder = study.results.work_folder(config.id)
    folder.mkdir()
    (folder / "train.ckpt").write_bytes(b"the last checkpoint")
    study.run()
    assert not folder.exists()


def test_half_written_files_of_a_run_go_when_it_starts_again(finished):
    study, config = finished
    results = study.results
    stale = [results.runs / f".{config.id}.json.k2j.tmp", results.networks / f".{config.id}.safetensors.k2j.tmp"]
    other = results.runs / ".another-run.json.k2j.tmp"  # whose writer may be alive, under another lock
    for path in (*stale, other):
        path.write_text("half")
    results.record_path(config).unlink()
    study.run()
    assert not any(path.exists() for path in stale) and other.exists()


def test_half_written_pages_figures_and_tables_go_when_the_next_reproduction_starts(tmp_path):
    root = kill_study.make_repository(tmp_path / "root")
    for path in (root / "notebooks").glob("*.ipynb"):
        path.unlink()
    kill_study.write_notebook(root, "01_short", "print(1)")
    names = ["tiny/.01_short.ipynb.a.tmp", "tiny/figures/.loss.png.a.tmp", "tiny/tables/.final.csv.a.tmp"]
    names += ["tiny/failed/.01_short.ipynb.a.tmp", "tiny/.executing/01_short.ipynb", ".index.html.old.tmp"]
    for path in [root / "results/own" / name for name in [*names, ".index.html.new.tmp"]]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
        if "old" in path.name:
            os.utime(path, (0, 0))
    assert runner.main(["run", "--profile", "tiny"], root) == 0
    assert not [name for name in names if (root / "results/own" / name).exists()]
    assert (root / "results/own/.index.html.new.tmp").exists()  # of another profile's reproduction, perhaps


def test_stale_temporaries_are_told_from_those_being_written(tmp_path):
    for name in (".a[1].json.x.tmp", ".a1.json.x.tmp", "a[1].json", ".hidden"):
        (tmp_path / name).write_text("")
    assert remove_stale_temporaries(tmp_path, older_than=3600) == 0
    assert remove_stale_temporaries(tmp_path, "a[1]") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a1.json.x.tmp", ".hidden", "a[1].json"]
    assert remove_stale_temporaries(tmp_path / "absent") == 0


# ---- a full disk ----


class FileSizeLimit:
    """No file may grow beyond ``size`` bytes; stands for a full disk where no file system can be mounted."""

    def __init__(self, folder):
        self.folder, self.limits = folder, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, room: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, self.limits[1]))

    def empty(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


class SmallDisk:
    """A file system of 12 MB, filled up by a ballast file."""

    def __init__(self, folder):
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self, room: int) -> None:
        disk = os.statvfs(self.folder)
        with self.ballast.open("wb") as file:
            file.write(bytes(max(0, disk.f_bavail * disk.f_frsize - room)))

    def empty(self) -> None:
        self.ballast.unlink(missing_ok=True)


@pytest.fixture(params=[SmallDisk, FileSizeLimit])
def disk(request, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param is SmallDisk:
        mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
        try:
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system needs root")
    disk = request.param(folder)
    yield disk
    disk.empty()
    if request.param is SmallDisk:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


FULL = "(No space left on device|File too large). Free some space or choose a folder you may write to; what was there "


def test_a_full_disk_leaves_the_old_version_and_says_what_to_do(disk):
    path = write_atomically(disk.folder / "page.html", "old")
    disk.fill(50_000)
    with pytest.raises(ApbmError, match=re.escape(f"cannot write {path}: ") + FULL):
        write_atomically(path, bytes(100_000))
    disk.empty()
    assert path.read_text() == "old" and sorted(p.name for p in disk.folder.iterdir()) == ["page.html"]


@pytest.mark.parametrize(("after", "unwritable"), [(1, "train.ckpt"), (2, "networks/")])
def test_a_run_that_meets_a_full_disk_goes_on_from_its_checkpoint_when_there_is_room(disk, after, unwritable):
    results = disk.folder / "grid"
    study = Study.of(results, **GRID | {"methods": ["scratch"]})
    (config,) = study.configs()

    def interrupt(standing):
        if standing.epochs == after:
            raise KeyboardInterrupt

    torch.set_num_threads(1)
    with pytest.raises(KeyboardInterrupt):
        execute(config, str(results), "cpu", 1, report=interrupt)
    checkpoint = results / "work" / config.id / "train.ckpt"
    before = checkpoint.read_bytes()
    disk.fill(50_000)
    with pytest.raises(ApbmError, match=f"cannot write .*{unwritable}.*{FULL}"):
        execute(config, str(results), "cpu", 1)
    disk.empty()
    assert checkpoint.read_bytes() == before and not list(results.rglob(".*.tmp"))

    steps = []
    record = execute(config, str(results), "cpu", 1, report=steps.append)
    assert len(steps) == 2 * (2 - after)  # two an epoch: what was finished is not repeated
    (whole,) = undisturbed(disk.folder.parent / "undisturbed" / "grid", ["scratch"])
    assert outcome(record) == outcome(whole)


def test_a_reproduction_that_meets_a_full_disk_leaves_the_rendered_notebooks(disk, tmp_path, capsys):
    root = kill_study.make_repository(tmp_path / "root")
    for path in (root / "notebooks").glob("*.ipynb"):
        path.unlink()
    kill_study.write_notebook(root, "01_short", "print(('x' * 79 + chr(10)) * 2000)")
    arguments = ["run", "--profile", "tiny", "--results", str(disk.folder)]
    assert runner.main(arguments, root) == 0
    before = {path: path.read_bytes() for path in disk.folder.rglob("*.*") if path.is_file()}
    disk.fill(50_000)
    assert runner.main(arguments, root) == 1
    disk.empty()
    error = capsys.readouterr().err
    assert "error: cannot write" in error and ("No space left" in error or "File too large" in error)
    after = {path: path.read_bytes() for path in disk.folder.rglob("*.*") if path.is_file()}
    assert {path.name for path in after} == {path.name for path in before}
    assert all(after[path] == content for path, content in before.items() if path.suffix in (".ipynb", ".html"))


# ---- Ctrl-C, and two at once ----


@pytest.mark.slow
def test_ctrl_c_and_a_second_reproduction_through_the_command_line(tmp_path):
    """While one reproduction trains, a second is refused; Ctrl-C ends the first, and the same command goes on."""
    root = kill_study.make_repository(tmp_path / "root")
    kill_study.write_notebook(root, "02_table", "methods = ['apbm', 'scratch']", kill_study.STUDY_CELL)
    results = root / "results" / "own" / "tiny"
    arguments = ["-m", "apbm_core.study.pages.runner", "run", "--profile", "tiny"]
    first = Command(arguments, root, fsync_seconds=1.0)
    try:
        wait_until(lambda: (results / ".executing").exists() or first.is_over(), "the first notebook")
        second = Command(arguments, root)
        assert second.finish() == 1
        holder = f"{results} is being written by process {first.process.pid} on "
        assert holder in second.output and "wait for it to end, or choose another folder" in second.output
        wait_until(lambda: any(results.glob("work/*scratch*/*.ckpt")) or first.is_over(), "the second notebook's run")
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(60) == 130
        wait_until(lambda: not first.alive(), "the kernel to end")
    finally:
        first.kill()
    assert "interrupted in 02_table. Finished and in results/own/tiny: 01_grid." in first.output
    assert "The same command goes on from here: recorded runs are not repeated." in first.output
    assert "Traceback" not in first.output and "Task exception" not in first.output
    recorded = {path: path.read_bytes() for path in results.glob("runs/*.json")}
    assert len(recorded) == 1 and (results / "01_grid.html").exists() and not (results / "02_table.ipynb").exists()
    third = Command(arguments, root)
    assert third.finish() == 0, third.output
    assert all(path.read_bytes() == content for path, content in recorded.items())
    assert len(list(results.glob("runs/*.json"))) == 2 and (results / "02_table.html").exists()


def test_of_two_grids_at_once_each_run_is_carried_out_by_one(tmp_path):
    script, results = tmp_path / "grid.py", tmp_path / "results" / "grid"
    script.write_text(SCRIPT)
    methods = ["scratch", "l1", "random"]
    arguments = [str(script), str(results), json.dumps(GRID | {"methods": methods, "workers": 1})]
    grids = [Command(arguments, tmp_path, fsync_seconds=0.1) for _ in range(2)]
    assert [grid.finish() for grid in grids] == [0, 0], [grid.output for grid in grids]
    records = [read_record(path) for path in results.glob("runs/*.json")]
    started = (tmp_path / "carried-out.txt").read_text().split()
    assert sorted(started) == sorted(record.id for record in records) and len(started) == 3
    shared = [phase.seconds for record in records for phase in record.phases if phase.shared]
    assert len(shared) == 2 and len(set(shared)) == 1  # the pre-training, too, was carried out once
    for grid in grids:
        assert all(record.id in grid.output for record in records)


@pytest.mark.slow
def test_a_killed_worker_is_not_called_a_bug_of_the_study(tmp_path):
    """The system's out-of-memory killer takes single processes: the message says what may have been, and what helps."""
    script, results = tmp_path / "grid.py", tmp_path / "results" / "grid"
    script.write_text(SCRIPT)
    arguments = [str(script), str(results), json.dumps(GRID | {"methods": ["scratch", "apbm"]})]
    grid = Command(arguments, tmp_path, fsync_seconds=0.3)
    try:
        wait_until(lambda: any(results.glob("work/*/.*.tmp")) or grid.is_over(), "a worker to train")
        workers = [pid for pid in grid.alive() if pid != grid.process.pid and _is_spawned_worker(pid)]
        os.kill(workers[0], signal.SIGKILL)
        assert grid.process.wait(60) == 1
        wait_until(lambda: not grid.alive(), "the other worker to end")
    finally:
        grid.kill()
    assert "2 of 2 runs failed" in grid.output
    assert "a worker process was killed, perhaps because memory ran out. The same command goes on" in grid.output
    again = Command(arguments, tmp_path)
    assert again.finish() == 0, again.output
    check_results(results, undisturbed(tmp_path / "undisturbed" / "grid", ["scratch", "apbm"]))


def _is_spawned_worker(pid: int) -> bool:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"spawn_main" in file.read()
