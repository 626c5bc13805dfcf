"""Slim from scratch: the network of the same widths, trained for as many epochs, with no fusion and no bank.

The control that every pruning method must beat (Liu et al., Rethinking the Value of Network Pruning, 2019).
"""

from torch import nn

from apbm_core.task import Task

LABEL = "slim from scratch"
STARTS_FROM = "scratch"
SCHEDULES = ("equal", "equal-time")


def prune(task: Task) -> nn.Module:
    """Build the slim network and train it."""
    model = task.build(task.widths)
    task.train("train", model, task.config.epochs)
    return model
