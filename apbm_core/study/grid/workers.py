"""Runs side by side: a pool of processes that report where they stand and die with their parent."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from typing import Any

import torch

from apbm_core.errors import ApbmError

_POLL_SECONDS = 0.3


def plan_workers(workers: int, jobs: int, device: torch.device) -> tuple[int, int]:
    """How many runs at a time, and how many threads for each: (workers, threads).

    Args:
        workers: as many as asked for; 0 leaves it to us: one on a GPU, else one a core and at most four. Two
            single-threaded runs side by side finish sooner than two runs in turn on two threads.
        jobs: how many runs there are; the threads do not depend on it, so that timings can be compared.
        device: where they compute.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 0:
        workers = 1 if device.type != "cpu" else min(4, cores)
    return max(1, min(workers, jobs)), max(1, cores // workers)


def run_side_by_side(
    function: Callable[..., Any],
    jobs: Sequence[tuple],
    workers: int,
    threads: int,
    report: Callable[[int, Any], None],
) -> Iterator[tuple[int, Any, BaseException | None]]:
    """Call ``function(*job, report)`` for every job, ``workers`` at a time; yield (index, result, error) as they end.

    Jobs are started in order. With one worker they run in this process. An error of one job does not stop the others;
    an interrupt stops them all, and so does the death of this process, however it dies.

    Args:
        function: importable by name; its last argument is a callable that takes what ``report`` shall see.
        jobs: the other arguments.
        workers, threads: see :func:`plan_workers`.
        report: called in this process with (index of the job, what it said).
    """
    if workers == 1:
        torch.set_num_threads(threads)
        for index, job in enumerate(jobs):
            try:
                yield index, function(*job, lambda said, index=index: report(index, said)), None
            except Exception as error:
                yield index, None, error
        return

    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads, said))
    with _threads_in_environment(threads):
        futures: dict[Future, int] = {pool.submit(_call, function, job, index): index for index, job in enumerate(jobs)}
    try:
        while futures:
            done, _ = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            while not said.empty():
                report(*said.get())
            for future in done:
                index, error = futures.pop(future), future.exception()
                yield index, None if error else future.result(), _killed(error) or error
    except BaseException:  # an interrupt, or the caller gave up
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


def _killed(error: BaseException | None) -> ApbmError | None:
    """What to say when a worker, and with it the pool, died of a signal."""
    if not isinstance(error, BrokenProcessPool):
        return None
    return ApbmError(
        "a worker process was killed, perhaps because memory ran out. The same command goes on from the last "
        "checkpoints; with workers = 1 it takes the least memory."
    )


_queue = None


def _begin(threads: int, said) -> None:
    global _queue
    _queue = said
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    parent = multiprocessing.parent_process()

    def die_with_parent() -> None:
        wait_for_any([parent.sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def _call(function: Callable[..., Any], job: tuple, index: int) -> Any:
    last = [0.0]

    def report(said: Any) -> None:
        now = time.monotonic()
        if now - last[0] > _POLL_SECONDS:  # the parent looks no more often
            last[0] = now
            _queue.put((index, said))

    return function(*job, report)


@contextlib.contextmanager
def _threads_in_environment(threads: int) -> Iterator[None]:
    """OpenMP reads its number of threads when a process starts, before any code of ours runs."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
