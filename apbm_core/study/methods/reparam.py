"""Slim from scratch with learned branches: RepVGG's block, merged into one convolution at the end.

The control of every fusion by branches: the same widths and epochs, a pointwise convolution and the identity beside
each convolution, each with its own BatchNorm, and no similarity anywhere (Ding et al., RepVGG, CVPR 2021).
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from apbm_core.branches import KINDS, add_branches, merge_branches
from apbm_core.study.methods.task import Task

LABEL = "slim from scratch, branches"
SUMMARY = "slim from scratch with a pointwise branch and an identity beside each convolution, merged at the end"
SOURCE = "Ding et al., RepVGG, CVPR 2021"
PLACE, COLOUR, MARKER = 34, "#AA4499", "h"
DEFAULT = False
STARTS_FROM = "scratch"
STARTS_SLIM = True
SCHEDULES = ("equal", "equal-time")


class Options(BaseModel):
    """Which branches a convolution trains with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: Sequence[Literal["pointwise", "identity"]] = Field(KINDS, min_length=1, description="beside its own kernel")


def prune(task: Task) -> nn.Module:
    """Build the slim network, give its convolutions branches, train, merge them."""
    model, report = add_branches(task.build(task.widths), task.example_inputs, task.options.kinds)
    task.note("branches", {"branched": list(report.branched), "left": report.left})
    task.train("train", model, task.config.epochs)
    return merge_branches(model)
