"""What a study has to carry out: in which order, within which time, on which engine, and what came of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from apbm_core.errors import ApbmError
from apbm_core.study.grid.bars import EpochsBar
from apbm_core.study.grid.budget import Budget, Estimates, choose, in_order
from apbm_core.study.grid.cluster import run_on_cluster
from apbm_core.study.grid.run import Standing, execute
from apbm_core.study.grid.workers import plan_workers, run_side_by_side
from apbm_core.study.records import RunConfig, RunRecord
from apbm_core.study.training.stopping import Stopped, is_asked

if TYPE_CHECKING:
    from apbm_core.study.grid.grid import Study


class Work:
    """The runs of one call that have no record yet, handed out one by one as workers become free.

    Args:
        study: whose runs, results, data and device these are.
        configs: some of its runs; None is the whole grid, whose equal-time runs appear as the records they follow from
            do.
        budget: until when; without end by default.
    """

    def __init__(self, study: "Study", configs: Sequence[RunConfig] | None = None, budget: Budget | None = None):
        self.study, self.results, self.budget = study, study.results, budget or Budget()
        self._configs = list(study.configs() if configs is None else configs)
        self._whole_grid = configs is None
        self._records: dict[str, RunRecord] = {}  # by id; a record is read once
        self._handed_out: list[RunConfig] = []
        self._unfinished: dict[str, BaseException] = {}
        parameters = study.parameters
        self.workers, self.threads = plan_workers(parameters.workers, len(self.missing()) or 1, study.device)

    def wanted(self) -> list[RunConfig]:
        """Every run there is to be a record of, as far as that is known."""
        configs = self._configs
        if self._whole_grid:
            known = [record for record in map(self._record, configs) if record is not None]
            configs = [*configs, *self.study.equal_time_configs(known)]
        return configs

    def missing(self) -> list[RunConfig]:
        """Those of them that are not recorded, in the order in which they are begun."""
        return [config for config in in_order(self.wanted()) if self._record(config) is None]

    def plan(self) -> str:
        """How many runs are missing and about how long they take here, in a sentence."""
        missing = self.missing()
        return (
            f"{len(missing)} of {len(self.wanted())} runs to do, about {self._minutes(missing):.3g} minutes with "
            f"{self.workers} at a time."
        )

    def carry_out(self) -> None:
        """Execute what is missing.

        Raises:
            Stopped: runs are left for another time.
            ApbmError: runs failed; the others are finished and recorded first.
        """
        missing = self.missing()
        if not missing:
            return
        if self.budget.is_finite:
            print(f"{self.plan()} {self.budget.minutes_left:.3g} minutes are given.", flush=True)
        started = time.perf_counter()
        with EpochsBar(_epochs(missing)) as bar:

            def stands(index: int, standing: Standing) -> None:
                bar.stand(self._handed_out[index].id, standing.epochs, standing.words, standing.before)

            for index, record, error in self._engine(stands):
                config = self._handed_out[index]
                if error is not None:
                    self._unfinished[config.id] = error
                    continue
                self._records[config.id] = record
                if self.budget.is_finite:
                    self._estimates.learn([record])
                accuracy = 100 * (record.test_accuracy if record.test_accuracy is not None else record.val_accuracy)
                total = _epochs([*self._handed_out, *self._waiting()])
                bar.end(config.id, config.epochs, f"last {record.config.method} {accuracy:.1f} %", total)
                print(f"{record.id:<46} accuracy {accuracy:5.2f} %   {record.seconds:7.1f} s of training")
        done = len(self._handed_out) - len(self._unfinished)
        print(f"{done} runs in {time.perf_counter() - started:.0f} s, {self.workers} at a time.")
        self._raise_if_unfinished()

    def _engine(
        self, report: Callable[[int, Standing], None]
    ) -> Iterator[tuple[int, RunRecord | None, BaseException | None]]:
        parameters = self.study.parameters
        if parameters.engine == "ray":
            share = 1 / self.workers if self.study.device.type == "cuda" else 0.0
            return run_on_cluster(execute, self._next_job, self.threads, share, report, parameters.address)
        return run_side_by_side(execute, self._next_job, self.workers, self.threads, report)

    def _record(self, config: RunConfig) -> RunRecord | None:
        if config.id not in self._records:
            record = self.results.read(config)
            if record is None:
                return None
            self._records[config.id] = record
        return self._records[config.id]

    def _waiting(self) -> list[RunConfig]:
        begun = {config.id for config in self._handed_out}
        return [config for config in self.missing() if config.id not in begun]

    def _next_job(self) -> tuple | None:
        """The arguments of the next run for :func:`execute`; None if there is none now, or no time."""
        config = choose(
            self._waiting(),
            self.budget.seconds_left,
            self._estimates.seconds,
            lambda config: any(self.results.work_folder(config.id).glob("*")),
        )
        if config is None:
            return None
        self._handed_out.append(config)
        return config, str(self.results.path), str(self.study.device), self.workers, self.budget.stop_at

    def _minutes(self, configs: Sequence[RunConfig]) -> float:
        return sum(map(self._estimates.seconds, configs)) / self.workers / 60

    @cached_property
    def _estimates(self) -> Estimates:
        images = self.study.data().train_images
        shape, calibration = (len(images), images.shape[1]), self.study.calibration
        estimates = Estimates(self.study.device, self.threads, self.workers, *shape, calibration)
        estimates.learn(self.results.read_all())
        return estimates

    def _raise_if_unfinished(self) -> None:
        failed = {name: error for name, error in self._unfinished.items() if not isinstance(error, Stopped)}
        if failed:
            bug = next((error for error in failed.values() if not isinstance(error, ApbmError)), None)
            reasons = "\n".join(f"  {name}: {type(error).__name__}: {error}" for name, error in failed.items())
            raise ApbmError(
                f"{len(failed)} of {len(self._handed_out)} runs failed; the others are recorded.\n{reasons}"
            ) from bug
        if missing := self.missing():
            left = ""
            if self.budget.is_finite:
                left = f" About {self._minutes(missing):.3g} minutes of training are left."
            raise Stopped(
                f"{'asked to end' if is_asked() else 'the time is up'}: {len(self.wanted()) - len(missing)} of "
                f"{len(self.wanted())} runs are recorded, {len(self._unfinished)} wait at a checkpoint.{left} The same "
                "command goes on from here."
            )


def _epochs(configs: Sequence[RunConfig]) -> int:
    return sum(config.epochs for config in configs)
