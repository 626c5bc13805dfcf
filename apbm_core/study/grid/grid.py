"""A study: parameters -> a grid of runs -> their records; what is recorded is not run again::

study = Study.of(dataset="digits", models=["resnet20"], methods=["apbm", "l1"], targets={"resnet20": [0.5]})
records = study.run()
"""

import os
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from apbm_core.errors import ApbmError, DataError
from apbm_core.study.data.datasets import DataSplit, ImageDataset, load_dataset
from apbm_core.study.grid.budget import Budget
from apbm_core.study.grid.calibration import Calibration, ensure, read
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.grid.work import Work
from apbm_core.study.grid.workers import plan_workers
from apbm_core.study.methods import get_method
from apbm_core.study.records import OWN, ResultsFolder, RunConfig, RunRecord
from apbm_core.study.training.device import pick_device

RECORDS_ONLY = "APBM_RECORDS_ONLY"


class Study:
    """The runs that some parameters ask for, and the folder where their records are.

    ``shows_runs = False`` is for a page of examples: it is complete without any record.
    """

    def __init__(
        self, parameters: StudyParameters, folder: str | Path, records_only: bool | None = None, shows_runs: bool = True
    ):
        self.parameters = parameters
        self.results = ResultsFolder(folder)
        self.records_only = os.environ.get(RECORDS_ONLY) == "1" if records_only is None else records_only
        self.shows_runs = shows_runs

    @classmethod
    def of(cls, folder: str | Path = f"{OWN}/mine", **values: Any) -> "Study":
        """A study from parameters by name.

        Raises:
            ConfigError: naming each value that is unknown, of the wrong type or impossible.
        """
        return cls(StudyParameters.parse(values), folder)

    @cached_property
    def dataset(self) -> str:
        """The data set that is used: the one asked for, else the fallback.

        Raises:
            DataError: the first cannot be had and there is no fallback.
        """
        wanted, fallback = self.parameters.dataset, self.parameters.fallback
        if fallback is None:
            return wanted
        if self.records_only:
            recorded = {record.config.dataset for record in self.results.read_all()}
            return wanted if wanted in recorded or fallback not in recorded else fallback
        try:
            _load(wanted)
            return wanted
        except DataError as error:
            print(f"{error}\nUsing {fallback} instead.", file=sys.stderr)
            return fallback

    @property
    def banner(self) -> str:
        """A warning to put above every figure: the study runs on its fallback data, or is rendered while some of its
        runs have no record yet. Empty otherwise."""
        warnings = []
        if self.dataset != self.parameters.dataset:
            warnings.append(
                f"NOT {self.parameters.dataset}: it could not be found, so these runs are on {self.dataset}."
            )
        if self.missing:
            known = len(self.missing) + len(self.records())
            warnings.append(f"INCOMPLETE: {len(self.missing)} of {known} runs are not recorded yet.")
        return " ".join(warnings)

    @cached_property
    def missing(self) -> list[RunConfig]:
        """The runs without a record, if only records are to be read; what a training study lacks it trains."""
        configs = [*self.configs(), *self.equal_time_configs()] if self.records_only and self.shows_runs else []
        return [config for config in configs if self.results.read(config) is None]

    @property
    def source(self) -> str:
        """Where the images came from, as a sentence; from the records when nothing else is read."""
        if self.records_only:
            return next((record.data_source for record in self.records()), "")
        return self.data().source

    @property
    def device(self) -> torch.device:
        return pick_device(self.parameters.device)

    def data(self) -> ImageDataset:
        """The data set itself."""
        return _load(self.dataset)

    @cached_property
    def calibration(self) -> Calibration | None:
        """What the phases take, measured apart, where that was done for these results; else None."""
        return read(self.results.path, self.device)

    def calibrate(self) -> Calibration | None:
        """Measure what the runs' phases take on this machine, as far as that is not known yet.

        Nothing else should be running. None if the runs are too short for it.

        Raises:
            ApbmError: of whatever kind describes what went wrong.
        """
        configs, given = self.configs(), self.parameters
        _, threads = plan_workers(given.workers, len(configs), self.device)
        found = self.calibration
        for dataset in dict.fromkeys(config.dataset for config in configs):
            images = _load(dataset).split(given.split, given.seeds[0], given.train_subset, given.test_subset)
            part = [config for config in configs if config.dataset == dataset]
            found = ensure(part, self.results.path, images, self.device, threads)
        return found

    def example_split(self, images: int) -> DataSplit:
        """A part of the data, for an example in passing; the digits, if a report is made where the data are not."""
        try:
            data = self.data()
        except DataError:
            if not self.records_only:
                raise
            data = _load("digits")
            print(f"{self.dataset} is not here; this example uses the digits.", file=sys.stderr)
        most = min(len(data.train_images), self.parameters.train_subset or len(data.train_images))
        return data.split("final", train_subset=min(images, most), test_subset=self.parameters.test_subset)

    def configs(self, starts_from: Sequence[str] | None = None) -> list[RunConfig]:
        """The grid's runs; only those whose method starts from one of ``starts_from``, if that is given."""
        configs = self.parameters.run_configs(self.dataset)
        if starts_from is None:
            return configs
        return [config for config in configs if get_method(config.method).starts_from in starts_from]

    def records(self, configs: Iterable[RunConfig] | None = None) -> list[RunRecord]:
        """The records there are of ``configs``, by default of the whole grid and its equal-time runs."""
        if configs is None:
            configs = [*self.configs(), *self.equal_time_configs()]
        return [record for record in map(self.results.read, configs) if record is not None]

    def equal_time_configs(self, records: Iterable[RunRecord] | None = None) -> list[RunConfig]:
        """Runs from scratch with as many epochs as fit into the training time of l1's record, pre-training counted.

        Runs with widths of their own have none, nor has one that would have as many epochs as at equal epochs: it
        would be the same run. Nor has one whose seconds cannot be compared with l1's: see :meth:`without_equal_time`.
        """
        planned = [_with_time_of(reference, record) for record, reference in self._with_references(records)]
        return [config for config in planned if config is not None and config.epochs != self.parameters.epochs]

    def equal_time_stand_ins(self) -> list[RunConfig]:
        """Runs at equal epochs that are their own equal-time runs, for l1's time holds as many epochs."""
        planned = [_with_time_of(reference, record) for record, reference in self._with_references()]
        same = [config for config in planned if config is not None and config.epochs == self.parameters.epochs]
        return [config.model_copy(update={"schedule": "equal"}) for config in same]

    def without_equal_time(self) -> list[tuple[RunRecord, RunRecord]]:
        """(run, l1's run): records from scratch whose equal-time run is unknown, since l1's seconds were measured under
        other conditions."""
        return [(run, reference) for run, reference in self._with_references() if run.timed_on != reference.timed_on]

    def _with_references(self, records: Iterable[RunRecord] | None = None) -> list[tuple[RunRecord, RunRecord]]:
        """The records that equal-time runs follow from, each with l1's record that gives the time."""
        if "equal-time" not in self.parameters.schedules:
            return []
        records = self.records(self.configs()) if records is None else records
        shared = self.parameters.widths
        records = [r for r in records if r.config.widths == shared and r.config.schedule == "equal"]
        references = {(r.config.model, r.config.target, r.config.seed): r for r in records if r.config.method == "l1"}
        pairs = []
        for record in records:
            reference = references.get((record.config.model, record.config.target, record.config.seed))
            if reference is not None and "equal-time" in get_method(record.config.method).schedules:
                pairs.append((record, reference))
        return pairs

    def run(self, configs: Sequence[RunConfig] | None = None, budget: Budget | None = None) -> list[RunRecord]:
        """Execute what is not recorded yet, side by side, and return the records of ``configs`` (default: everything).

        Args:
            configs: some of the study's runs.
            budget: until when; by default as long as the parameters' ``minutes`` say.

        Raises:
            Stopped: the time is up, or the process was asked to end; what was under way goes on the next time.
            ApbmError: runs failed (the others are finished and recorded first), or none is recorded when only records
                are to be read.
        """
        if self.records_only:
            configs = [*self.configs(), *self.equal_time_configs()] if configs is None else configs
            missing = [config for config in configs if self.results.read(config) is None]
            if missing and len(missing) == len(configs):
                raise ApbmError(
                    f"none of {len(configs)} runs is recorded in {self.results.path}, neither {missing[0].id} nor the "
                    f"others. Run them before you render: make reproduce PROFILE={self.results.path.name} "
                    f"RESULTS={self.results.path.parent}"
                )
            return self.records(configs)
        work = Work(self, configs, Budget.of(self.parameters.minutes) if budget is None else budget)
        work.carry_out()
        for config in work.wanted():
            self.results.remove_work(config)
        return self.records(work.wanted())


def _with_time_of(reference: RunRecord, record: RunRecord) -> RunConfig | None:
    """``record``'s run with as many epochs as fit into ``reference``'s time; None if their seconds do not compare."""
    if record.timed_on != reference.timed_on:
        return None
    epochs = max(1, int(reference.seconds / (record.seconds / record.config.epochs)))
    return record.config.model_copy(update={"schedule": "equal-time", "epochs": epochs})


@lru_cache(maxsize=2)
def _load(name: str) -> ImageDataset:
    return load_dataset(name)
