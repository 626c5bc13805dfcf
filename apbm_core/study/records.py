"""A run is a record: what was asked for (RunConfig), what came of it (RunRecord), and where both are kept."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apbm_core.errors import ApbmError, RecordError
from apbm_core.files import remove_stale_temporaries, sha256, write_atomically
from apbm_core.study.training.recipes import Recipe
from apbm_core.study.training.stopping import Stopped
from apbm_core.study.validation import describe_validation_error

FORMAT = 1
PUBLISHED_RESULTS = "results"
"""The folder of the records that are committed, relative to the repository."""
OWN = "results/own"
"""Where a reproduction writes unless told otherwise: git ignores it."""
TRAINED = "trained"
"""The one folder of results whose networks are kept under version control, for 06, explore and the front page."""


class RunConfig(BaseModel):
    """Everything that decides a run's outcome; two runs with equal configurations are the same run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    method: str = Field(description="a method's name, or the path of the user's own, a .py file")
    model: str
    dataset: str
    target: float = Field(ge=0, lt=1, description="share of the parameters (or MACs) to remove; 0 is the dense network")
    by: Literal["params", "macs"] = "params"
    widths: str = Field("uniform", description="'uniform' keep ratio, 'balanced', or a published vector's name")
    epochs: int = Field(ge=1, description="all epochs of the run, a shared pre-training counted")
    start_epochs: int = Field(
        0, ge=0, description="epochs of the dense network that all start from, but the controls; not among its epochs"
    )
    start_recipe: Recipe | None = Field(None, description="how that network was trained")
    schedule: Literal["equal", "published", "equal-time"] = "equal"
    recipe: Recipe
    seed: int = Field(ge=0)
    split: Literal["final", "tuning"] = "final"
    train_subset: int | None = Field(None, ge=1)
    test_subset: int | None = Field(None, ge=1)
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own settings, all of them")

    @property
    def id(self) -> str:
        """A readable name with a hash of the whole configuration, such as ``resnet20-apbm-50.0-s0-1f2e3d4c5b``."""
        percent = "dense" if self.target == 0 else f"{100 * self.target:.4g}"
        parts = [self.model, Path(self.method).stem, percent, *([] if self.schedule == "equal" else [self.schedule])]
        return f"{'-'.join(parts)}-s{self.seed}-{self.digest[:10]}"

    @property
    def digest(self) -> str:
        """A hash of everything that was chosen. Defaults are left out, so that a setting added later, whose default is
        what was done before it existed, leaves the ids of earlier runs alone."""
        return sha256(canonical_json(self.model_dump(mode="json", exclude_defaults=True)).encode())


class PhaseRecord(BaseModel):
    """One phase of a run: training of some kind, or the work between two trainings."""

    model_config = ConfigDict(extra="forbid")

    name: str
    seconds: float = Field(description="wall time; evaluation and checkpoints excluded")
    epochs: int = 0
    images: int = 0
    images_per_second: float | None = None
    shared: bool = Field(False, description="done once for several runs, and charged to each of them")


