"""The flow that criteria on a trained network share: pre-train, score, cut, fine-tune."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from apbm_core.anatomy import Anatomy
from apbm_core.study.methods.target import keep_globally, needed_parameter_target
from apbm_core.study.methods.task import Course, Task
from apbm_core.study.networks.layers import keep_largest
from apbm_core.study.options import added
from apbm_core.study.training.evaluation import evaluate
from apbm_core.surgery import slim
from apbm_core.trained import hand_over, renew_norms

SEEN = 1024  # training images on which channels are seen to move together, and norms are measured

Scores = Callable[[nn.Module, Sequence[str], Tensor | None, int], dict[str, Tensor]]


class RankingOptions(BaseModel):
    """How the training goes on after the cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    course: Course = added(
        "restart",
        if_absent="restart",
        description="whether fine-tuning starts the learning rate's course anew or goes on with the pre-training's",
    )


def prune_by(scores: Scores, images: int = 0, fuses: bool = False) -> Callable[[Task], nn.Module]:
    """A method that keeps the filters with the largest ``scores`` of the pre-trained network; see RankingOptions.

    Args:
        scores: ``(model, layer names, images, seed) -> {name: (n,) scores}``, larger meaning more important.
        images: how many training images the criterion looks at; it gets None for 0.
        fuses: whether what reads the filters that go takes them over (:mod:`apbm_core.handover`) or does without.
    """

    def prune(task: Task) -> nn.Module:
        """Pre-train the dense network, keep the best-scored filters of every layer, fine-tune what is left."""
        before, after = task.courses(getattr(task.options, "course", "restart"), task.pretrain_epochs)
        small = cut_by(scores, task, task.pretrained(before), list(task.widths), images, fuses=fuses)
        note_after_cut(task, small)
        task.train("finetune", small, task.finetune_epochs, course=after)
        return small

    return prune


def cut_by(
    scores: Scores,
    task: Task,
    model: nn.Module,
    layers: Sequence[str],
    images: int = 0,
    phase: str = "score",
    fuses: bool = False,
) -> nn.Module:
    """``model`` with only the best-scored filters of ``layers``, as many as the run's widths say."""

    def score() -> dict[str, list[int]]:
        batch = task.calibration_images(images) if images else None
        found = scores(model, layers, batch, task.config.seed)
        return {name: keep_largest(found[name], task.widths[name], name).tolist() for name in layers}

    keep = task.remember(phase, score)
    if not fuses:
        return slim(model, task.example_inputs, keep)
    anatomy = Anatomy(model, task.example_inputs, coupled=False, prove=False)  # the cut itself is proved
    return hand_over(anatomy, {name: torch.tensor(kept) for name, kept in keep.items()}, seen(task))


def seen(task: Task) -> Sequence[Tensor]:
    """Batches of training images, of about a thousand in all."""
    return task.calibration_images(SEEN).split(128)


def note_after_cut(task: Task, small: nn.Module) -> None:
    """Note what a network that was trained already still knows after the cut, its norms measured anew.

    On the images held out of the training; where there are none, nothing is noted, for test images are seen once.
    """
    if not task.config.start_epochs or task.split.val is None:
        return
    recalibrated = copy.deepcopy(small)
    renew_norms(recalibrated, seen(task), task.example_inputs)
    judged = evaluate(recalibrated, task.split.val, task.split.mean, task.split.std, device=task.device)
    task.note("after_cut", {"val_accuracy": judged.accuracy})


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
