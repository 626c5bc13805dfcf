"""Kill a study with SIGKILL again and again, restart it until it is done, and compare it with one left alone.

    python -m tests.kill_study --kills 20                 a grid of runs, two at a time
    python -m tests.kill_study --kills 8 --notebooks      the same through `python -m apbm_core.study.pages run`

The moments are drawn from ``--seed``. Left to chance, a kill would hardly ever fall into the milliseconds in which a
file is written, so the study under test saves at every step, its fsync takes a while, and a kill waits for its moment.
Every kill is printed with what it left half written. The last restart ends by itself; then every run must be recorded
once, equal to the undisturbed run but for its times, and nothing half written may be left.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import torch

from apbm_core.files import sha256
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.run import execute
from apbm_core.study.records import RunRecord, read_record

REPOSITORY = Path(__file__).parents[3]
SHARED = ("pretrain-", "sparse-")  # what several runs use stays in the work folder
METHODS = ("dense", "apbm", "dcff", "scratch", "l1", "fpgm")
GRID = {
    "dataset": "digits", "models": ["resnet20"], "targets": {"resnet20": [0.5]}, "epochs": 2, "train_subset": 128,
    "test_subset": 60, "recipe_overrides": {"batch_size": 64}, "workers": 2, "device": "cpu",
}  # fmt: skip
PATIENCE = 180  # seconds for a moment to come; a study that hangs is a failure, not a long test

SCRIPT = """
import functools, json, os, sys
from apbm_core.study.grid import run
from apbm_core.study.methods import task
from apbm_core.study.grid.grid import Study

task.train = functools.partial(task.train, checkpoint_steps=1)  # here, for the worker processes import this file too
carry_out = run._carry_out

def logged(config, results, *rest):
    with open(os.environ["CARRIED_OUT"], "a") as log:
        log.write(config.id + "\\n")
    return carry_out(config, results, *rest)

run._carry_out = logged

if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):  # a thread for each worker: results repeat bit for bit
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    Study.of(sys.argv[1], **json.loads(sys.argv[2])).run()
"""
SLOW_DISK = """
import os, time
fsync = os.fsync
os.fsync = lambda file: (time.sleep(float(os.environ.get("FSYNC_SECONDS", "0"))), fsync(file))[1]
"""
PARAMETERS_CELL = """
profile = "tiny"
results = "results"
dataset = "digits"
models = ["resnet20"]
methods = ["apbm"]
targets = {"resnet20": [0.5]}
epochs = 2
train_subset = 128
test_subset = 60
recipe_overrides = {"batch_size": 64}
workers = 1
device = "cpu"
"""
STUDY_CELL = """
from apbm_core.study.grid.grid import Study
names = "dataset models methods targets epochs train_subset test_subset recipe_overrides workers device".split()
records = Study.of(f"{results}/{profile}", **{name: globals()[name] for name in names}).run()
"""
FINDING = "print('finding:', [(record.config.method, record.test_loss) for record in records])"
ONE_THREAD = "import os\nos.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])"


def environment(folder: Path, mark: str, fsync_seconds: float) -> dict[str, str]:
    """The variables of a command under test: its mark, and a disk that takes its time."""
    startup = folder / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "sitecustomize.py").write_text(SLOW_DISK)
    return os.environ | {
        "MARK": mark,
        "FSYNC_SECONDS": str(fsync_seconds),
        "CARRIED_OUT": str(folder / "carried-out.txt"),
        "PYTHONPATH": os.pathsep.join([str(startup), str(REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
        "IPYTHONDIR": str(folder / "ipython"),
    }


class Command:
    """A command under test: its processes carry a mark by which all of them are found, whatever their session."""

    def __init__(self, arguments: Sequence[str], folder: Path, fsync_seconds: float = 0.0):
        self.mark = uuid.uuid4().hex
        self.log = folder / f"{self.mark}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment(folder, self.mark, fsync_seconds),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def finish(self, seconds: float = PATIENCE) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self, only_parent: bool = False) -> None:
        """SIGKILL everything, or only the process that was started, upon which the others must end by themselves."""
        for pid in [self.process.pid] if only_parent else [self.process.pid, *self.alive()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        wait_until(lambda: not self.alive(), "the other processes to end", 60)

    def alive(self) -> list[int]:
        """Every living process that descends from the command."""
        return marked(self.mark)


def marked(mark: str) -> list[int]:
    """Every living process with this mark in its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (folder / "environ").read_bytes()
                and "State:\tZ" not in (folder / "status").read_text()
            ):
                found.append(int(folder.name))
        except OSError:  # gone, or not ours
            continue
    return found


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: what it waited for, whom it hit, and what it left behind."""

    moment: str
    only_parent: bool
    half_written: tuple[str, ...]
    recorded: int

    def __str__(self) -> str:
        whom = "the parent only" if self.only_parent else "everything"
        left = ", ".join(self.half_written) or "nothing half written"
        return f"killed {whom}, waiting for {self.moment}: left {left}; {self.recorded} runs recorded"


# What a kill can wait for: files by pattern, under the results folder
MOMENTS = {
    "training": "work/*/*.ckpt",
    "a checkpoint being written": "work/*/.*.ckpt.*.tmp",
    "a network being written": "networks/.*.tmp",
    "a record being written": "runs/.*.tmp",
}
NOTEBOOK_MOMENTS = MOMENTS | {
    "a notebook executing": ".executing/*.ipynb",
    "a page being written": ".*.tmp",
    "the overview being written": "../.*.tmp",
}


def wait_until(condition, what: str, seconds: float = PATIENCE) -> None:
    """Poll ``condition``; raise AssertionError when it does not become true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.004)


