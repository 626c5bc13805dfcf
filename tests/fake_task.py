"""Real tasks on random images, so that whole methods can run in seconds."""

from pathlib import Path

import torch
from pydantic import BaseModel

from apbm_core.study.data.datasets import DataSplit
from apbm_core.study.data.images import Images
from apbm_core.study.methods.task import Task
from apbm_core.study.options import stated
from apbm_core.study.records import ResultsFolder, RunConfig
from apbm_core.study.training.recipes import get_recipe


class Interrupted(Exception):
    """What stops a run in the middle."""


def interrupt(task: Task, report: int | None) -> Task:
    """The same task, stopped at its so-manieth report of progress; None lets it run."""
    reports = []

    def progress(phase, context):
        reports.append(phase)
        if len(reports) == report:
            raise Interrupted

    task._progress = progress
    return task


def fake_task(
    folder: Path,
    method: str,
    model: str,
    options: BaseModel,
    epochs: int,
    target: float,
    by: str = "params",
    schedule: str = "equal",
    images: int = 32,
) -> Task:
    """A task that keeps its checkpoints in ``folder``: a second one of the same arguments goes on where it stopped."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    data = Images(pixels, torch.arange(images) % 10)
    split = DataSplit(train=data, val=None, test=data, mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=10)
    config = RunConfig(
        method=method,
        model=model,
        dataset="digits",
        target=target,
        by=by,
        epochs=epochs,
        schedule=schedule,
        recipe=get_recipe("fast", batch_size=images // 2, precision="float32", lr=0.05),
        seed=0,
        options={} if options is None else stated(options),
    )
    return Task(config, split, ResultsFolder(folder), options, torch.device("cpu"))
