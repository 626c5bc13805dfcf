"""The flow that all criteria on a trained network share: pre-train, score, cut, fine-tune."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from apbm_core.study.methods.task import Task
from apbm_core.study.networks.layers import keep_largest
from apbm_core.surgery import slim

Scores = Callable[[nn.Module, Sequence[str], Tensor | None, int], dict[str, Tensor]]


def prune_by(scores: Scores, images: int = 0) -> Callable[[Task], nn.Module]:
    """A method that keeps the filters with the largest ``scores`` of the pre-trained network.

    Args:
        scores: ``(model, layer names, images, seed) -> {name: (n,) scores}``, larger meaning more important.
        images: how many training images the criterion looks at; it gets None for 0.
    """

    def prune(task: Task) -> nn.Module:
        """Pre-train the dense network, keep the best-scored filters of every layer, fine-tune what is left."""
        small = cut_by(scores, task, task.pretrained(), list(task.widths), images)
        task.train("finetune", small, task.finetune_epochs)
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
