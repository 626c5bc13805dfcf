"""Training time, measured apart: what every phase of every method takes on this machine, alone and in minutes.

An accuracy does not depend on what else the machine does; a time does. So runs may share the machine, and their times
are computed: each method's phases are carried out for a few steps an epoch, nothing running beside them, several
rounds in turn (drift meets all methods alike), and

    seconds of a phase = images * seconds an image + epochs * seconds an epoch + what is done once.

Seconds an image are an epoch's median step, seconds an epoch what its steps take beyond that (scoring, at most), both
averaged over the phase's epochs: a fusion that ends in the middle of a training makes the later ones cheaper. A record
keeps its own seconds, and whoever shows a time says which it is.
"""

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from apbm_core.errors import RecordError
from apbm_core.files import sha256, write_atomically
from apbm_core.study.data.datasets import DataSplit
from apbm_core.study.grid.bars import bar
from apbm_core.study.grid.run import environment
from apbm_core.study.methods import get_method
from apbm_core.study.methods.task import Task
from apbm_core.study.options import completed
from apbm_core.study.records import PhaseRecord, ResultsFolder, RunConfig, RunRecord, canonical_json, timed_on
from apbm_core.study.training.device import synchronize
from apbm_core.study.training.hooks import Context
from apbm_core.study.training.loop import train
from apbm_core.study.validation import describe_validation_error, validated

FOLDER = "calibration"
"""Beside a profile's ``runs``: one file a machine."""
ROUNDS, STEPS, EPOCHS = 3, 10, 6  # rounds over all methods; steps an epoch, and epochs at most, in each


class Cost(BaseModel):
    """What one phase took in one round."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_image: float = Field(0.0, ge=0, description="seconds")
    per_epoch: float = Field(0.0, ge=0, description="seconds beyond the steps'")
    once: float = Field(0.0, ge=0, description="seconds of work between trainings")
    share: float = Field(0.0, ge=0, le=1, description="of the run's epochs, that are this phase's; 0 if not noted")

    def seconds(self, phase: PhaseRecord) -> float:
        return phase.images * self.per_image + phase.epochs * self.per_epoch + self.once


class Calibration(BaseModel):
    """The costs of all phases on one machine."""

    model_config = ConfigDict(extra="forbid")

    machine: str = Field(description="processor, arithmetic and threads, as in RunRecord.timed_on, alone")
    made: str
    environment: dict[str, Any]
    runs: dict[str, dict[str, list[Cost]]] = Field(description="by kind of run (see kind) and phase: one cost a round")

    @property
    def words(self) -> str:
        """For tables: under which conditions these times were measured."""
        return f"{self.machine}, calibrated"

    def covers(self, record: RunRecord) -> bool:
        """Whether every phase of this run was measured."""
        phases = self.runs.get(kind(record.config), {})
        return bool(record.phases) and all(phase.name in phases for phase in record.phases)

    def phase_seconds(self, record: RunRecord, phase: PhaseRecord) -> float:
        """A phase's seconds, the mean over the rounds."""
        return statistics.fmean(cost.seconds(phase) for cost in self.runs[kind(record.config)][phase.name])

    def rounds(self, record: RunRecord) -> list[float]:
        """A whole run's seconds by each round's costs."""
        costs = self.runs[kind(record.config)]
        count = min(len(costs[phase.name]) for phase in record.phases)
        return [sum(costs[phase.name][i].seconds(phase) for phase in record.phases) for i in range(count)]

    def seconds(self, record: RunRecord) -> float:
        """A whole run's seconds, the mean over the rounds."""
        return statistics.fmean(self.rounds(record))

    def estimate(self, config: RunConfig, images: int) -> float | None:
        """The seconds of a run that is still to come, on so many images an epoch; None where it was not measured."""
        phases, total = self.runs.get(kind(config), {}), 0.0
        if not any(cost.share for costs in phases.values() for cost in costs):
            return None  # or measured before shares were noted
        for costs in phases.values():
            epochs = config.epochs * costs[-1].share
            phase = PhaseRecord(name="", seconds=0.0, epochs=round(epochs), images=round(epochs * images))
            total += statistics.fmean(cost.seconds(phase) for cost in costs)
        return total

    def spread(self, record: RunRecord) -> float:
        """The standard deviation of :meth:`rounds`, as a share of their mean."""
        rounds = self.rounds(record)
        return statistics.stdev(rounds) / statistics.fmean(rounds) if len(rounds) > 1 else float("nan")