class RunRecord(BaseModel):
    """What came of a run. Counts follow methods.md: MACs of the convolutions and linear layers for one image."""

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    id: str
    config: RunConfig
    test_accuracy: float | None = Field(ge=0, le=1, description="evaluated once, at the end; None when tuning")
    test_loss: float | None
    val_accuracy: float | None = Field(None, description="on all held-out training images, when tuning")
    parameters: int
    macs: int
    dense_parameters: int
    dense_macs: int
    widths: dict[str, int] = Field(description="filters of every convolution of the compact network")
    phases: list[PhaseRecord]
    history: list[dict[str, Any]] = Field(description="one entry an epoch, over all phases")
    notes: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(description="versions, device, threads, commit, and what else ran beside")
    started: str
    finished: str
    network: str | None = Field(None, description="file name of the stored network, under networks/")
    network_sha256: str | None = None
    data_source: str = ""
    num_classes: int | None = Field(None, description="not stated by the first records, of CIFAR and the digits")

    @property
    def parameters_removed(self) -> float:
        return 1 - self.parameters / self.dense_parameters

    @property
    def macs_removed(self) -> float:
        return 1 - self.macs / self.dense_macs

    @property
    def seconds(self) -> float:
        """Training time: all phases, shared ones included in full."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def timed_on(self) -> str:
        """Under which conditions the seconds were measured; only between equal ones may they be compared.

        The processor (one name covers some with and some without bfloat16 instructions), the arithmetic, the threads,
        and how many runs shared the machine.
        """
        return timed_on(self.environment)


def timed_on(facts: dict[str, Any]) -> str:
    """The conditions that seconds depend on, in words: see :attr:`RunRecord.timed_on`."""
    instructions = facts.get("cpu_bfloat16") if facts["precision"] == "bfloat16" else None
    arithmetic = f"{facts['precision']} ({', '.join(instructions)})" if instructions else facts["precision"]
    threads = f"{facts['threads']} {'threads' if facts['threads'] > 1 else 'thread'} a run"
    return f"{facts['device']}, {arithmetic}, {threads}, {facts['side_by_side']} at a time"


class ResultsFolder:
    """``results/<profile>``: ``runs/*.json``, ``networks/*.safetensors``, and ``work/`` for what is under way."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.runs, self.networks, self.work = self.path / "runs", self.path / "networks", self.path / "work"

    def record_path(self, config: RunConfig) -> Path:
        return self.runs / f"{config.id}.json"

    def read(self, config: RunConfig) -> RunRecord | None:
        """The record of this configuration, or None if it has not been run.

        Raises:
            RecordError: the file is damaged, was edited, or is another configuration's.
        """
        path = self.record_path(config)
        if not path.exists():
            return None
        record = read_record(path)
        if record.config != config:
            raise RecordError(f"{path} holds the record of another configuration; delete it, and the run is repeated.")
        return record

    def read_all(self) -> list[RunRecord]:
        """Every record in the folder, in the order of their ids."""
        return [read_record(path) for path in sorted(self.runs.glob("*.json"))]

    def write(self, record: RunRecord) -> Path:
        content = record.model_dump(mode="json")
        content["checksum"] = sha256(canonical_json(content).encode())
        return write_atomically(self.record_path(record.config), json.dumps(content, indent=1) + "\n")

    def work_folder(self, name: str) -> Path:
        return self.work / name

    def lock(self, name: str) -> FileLock:
        """A lock on one run or one shared pre-training, freed by the system when its holder dies."""
        self.work.mkdir(parents=True, exist_ok=True)
        return FileLock(self.work / f"{name}.lock")

    @contextmanager
    def exclusively(self, name: str, stop: Callable[[], bool] | None = None) -> Iterator[None]:
        """Hold the lock on one run or pre-training; what a killed process left half written of it is removed first.

        While another process holds it this one waits, as long as ``stop``, if it is given, does not say yes.

        Raises:
            ApbmError: the folder cannot be written.
            Stopped: ``stop`` said yes.
        """
        try:
            lock = self.lock(name)
            while not lock.is_locked:
                with suppress(Timeout):
                    lock.acquire(timeout=-1 if stop is None else 0.2)
                if not lock.is_locked and stop is not None and stop():
                    raise Stopped(f"stopped while another process had {name} in hand.")
        except OSError as error:
            raise ApbmError(
                f"cannot write to {self.path}: {error.strerror or error}. Free some space or choose a folder you may "
                "write to."
            ) from error
        try:
            for folder in (self.runs, self.networks):
                remove_stale_temporaries(folder, name)
            remove_stale_temporaries(self.work_folder(name))
            yield
        finally:
            lock.release()

    def remove_work(self, config: RunConfig) -> None:
        """Remove what a process that was killed just after it recorded this run did not come to remove."""
        if self.work_folder(config.id).exists():
            with self.exclusively(config.id):
                shutil.rmtree(self.work_folder(config.id), ignore_errors=True)


def read_record(path: str | Path) -> RunRecord:
    """Read one record and check that it is whole and unedited.

    Raises:
        RecordError: it is not; the message names the file and what is wrong.
    """
    path, remedy = Path(path), "Restore it from version control, or delete it and the run is repeated."
    try:
        content = json.loads(path.read_text())
        checksum = content.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RecordError(f"{path} is not a complete run record ({type(error).__name__}: {error}). {remedy}") from None
    if sha256(canonical_json(content).encode()) != checksum:
        raise RecordError(f"{path} was changed after it was written: its checksum does not match. {remedy}")
    if content.get("format") != FORMAT:
        raise RecordError(f"{path} has record format {content.get('format')!r}; this version reads {FORMAT}. {remedy}")
    try:
        record = RunRecord.model_validate(content)
    except ValidationError as error:
        raise RecordError(describe_validation_error(error, RunRecord, str(path))) from None
    if path.stem != record.id:
        raise RecordError(f"{path} holds the record {record.id!r}, so one of the two names is wrong. {remedy}")
    return record


def canonical_json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
