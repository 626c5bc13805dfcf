"""Benchmark of running side by side: two trainings with half of the threads each against one with all of them."""

import multiprocessing
import time
from multiprocessing.connection import Connection

import torch

from apbm_core.study.bench.measure import Measured, Settings, Table
from apbm_core.study.bench.steps import fastest_step, network

_SECONDS = 3.0  # that the trainings run in each round
_READY_SECONDS = 300.0


def side_by_side(settings: Settings) -> list[Table]:
    """Images/s of ResNet20 steps: two processes on half of the threads together, and one process on all."""
    table = Table(
        f"Side by side: ResNet20 steps, batch {settings.batch_size}",
        ("processes", "threads each", "images/s", "of one"),
    )
    if settings.device.type != "cpu" or settings.threads < 2:
        table.notes.append("Not measured: it takes a CPU and at least two threads.")
        return [table]
    half = settings.threads // 2
    seconds = min(_SECONDS, settings.seconds)
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
    try:
        for threads in (settings.threads, half, half):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, threads, settings.batch_size), daemon=True)
            process.start()
            theirs.close()
            workers.append((process, ours))
        for _, connection in workers:
            if not connection.poll(_READY_SECONDS):
                raise TimeoutError(f"a benchmark process was not ready after {_READY_SECONDS:.0f} s.")
            connection.recv()
        single, pair = [], []
        for _ in range(settings.rounds[0]):
            single.append(_run(workers[:1], seconds))
            pair.append(_run(workers[1:], seconds))
    finally:
        for process, connection in workers:
            connection.close()
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
    one, two = Measured(tuple(single)), Measured(tuple(pair))
    table.add(processes=1, threads_each=settings.threads, **{"images/s": one, "of one": one / one})
    table.add(processes=2, threads_each=half, **{"images/s": two, "of one": two / one})
    table.notes.append(
        "The second row adds up both processes: above 1, two runs side by side finish sooner than in turn."
    )
    return [table]


def _run(workers: list[tuple[multiprocessing.process.BaseProcess, Connection]], seconds: float) -> float:
    """Images/s of these workers together, all running at once for that long."""
    for _, connection in workers:
        connection.send(seconds)
    return sum(connection.recv() for _, connection in workers)


def _serve(connection: Connection, threads: int, batch_size: int) -> None:
    """A process's life: get ready, then train for as long as it is told, again and again, until the pipe closes."""
    torch.set_num_threads(threads)
    step = fastest_step(network("resnet20", "dense"), Settings(torch.device("cpu"), threads, batch_size=batch_size))
    step()
    connection.send(None)
    try:
        while True:
            seconds, steps, started = connection.recv(), 0, time.perf_counter()
            while steps == 0 or time.perf_counter() - started < seconds:
                step()
                steps += 1
            connection.send(steps * batch_size / (time.perf_counter() - started))
    except (EOFError, BrokenPipeError):
        return