def kind(config: RunConfig) -> str:
    """What runs that take equal time an image have in common: all but seed, length, data split and number of images."""
    values = config.model_dump(
        mode="json", exclude={"seed", "epochs", "split", "train_subset", "test_subset"}, exclude_defaults=True
    )
    if config.schedule != "published":  # equal time is equal epochs with another number of them
        values.pop("schedule", None)
    return f"{config.model}-{Path(config.method).stem}-{sha256(canonical_json(values).encode())[:10]}"


def read(folder: str | Path, device: torch.device | None = None) -> Calibration | None:
    """The calibration that belongs to a profile's results: this machine's, else the only one; None without.

    Args:
        folder: ``results/<profile>``.
        device: of this machine; None takes the only one, or none.

    Raises:
        RecordError: a file is damaged.
    """
    found = {path.stem: path for path in sorted((Path(folder) / FOLDER).glob("*.json"))}
    own = None if device is None else found.get(_slug(device))
    path = own or (next(iter(found.values())) if len(found) == 1 else None)
    return None if path is None else _read(path)


def ensure(
    configs: Sequence[RunConfig],
    folder: str | Path,
    split: DataSplit,
    device: torch.device,
    threads: int,
) -> Calibration | None:
    """This machine's calibration for the runs of a study; measured now as far as it is not there.

    Args:
        configs: the runs.
        folder: ``results/<profile>``, where it is kept.
        split: images of the kind and number that the runs train on.
        device, threads: as the runs have them.

    Returns:
        None if the runs are as short as a calibration would be.

    Raises:
        RecordError: what is stored is damaged.
        ApbmError: whatever the methods raise, or the folder cannot be written.
    """
    path = Path(folder) / FOLDER / f"{_slug(device)}.json"
    known = _read(path) if path.exists() else None
    wanted: dict[str, RunConfig] = {}
    for config in configs:
        steps = -(-len(split.train) // config.recipe.batch_size)
        if steps > STEPS and (known is None or kind(config) not in known.runs):
            wanted.setdefault(kind(config), config)
    if not wanted:
        return known
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        measured, facts = _measure(wanted, split, device)
    finally:
        torch.set_num_threads(before)
    calibration = Calibration(
        machine=timed_on(facts),
        made=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        environment=facts,
        runs=(known.runs if known else {}) | measured,
    )
    content = calibration.model_dump(mode="json")
    write_atomically(
        path, json.dumps(content | {"checksum": sha256(canonical_json(content).encode())}, indent=1) + "\n"
    )
    return calibration


def _measure(
    wanted: Mapping[str, RunConfig], split: DataSplit, device: torch.device
) -> tuple[dict[str, dict[str, list[Cost]]], dict[str, Any]]:
    """The costs of each kind of run, and the facts of the machine and its arithmetic."""
    measured: dict[str, dict[str, list[Cost]]] = {name: {} for name in wanted}
    facts: dict[str, Any] = {}
    with bar(total=ROUNDS * len(wanted), unit="run", desc="calibration") as shown:
        for _ in range(ROUNDS):
            shared: dict[str, tuple[nn.Module, Cost, Any]] = {}
            for name, config in wanted.items():
                shown.set_postfix_str(name, refresh=False)
                with tempfile.TemporaryDirectory(prefix="calibration-") as work:
                    task = _Timed.of(config, split, ResultsFolder(work), device, shared)
                    get_method(config.method).prune(task)
                for phase, cost in task.measured.items():
                    measured[name].setdefault(phase, []).append(cost)
                facts = environment(device) | {"side_by_side": 1} | task.training_facts
                shown.update()
    return measured, facts


class _Timed(Task):
    """A run whose trainings have few steps an epoch, each of them timed; nothing of it is kept but the costs."""

    measured: dict[str, Cost]

    @classmethod
    def of(
        cls, config: RunConfig, split: DataSplit, results: ResultsFolder, device: torch.device, shared: dict[str, Any]
    ) -> "_Timed":
        method = get_method(config.method)
        options = validated(method.Options, completed(method.Options, config.options), f"options of {config.method}")
        few = split.train.select(range(STEPS * config.recipe.batch_size))
        short = config.model_copy(update={"epochs": min(config.epochs, EPOCHS)})
        task = cls(short, replace(split, train=few, val=None, judge=None), results, options, device)
        task.measured, task._shared = {}, shared
        return task

    def remember(self, name: str, function: Callable[[], Any]) -> Any:
        value = super().remember(name, function)
        self.measured[name] = Cost(once=self.phases[-1].seconds)
        return value

    def _once_for_all(self, name, phase, model, epochs, recipe, hooks, course):
        if name not in self._shared:
            result = self._run(phase, model, epochs, recipe, Path(), name, hooks, course)
            self._shared[name] = copy.deepcopy(model), self.measured[phase], result
        trained, self.measured[phase], result = self._shared[name]
        model.load_state_dict(trained.state_dict())
        return result

    def _run(self, phase, model, epochs, recipe, folder, identity, hooks, course=(0.0, 1.0)):
        clock = _Clock(self.device)
        result = train(
            model,
            self.split,
            recipe,
            epochs,
            seed=self.config.seed,
            device=self.device,
            hooks=hooks,
            progress=clock,
            course=course,
        )
        cost = fit(clock.epochs, len(self.split.train))
        self.measured[phase] = cost.model_copy(update={"share": min(1.0, epochs / self.config.epochs)})
        return result


class _Clock:
    """Told after every step; the seconds of the steps by epoch."""

    def __init__(self, device: torch.device):
        self.device, self.epochs, self._last = device, [[]], time.perf_counter()

    def __call__(self, context: Context) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.epochs[-1].append(now - self._last)
        self._last = now
        if context.step == 0 and context.epoch < context.epochs:  # the epoch's row is written
            self.epochs.append([])


def fit(epochs: Sequence[Sequence[float]], images: int) -> Cost:
    """One phase's cost from the seconds of its steps.

    The first step of a phase also warms up; it counts as a median one, and what the first epoch does beyond its steps
    is taken to be what the second does.

    Args:
        epochs: the seconds of every step, by epoch; the last step of each includes what is done at the epoch's end.
        images: in an epoch.
    """
    medians = [statistics.median(steps) for steps in epochs]
    beyond = [max(0.0, sum(steps) - median * len(steps)) for steps, median in zip(epochs, medians, strict=True)]
    first = sum(epochs[0][1:]) - medians[0] * (len(epochs[0]) - 1)
    beyond[0] = beyond[1] if len(beyond) > 1 else max(0.0, first)
    steps = statistics.fmean(len(steps) for steps in epochs)
    return Cost(per_image=statistics.fmean(medians) * steps / images, per_epoch=statistics.fmean(beyond))


def _slug(device: torch.device) -> str:
    """A file name for this machine."""
    name = environment(device)["device"].lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split()) or "machine"


def _read(path: Path) -> Calibration:
    remedy = "Delete it, and the machine is calibrated again."
    try:
        content = json.loads(path.read_text())
        checksum = content.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RecordError(f"{path} is not a complete calibration ({type(error).__name__}: {error}). {remedy}") from None
    if sha256(canonical_json(content).encode()) != checksum:
        raise RecordError(f"{path} was changed after it was written: its checksum does not match. {remedy}")
    try:
        return Calibration.model_validate(content)
    except ValidationError as error:
        raise RecordError(describe_validation_error(error, Calibration, str(path))) from None
