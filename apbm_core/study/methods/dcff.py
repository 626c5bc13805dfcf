"""DCFF, dynamic-coded filter fusion (Lin et al.), with its own temperature schedule (methods.md 2).

In the authors' implementation a probability that underflows makes a score NaN, and a layer with a non-finite score
keeps its last ones. From epoch 1 on, at temperatures in the thousands, that is every layer: selection and scores stay
those of epoch 0. Our scores are finite at any temperature, so ``frozen_scores`` reproduces that on purpose.
"""

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from apbm_core.study.methods import apbm
from apbm_core.study.methods.task import Task
from apbm_core.study.methods.variants import VariantSettings
from apbm_core.study.options import added
from apbm_core.temperature import DcffTemperature

LABEL = "DCFF"
SUMMARY = "dynamic-coded filter fusion: the same fusion with its own temperatures, scored once an epoch"
SOURCE = "Lin et al., Training Compact CNNs for Image Classification using Dynamic-coded Filter Fusion"
PLACE, COLOUR, MARKER = 20, "#E69F00", "D"
STARTS_FROM = "scratch"
SCHEDULES = ("equal", "equal-time")

PUBLISHED_EPOCHS = 300


class Options(BaseModel):
    """DCFF's choices that are ours to make."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frozen_scores: bool = Field(True, description="keep epoch 0's selection, as the authors' code does; False: rescore")
    compress: bool = added(
        False,
        if_absent=False,
        description="go through the published 300 epochs' temperatures and scorings in the run's own, instead of one"
        " scoring an epoch: all filters are averaged for a 300th of the training, not for its whole first epoch",
    )


def prune(task: Task) -> nn.Module:
    """Train with the reference's schedule, scored once before each epoch, or before each of the published ones."""
    options, epochs = task.options, task.config.epochs
    course = PUBLISHED_EPOCHS if options.compress else epochs
    settings = VariantSettings(
        schedule=DcffTemperature(epochs=course), rescale=False, reselect=not options.frozen_scores
    )
    rescores = max(1, round(course / epochs))
    return apbm.train_fused(task, apbm.Options(settings=settings, rescores_per_epoch=rescores, passing=False))
