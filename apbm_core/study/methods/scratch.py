"""Slim from scratch: the network of the same widths, trained for as many epochs, with no fusion and no bank.

The control that every pruning method must beat (Liu et al., Rethinking the Value of Network Pruning, 2019).
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from apbm_core.study.methods.task import Task
from apbm_core.study.networks.models import build_model
from apbm_core.study.options import added

LABEL = "slim from scratch"
SUMMARY = "the slim network trained from scratch, without any fusion"
SOURCE = "Liu et al., Rethinking the Value of Network Pruning, ICLR 2019"
PLACE, COLOUR, MARKER = 30, "#000000", "s"
STARTS_FROM = "scratch"
STARTS_SLIM = True
SCHEDULES = ("equal", "equal-time")


class Options(BaseModel):
    """How the weights start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fan_in: Literal["own", "dense"] = added(
        "own",
        if_absent="own",
        description="whose inputs the initial weights are scaled for: the slim layer's, or the dense one's, which makes"
        " them smaller; batch normalisation turns that into larger steps",
    )


def prune(task: Task) -> nn.Module:
    """Build the slim network and train it."""
    model = task.build(task.widths)
    if task.options.fan_in == "dense":
        scale_to_dense_fan_in(model, task)
    task.train("train", model, task.config.epochs)
    return model


@torch.no_grad()
def scale_to_dense_fan_in(model: nn.Module, task: Task) -> None:
    """Shrink every weight, in place, to the scale that the dense network's initialisation gives the same layer."""
    with torch.device("meta"):
        dense = build_model(task.model_name, task.num_classes)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.mul_((module.weight.shape[1] / dense.get_submodule(name).weight.shape[1]) ** 0.5)
