"""The runs of a study as tasks of Ray, on one machine or on a cluster whose nodes share the results folder.

Ray places the tasks, starts them again after a node is lost, and brings back what they return. Everything else is as on
one machine: a run's identity, its lock, its checkpoints and its record are files of the results folder, so a task that
is started again goes on from the last checkpoint, and a driver that was killed is started again with the same command.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from apbm_core.errors import ApbmError, ConfigError
from apbm_core.study.training import stopping

RETRIES = 5
"""How often a run is started again after its node or its process was lost."""

_POLL_SECONDS = 0.5


def run_on_cluster(
    function: Callable[..., Any],
    next_job: Callable[[], tuple | None],
    threads: int,
    gpu_share: float,
    report: Callable[[int, Any], None],
    address: str | None = None,
) -> Iterator[tuple[int, Any, BaseException | None]]:
    """As :func:`~apbm_core.study.grid.workers.run_side_by_side`, with as many runs at a time as the cluster holds.

    Args:
        function, next_job, report: as there.
        threads: the cores that a run takes.
        gpu_share: the share of a GPU that it takes; 0 for runs on the CPU.
        address: of a running cluster, "auto" for the one that this machine belongs to; None starts Ray here.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    ray = _import_ray()
    begun_here = not ray.is_initialized()
    if begun_here:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                include_dashboard=None if address else False,
                runtime_env={"env_vars": {name: os.environ[name] for name in os.environ if name.startswith("APBM_")}},
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"there is no Ray cluster at {address!r} ({str(error).splitlines()[0]}); start one with `ray start "
                "--head`, or leave the address out to use this machine alone."
            ) from error
    try:
        yield from _run(ray, function, next_job, threads, gpu_share, report)
    finally:
        if begun_here:
            ray.shutdown()


def _run(ray, function, next_job, threads, gpu_share, report) -> Iterator[tuple[int, Any, BaseException | None]]:
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), False)
    board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Board).remote()
    remote = ray.remote(num_cpus=threads, num_gpus=gpu_share, max_retries=RETRIES, retry_exceptions=False)(_call)
    numbers, waiting, passed_on = itertools.count(), {}, False

    def hand_out() -> None:
        while len(waiting) < _slots(ray, threads, gpu_share) and (job := next_job()) is not None:
            index = next(numbers)
            waiting[remote.remote(function, job, index, threads, os.getcwd(), board)] = index

    hand_out()
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_SECONDS)
        if stopping.is_asked() and not passed_on:
            passed_on = True
            ray.get(board.ask.remote())
        for index, said in ray.get(board.take.remote()):
            report(index, said)
        for reference in done:
            index = waiting.pop(reference)
            try:
                yield index, ray.get(reference), None
            except ray.exceptions.RayTaskError as error:  # the run's own error
                yield index, None, error.cause if isinstance(error.cause, BaseException) else error
            except ray.exceptions.RayError as error:
                said = f"its node or process was lost more than {RETRIES} times ({type(error).__name__}), perhaps "
                said += "because memory ran out. The same command goes on from the last checkpoint."
                yield index, None, ApbmError(said)
        hand_out()


class Board:
    """What runs on other nodes say, and whether they are asked to end: an actor beside the driver."""

    def __init__(self):
        self.said: dict[int, Any] = {}
        self.asked = False

    def put(self, index: int, said: Any) -> bool:
        """Pin up the last word of a run, None for nothing yet; returns whether runs are asked to end."""
        if said is not None:
            self.said[index] = said
        return self.asked

    def take(self) -> list[tuple[int, Any]]:
        """The words since the last time."""
        said, self.said = list(self.said.items()), {}
        return said

    def ask(self) -> None:
        """Ask all runs to end where they can go on."""
        self.asked = True


def _call(function: Callable[..., Any], job: tuple, index: int, threads: int, folder: str, board) -> Any:
    """A task: the run in this thread; what it says goes to the board from another one, which no step waits for."""
    import ray

    os.chdir(folder)  # relative paths mean what they mean to the driver
    torch.set_num_threads(threads)
    stopping.forget()  # Ray uses its processes again
    last, is_over = [None], threading.Event()

    def tell() -> None:
        while not is_over.wait(_POLL_SECONDS):
            try:
                if ray.get(board.put.remote(index, last[0])):
                    stopping.ask()
            except ray.exceptions.RayError:  # the board is being started again; the run goes on
                time.sleep(_POLL_SECONDS)

    threading.Thread(target=tell, daemon=True).start()
    try:
        return function(*job, lambda said: last.__setitem__(0, said))
    finally:
        is_over.set()


def _slots(ray, threads: int, gpu_share: float) -> int:
    """How many runs the cluster holds now; at least one, for nodes may still be on their way."""
    resources = ray.cluster_resources()
    slots = int(resources.get("CPU", 0) // threads)
    if gpu_share:
        slots = min(slots, int(resources.get("GPU", 0) / gpu_share + 1e-9))
    return max(1, slots)


def _import_ray():
    try:
        import ray
        import ray.util.scheduling_strategies  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "engine = 'ray' needs Ray, which is not installed: make setup-cluster, or pip install 'apbm-core[cluster]'."
        ) from error
    return ray