def kill_at(
    command: Command, folder: Path, moment: str, patterns: dict[str, str], chance: random.Random
) -> Kill | None:
    """Kill ``command`` when ``moment`` has come; None if it ended before."""
    pattern, only_parent = patterns[moment], chance.random() < 0.25
    is_write = pattern.endswith(".tmp")
    for _ in range(chance.randrange(3) if "checkpoint" in moment else 1):  # of checkpoints, not always the first
        wait_until(lambda: any(folder.glob(pattern)) or command.is_over(), moment)
        if "checkpoint" in moment:
            wait_until(lambda: not any(folder.glob(pattern)) or command.is_over(), moment)
    wait_until(lambda: any(folder.glob(pattern)) or command.is_over(), moment)
    time.sleep(chance.uniform(0, 0.05) if is_write else chance.uniform(0, 2))
    if command.is_over():
        return None
    command.kill(only_parent)
    half = sorted(path.name for path in folder.parent.rglob(".*.tmp"))
    recorded = [read_record(path) for path in folder.glob("runs/*.json")]  # each of them whole
    return Kill(moment, only_parent, tuple(half), len(recorded))


def outcome(record: RunRecord) -> dict[str, Any]:
    """All of a record but what may differ between two executions of a run: its times, and the machine's state."""
    content = record.model_dump(exclude={"started", "finished", "environment"})
    for row in [*content["phases"], *content["history"]]:
        row.pop("seconds", None)
        row.pop("images_per_second", None)
    return content


def undisturbed(folder: Path, methods: Sequence[str]) -> list[RunRecord]:
    """The grid's runs, carried out in this process one after another."""
    torch.set_num_threads(1)
    study = Study.of(folder, **GRID, methods=list(methods))
    return [execute(config, str(folder), "cpu", 1) for config in study.configs()]


def check_results(folder: Path, reference: Sequence[RunRecord]) -> None:
    """Raise AssertionError unless ``folder`` holds the reference's runs, once each, and nothing half written."""
    records = [read_record(path) for path in sorted(folder.glob("runs/*"))]
    assert sorted(r.id for r in records) == sorted(r.id for r in reference), "every run is recorded once"
    expected = {record.id: outcome(record) for record in reference}
    for record in records:
        assert outcome(record) == expected[record.id], f"{record.id} differs from the undisturbed run"
        network = folder / "networks" / record.network
        assert sha256(network.read_bytes()) == record.network_sha256, network
    assert len(list(folder.glob("networks/*"))) == len(records)
    stray = [path for path in folder.parent.rglob("*") if path.suffix == ".tmp" or path.name == ".executing"]
    stray += [path for path in folder.glob("work/*") if path.suffix != ".lock" and not path.name.startswith(SHARED)]
    assert not stray, f"left behind: {stray}"


