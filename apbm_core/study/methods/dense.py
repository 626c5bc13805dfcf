"""The dense network, trained like every other method: what all are compared with."""

from torch import nn

from apbm_core.study.methods.task import Task

LABEL = "dense"
SUMMARY = "the whole network, from which nothing is removed"
SOURCE = "the networks' own papers"
PLACE, COLOUR, MARKER = 0, "#444444", "_"
STARTS_FROM = "scratch"


def prune(task: Task) -> nn.Module:
    """Train the whole network and remove nothing."""
    model = task.build()
    task.train("train", model, task.config.epochs)
    return model
