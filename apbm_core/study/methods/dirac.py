"""Slim from scratch, with an initialisation that passes its input on: the first filters of a layer start as identities.

The control of every form that passes its input on while it trains: the same network, epochs and cost as slim from
scratch, and only the first weights differ (Jordan, *94 % on CIFAR-10 in 3.29 seconds*, 2024, section 3.3).
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from apbm_core.passing import start_as_identity, why_not_passing
from apbm_core.study.methods.task import Task

LABEL = "slim from scratch, identity start"
SUMMARY = "slim from scratch whose first filters start as identities"
SOURCE = "Jordan, 94 % on CIFAR-10 in 3.29 seconds, 2024"
PLACE, COLOUR, MARKER = 32, "#44AA99", "8"
DEFAULT = False
STARTS_FROM = "scratch"
STARTS_SLIM = True
SCHEDULES = ("equal", "equal-time")


class Options(BaseModel):
    """How the identity gets into the random start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: Literal["replace", "add"] = Field("replace", description="the identity in place of noise, or on top of it")
    amount: float = Field(1.0, gt=0, le=10, description="what the identity is multiplied by")


def prune(task: Task) -> nn.Module:
    """Build the slim network, start its convolutions as identities where there are channels for it, and train."""
    model = task.build(task.widths)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and why_not_passing(module) is None:
            start_as_identity(module, task.options.start, task.options.amount)
    task.train("train", model, task.config.epochs)
    return model
