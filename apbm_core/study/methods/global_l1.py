"""Global L1: one threshold over all layers, so that the criterion also chooses the widths.

The L1 norm of a filter grows with its number of weights, which says nothing of what it is worth; as torch-pruning's
``MagnitudeImportance(p=1, normalizer="mean")`` does, each layer's norms are divided by their mean.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from apbm_core.study.methods import l1
from apbm_core.study.methods.ranking import cut_globally
from apbm_core.study.methods.target import needed_parameter_target
from apbm_core.study.methods.task import Course, Task
from apbm_core.study.networks.models import prunable_convs

LABEL = "global L1"
SUMMARY = "filters of the smallest L1 norm over all layers go, so that the layers' widths are its own"
SOURCE = "Blalock et al., What is the State of Neural Network Pruning?, MLSys 2020 (global magnitude)"
PLACE, COLOUR, MARKER, DEFAULT = 67, "#4E79A7", ">", False
CHOOSES_WIDTHS = True


class Options(BaseModel):
    """How the widths are bounded, and how the training goes on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum: int = Field(2, ge=1, description="filters that a layer keeps, whatever their norms")
    course: Course = Field("restart", description="whether fine-tuning starts the learning rate's course anew")


def scores(model: nn.Module, layers: Sequence[str], images: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Each filter's L1 norm over the mean of its layer's: name -> (n,), float64, on the CPU.

    ``images`` and ``seed`` play no part, as in :func:`l1.scores`.
    """
    return {name: norms / norms.mean() for name, norms in l1.scores(model, layers).items()}


def prune(task: Task) -> nn.Module:
    """Pre-train the dense network, cut at one threshold over all layers, fine-tune."""
    needed_parameter_target(task.config)  # before anything is trained
    options, layers = task.options, prunable_convs(task.model_name)
    before, after = task.courses(options.course, task.pretrain_epochs)
    model = task.pretrained(before)
    small = cut_globally(task, model, lambda: scores(model, layers), options.minimum)
    task.train("finetune", small, task.finetune_epochs, course=after)
    return small
