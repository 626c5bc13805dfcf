"""Runs side by side: a pool of processes that report where they stand and die with their parent."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from typing import Any

import torch

from apbm_core.errors import ApbmError
from apbm_core.study.training import stopping

_POLL_SECONDS = 0.3


def plan_workers(workers: int, jobs: int, device: torch.device) -> tuple[int, int]:
    """How many runs at a time, and how many threads for each: (workers, threads).

    The threads are an equal part of the cores, and no more than ``OMP_NUM_THREADS``, where that is set: schedulers and
    users limit a process by it, and threads that wait for a core make a run many times slower.

    Args:
        workers: as many as asked for; 0 leaves it to us: one on a GPU, else one a core and at most four. Two
            single-threaded runs side by side finish sooner than two runs in turn on two threads.
        jobs: how many runs there are; the threads do not depend on it, so that timings can be compared.
        device: where they compute.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 0:
        workers = 1 if device.type != "cpu" else min(4, cores)
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # OpenMP takes one for each level of nesting
    threads = min(cores // workers, int(limit) if limit.isdigit() else cores)
    return max(1, min(workers, jobs)), max(1, threads)


def run_side_by_side(
    function: Callable[..., Any],
    next_job: Callable[[], tuple | None],
    workers: int,
    threads: int,
    report: Callable[[int, Any], None],
) -> Iterator[tuple[int, Any, BaseException | None]]:
    """Call ``function(*job, report)`` for every job, ``workers`` at a time; yield (index, result, error) as they end.

    With one worker they run in this process. An error of one job does not stop the others; an interrupt stops them all,
    and so does the death of this process, however it dies. When the process was asked to end (see
    :mod:`apbm_core.study.training.stopping`), so are the workers, and what they have in hand is waited for.

    Args:
        function: importable by name; its last argument is a callable that takes what ``report`` shall see.
        next_job: the next job's other arguments, or None if there is none now; asked whenever a worker is free, so that
            a job may follow from the results of earlier ones. Jobs are counted from 0 as they are handed out.
        workers, threads: see :func:`plan_workers`.
        report: called in this process with (index of the job, what it said).
    """
    if workers == 1:
        torch.set_num_threads(threads)
        for index in itertools.count():
            job = next_job()
            if job is None:
                return
            try:
                outcome = function(*job, lambda said, index=index: report(index, said)), None
            except Exception as error:
                outcome = None, error
            yield index, *outcome

    context = multiprocessing.get_context("spawn")
    said, numbers, futures = context.SimpleQueue(), itertools.count(), {}
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads, said))

    def hand_out() -> None:
        with _threads_in_environment(threads):  # a submission may start a process
            while len(futures) < workers and (job := next_job()) is not None:
                index = next(numbers)
                try:
                    futures[pool.submit(_call, function, job, index)] = index
                except BrokenProcessPool:  # a worker died; what was in hand is yielded with that error
                    return

    passed_on = False
    try:
        hand_out()
        while futures:
            done, _ = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            if stopping.is_asked() and not passed_on:
                passed_on = True
                for process in list((pool._processes or {}).values()):
                    process.terminate()
            while not said.empty():
                report(*said.get())
            for future in done:
                index, error = futures.pop(future), future.exception()
                yield index, None if error else future.result(), _killed(error) or error
            if done:
                hand_out()
    except BaseException:  # an interrupt, or the caller gave up
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
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
    signal.signal(signal.SIGTERM, stopping.ask)
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
