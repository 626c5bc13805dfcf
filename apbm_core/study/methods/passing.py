"""APBM without its fusion: the slice of the dense start, each filter passing its own input channel on.

The control of APBM where it passes its input on: the same filters at the start, the same learned amounts of the input
and of what is learnt, epochs and deployed network. No filter is scored, chosen or fused, so what APBM has over it is
what fusion does.
"""

from torch import nn

from apbm_core.compress import compact
from apbm_core.passing import pass_inputs
from apbm_core.study.methods.task import Task
from apbm_core.surgery import slim

LABEL = "APBM without fusion"
SUMMARY = "the first filters of the dense start, passing their input on; nothing scored, nothing fused"
SOURCE = "ours, a control, after Zagoruyko and Komodakis, DiracNets, 2017"
PLACE, COLOUR, MARKER = 12, "#B15928", "d"
DEFAULT = False
STARTS_FROM = "scratch"
STARTS_SLIM = True  # passing its input on would bury what a trained network has learnt
SCHEDULES = ("equal", "equal-time")


def prune(task: Task) -> nn.Module:
    """Cut the dense network down to its first filters before any training, and let them pass their input on."""
    first = {name: list(range(width)) for name, width in task.widths.items()}
    model = slim(task.build(), task.example_inputs, first)
    pass_inputs(model, first)
    task.train("train", model, task.config.epochs)
    return compact(model)
