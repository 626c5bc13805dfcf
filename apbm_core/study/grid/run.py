"""One run from its configuration to its record."""

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apbm_core.counting import count_macs, count_parameters
from apbm_core.files import sha256
from apbm_core.study.data.datasets import ImageDataset, load_dataset
from apbm_core.study.methods import get_method
from apbm_core.study.methods.task import Task
from apbm_core.study.networks.models import build_model
from apbm_core.study.networks.storage import save_compact, widths_of
from apbm_core.study.options import completed
from apbm_core.study.records import ResultsFolder, RunConfig, RunRecord
from apbm_core.study.training.device import describe_device, deterministic
from apbm_core.study.training.evaluation import evaluate
from apbm_core.study.training.hooks import Context
from apbm_core.study.training.stopping import StopAt
from apbm_core.study.validation import validated


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        words: its phase, how far that is, and the share of the last epoch's images that it had right.
        epochs: how many of the run's are done, all phases together.
        before: how many of them were done when it was begun or continued; those that another run trained count.
    """

    words: str
    epochs: float
    before: float


DETERMINISTIC = "APBM_DETERMINISTIC"
"""Set to 1, this variable makes runs on CUDA repeatable bit for bit (and slower): see :func:`deterministic`."""

_PACKAGES = ("torch", "torchvision", "torch-pruning", "numpy")


def execute(
    config: RunConfig,
    folder: str,
    device: str,
    side_by_side: int,
    stop_at: float = math.inf,
    report: Callable[[Standing], None] | None = None,
) -> RunRecord:
    """Carry out one run, or read its record if it has one; at the end it is recorded and its work folder is gone.

    Args:
        config: what to run.
        folder: ``results/<profile>``.
        device: where to compute.
        side_by_side: how many runs share the machine, for the record.
        stop_at: the moment, in seconds since the epoch, at which to stop where the run can go on.
        report: told where the run stands.

    Raises:
        Stopped: at that moment, or when the process was asked to end.
        ApbmError: of whatever kind describes what went wrong; the run's checkpoints stay, so that it can go on.
    """
    results, say, stop = ResultsFolder(folder), report or (lambda standing: None), StopAt(stop_at)
    with results.exclusively(config.id, stop):
        record = results.read(config)
        if record is None:
            with deterministic(torch.device(device)) if _is_deterministic() else nullcontext():
                record = _carry_out(config, results, torch.device(device), side_by_side, say, stop)
            results.write(record)
        shutil.rmtree(results.work_folder(config.id), ignore_errors=True)
    return record


def _carry_out(
    config: RunConfig,
    results: ResultsFolder,
    device: torch.device,
    side_by_side: int,
    say: Callable[[Standing], None],
    stop: StopAt,
) -> RunRecord:
    started = _now()
    method = get_method(config.method)
    options = validated(method.Options, completed(method.Options, config.options), f"the options of {config.method}")
    dataset = _dataset(config.dataset)
    split = dataset.split(config.split, config.seed, config.train_subset, config.test_subset)
    scribe = _Scribe(config.epochs, say)
    task = scribe.task = Task(config, split, results, options, device, scribe, stop)
    model = method.prune(task)
    precision = {name: task.training_facts[name] for name in ("precision", "channels_last")}

    def measure(images):
        return images and evaluate(model, images, split.mean, split.std, device=device, **precision)

    val, test = measure(split.judge), measure(split.test if config.split == "final" else None)
    dense = _dense(config.model, split.num_classes)
    height_width = split.train.images.shape[1:3]
    model = model.cpu()
    network = save_compact(results.networks / f"{config.id}.safetensors", model, config.model, split.num_classes)
    return RunRecord(
        id=config.id,
        config=config,
        test_accuracy=test.accuracy if test else None,
        test_loss=test.loss if test else None,
        val_accuracy=val.accuracy if val else None,
        parameters=count_parameters(model),
        macs=count_macs(model, (3, *height_width)),
        dense_parameters=count_parameters(dense),
        dense_macs=count_macs(dense, (3, *height_width)),
        widths=widths_of(model),
        phases=task.phases,
        history=task.history,
        notes=task.notes,
        environment=environment(device) | {"side_by_side": side_by_side, "load": _load()} | task.training_facts,
        started=started,
        finished=_now(),
        network=network.name,
        network_sha256=sha256(network.read_bytes()),
        data_source=dataset.source,
        num_classes=split.num_classes,
    )


def _is_deterministic() -> bool:
    return os.environ.get(DETERMINISTIC) == "1"


class _Scribe:
    """Told after every step where a phase stands, it says where the run stands."""

    task: Task

    def __init__(self, epochs: int, say: Callable[[Standing], None]):
        self.epochs, self.say = epochs, say
        self.before: float | None = None  # the run's epochs when its first step was taken here
        self.resumed_at, self.phase = 0.0, ""

    def __call__(self, phase: str, context: Context) -> None:
        done = context.epoch + context.step / context.steps_per_epoch
        if phase.startswith("start-"):  # before the run's own epochs
            return self.say(Standing(f"start {done:.1f} of {context.epochs}", 0.0, 0.0))
        earlier = sum(record.epochs for record in self.task.phases)
        if phase != self.phase:
            self.phase, self.resumed_at = phase, done - 1 / context.steps_per_epoch
            if self.before is None:
                self.before = earlier + self.resumed_at
        words = f"{phase.split('-')[0]} {done:.1f} of {context.epochs}"
        if self.resumed_at > 1e-6:
            words += f", going on from epoch {self.resumed_at:.1f}"
        if context.history:
            words += f", {100 * context.history[-1]['train_accuracy']:.1f} % on the way"
        self.say(Standing(words, min(earlier + done, self.epochs), min(self.before, self.epochs)))


def _dense(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, num_classes)


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the source's commit, for a record."""
    return describe_device(device) | {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


@cache
def _commit() -> str:
    """The source's git commit, with ``+changes`` if files differ from it. Outside a checkout, as in a container or on a
    node that got the sources alone, what ``APBM_COMMIT`` says; else "unknown"."""
    root = Path(__file__).parents[3]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--", "apbm_core"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("APBM_COMMIT") or "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


@lru_cache(maxsize=1)
def _dataset(name: str) -> ImageDataset:
    return load_dataset(name)


def _load() -> float | None:
    """The system's load average over the last minute: whether others used the machine, which makes times longer."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
