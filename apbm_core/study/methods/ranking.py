"""The flow that criteria on a trained network share: pre-train, score, cut, fine-tune."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from apbm_core.study.methods.target import keep_globally, needed_parameter_target
from apbm_core.study.methods.task import Course, Task
from apbm_core.study.networks.layers import keep_largest
from apbm_core.study.options import added
from apbm_core.surgery import slim

Scores = Callable[[nn.Module, Sequence[str], Tensor | None, int], dict[str, Tensor]]


class RankingOptions(BaseModel):
    """How the training goes on after the cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    course: Course = added(
        "restart",
        if_absent="restart",
        description="whether fine-tuning starts the learning rate's course anew or goes on with the pre-training's",
    )


def prune_by(scores: Scores, images: int = 0) -> Callable[[Task], nn.Module]:
    """A method that keeps the filters with the largest ``scores`` of the pre-trained network; see RankingOptions.

    Args:
        scores: ``(model, layer names, images, seed) -> {name: (n,) scores}``, larger meaning more important.
        images: how many training images the criterion looks at; it gets None for 0.
    """

    def prune(task: Task) -> nn.Module:
        """Pre-train the dense network, keep the best-scored filters of every layer, fine-tune what is left."""
        before, after = task.courses(getattr(task.options, "course", "restart"), task.pretrain_epochs)
        small = cut_by(scores, task, task.pretrained(before), list(task.widths), images)
        task.train("finetune", small, task.finetune_epochs, course=after)
        return small

    return prune


def cut_by(
    scores: Scores, task: Task, model: nn.Module, layers: Sequence[str], images: int = 0, phase: str = "score"
) -> nn.Module:
    """``model`` with only the best-scored filters of ``layers``, as many as the run's widths say."""

    def score() -> dict[str, list[int]]:
        batch = task.calibration_images(images) if images else None
        found = scores(model, layers, batch, task.config.seed)
        return {name: keep_largest(found[name], task.widths[name], name).tolist() for name in layers}

    return slim(model, task.example_inputs, task.remember(phase, score))


def cut_globally(task: Task, model: nn.Module, scores: Callable[[], Mapping[str, Tensor]], minimum: int) -> nn.Module:
    """``model`` with the best-scored filters of all layers together, as many as meet the run's target of parameters.

    Args:
        task: the run.
        model: its dense network.
        scores: gives convolution -> (n,), comparable between layers; larger = keep.
        minimum: filters that a layer keeps.

    Raises:
        ConfigError: the run has no target of parameters, or it is out of reach.
    """
    target = needed_parameter_target(task.config)

    def choose() -> dict[str, Any]:
        keep, threshold, at_minimum = keep_globally(task.costs, scores(), target, minimum)
        return {"keep": keep, "facts": {"threshold": threshold, "layers_at_minimum": at_minimum}}

    return slim(model, task.example_inputs, task.choose(choose)["keep"])