def kill_grid(
    folder: Path, kills: int, seed: int = 0, methods: Sequence[str] = METHODS, moments: Sequence[str] | None = None
) -> list[Kill]:
    """Kill grids ``kills`` times in all, restart each until it is done, and check it; ``moments`` are drawn by chance
    unless given."""
    chance, done = random.Random(seed), []
    script = folder / "grid.py"
    folder.mkdir(parents=True, exist_ok=True)
    script.write_text(SCRIPT)
    reference = undisturbed(folder / "undisturbed" / "grid", methods)
    for number in itertools.count():
        results = folder / f"round {number}" / "grid"
        arguments = [str(script), str(results), json.dumps(GRID | {"methods": list(methods)})]
        for kill in _until_it_ends(arguments, folder, results, MOMENTS, chance, moments, kills - len(done)):
            done.append(kill)
            print(f"kill {len(done):2} of {kills}: {kill}", flush=True)
        check_results(results, reference)
        print(f"done; {len(reference)} records are those of the undisturbed grid, no stray files", flush=True)
        if len(done) >= kills:
            return done


def kill_notebooks(folder: Path, kills: int, seed: int = 0, moments: Sequence[str] | None = None) -> list[Kill]:
    """The same with a study of two notebooks, through the command line."""
    chance, done = random.Random(seed), []
    reference = undisturbed(folder / "undisturbed" / "grid", ["apbm"])
    for number in itertools.count():
        root = make_repository(folder / f"round {number}")
        results = root / "results" / "own" / "tiny"
        arguments = ["-m", "apbm_core.study.pages.runner", "run", "--profile", "tiny"]
        for kill in _until_it_ends(arguments, root, results, NOTEBOOK_MOMENTS, chance, moments, kills - len(done)):
            done.append(kill)
            print(f"kill {len(done):2} of {kills}: {kill}", flush=True)
            for page in results.parent.glob(".*.tmp"):  # the overview's belong to no lock; they go when a minute old
                os.utime(page, (0, 0))
        check_results(results, reference)
        for name in ("01_grid", "02_table"):
            notebook = nbformat.read(results / f"{name}.ipynb", as_version=4)
            nbformat.validate(notebook)
            text = str(notebook.cells)
            assert f"finding: [('apbm', {reference[0].test_loss})]" in text and "Error" not in text, name
            assert (results / f"{name}.html").read_text().rstrip().endswith("</html>")
        assert not (results / "failed").exists()
        print("done; both notebooks are rendered, the record is the undisturbed one, no stray files", flush=True)
        if len(done) >= kills:
            return done


def _until_it_ends(
    arguments: Sequence[str],
    folder: Path,
    results: Path,
    patterns: dict[str, str],
    chance: random.Random,
    moments: Sequence[str] | None,
    kills: int,
) -> Iterator[Kill]:
    """Start the command and kill it, up to ``kills`` times, then let it end well; the last ``kills`` of ``moments``."""
    for number in range(kills):
        command = Command(arguments, folder, fsync_seconds=0.15)
        try:
            moment = moments[number - kills] if moments else chance.choice(list(patterns))
            kill = kill_at(command, results, moment, patterns, chance)
        finally:
            command.kill()
        if kill is None:
            assert command.process.returncode == 0, command.output
            return
        yield kill
    command = Command(arguments, folder)
    assert command.finish() == 0, command.output


def make_repository(root: Path) -> Path:
    """A repository with the package, the profile `tiny` and a study of two notebooks: a run, and what it found."""
    (root / "notebooks" / "profiles").mkdir(parents=True)
    (root / "apbm_core").symlink_to(REPOSITORY / "apbm_core")
    (root / "notebooks" / "profiles" / "tiny.yaml").write_text("description: One run.\n")
    for name in ("01_grid", "02_table"):
        write_notebook(root, name, ONE_THREAD, STUDY_CELL, FINDING)
    return root


def write_notebook(root: Path, name: str, *cells: str) -> None:
    """Write notebooks/<name>.ipynb: the parameters of the tiny study, and then ``cells``."""
    code = [nbformat.v4.new_code_cell(text.strip(), id=f"cell-{i}") for i, text in enumerate((PARAMETERS_CELL, *cells))]
    code[0].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=code, metadata=kernel)
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--notebooks", action="store_true", help="through the notebooks' command line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (kill_notebooks if options.notebooks else kill_grid)(Path(folder), options.kills, options.seed)


if __name__ == "__main__":
    main()
