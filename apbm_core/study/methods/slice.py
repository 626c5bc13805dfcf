"""Slim from scratch, started as a slice of the dense initialisation: the first filters of each layer.

The control of every form that keeps a bank of the dense width: it starts where they start, with weights drawn for the
dense layer's number of inputs, and neither scores nor fuses anything.
"""

from torch import nn

from apbm_core.study.methods.task import Task
from apbm_core.surgery import slim

LABEL = "slice of the dense start"
SUMMARY = "slim from scratch that starts as the first filters of the dense network"
SOURCE = "ours, a control"
PLACE, COLOUR, MARKER = 36, "#999933", "d"
DEFAULT = False
STARTS_FROM = "scratch"
SCHEDULES = ("equal", "equal-time")


def prune(task: Task) -> nn.Module:
    """Cut the dense network down to its first filters before any training, then train what is left."""
    first = {name: list(range(width)) for name, width in task.widths.items()}
    model = slim(task.build(), task.example_inputs, first)
    task.train("train", model, task.config.epochs)
    return model
