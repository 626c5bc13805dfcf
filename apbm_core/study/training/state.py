"""Where a training stands: what its checkpoint holds, so that it goes on as if it had never been interrupted."""

from typing import TYPE_CHECKING, Any

from apbm_core.errors import CheckpointError
from apbm_core.study.training.device import random_state, restore_random_state
from apbm_core.study.training.meters import Stopwatch

if TYPE_CHECKING:
    from apbm_core.study.training.loop import Training


def state_of(training: "Training") -> dict[str, Any]:
    """All that the steps to come depend on, and the totals so far."""
    context = training.context
    return {
        "precision": training.precision,
        "channels_last": training.channels_last,
        "lowered": training.lowered,
        "epoch": context.epoch,
        "step": context.step,
        "history": context.history,
        "seconds": training.stopwatch.seconds,
        "epoch_started": training.epoch_started,
        "evaluation_seconds": training.evaluation_seconds,
        "images": training.images,
        "peak_memory": training.peak_memory,
        "tally": training.tally.state_dict(),
        "model": training.model.state_dict(),
        "evaluation_mode": [name for name, module in training.model.named_modules() if not module.training],
        "optimizer": context.optimizer.state_dict(),
        "hooks": [(type(hook).__name__, hook.state_dict()) for hook in training.hooks],
        "random": random_state(training.device),
    }


def restore(training: "Training", saved: dict[str, Any]) -> None:
    """Put a training back to where it was when :func:`state_of` gave ``saved``.

    Raises:
        CheckpointError: ``saved`` is of other hooks or another network.
    """
    context, path = training.context, training.file.path
    before, now = [name for name, _ in saved["hooks"]], [type(hook).__name__ for hook in training.hooks]
    if before != now:
        raise CheckpointError(
            f"{path} was written with the hooks {before}, this training has {now}. Use the same ones, or delete it "
            "to start this phase again."
        )
    try:
        training.model.load_state_dict(saved["model"])
        context.optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit this network: {error}\nBuild the same one, or delete it to start this phase again."
        ) from error
    for name, module in training.model.named_modules():
        module.training = name not in saved["evaluation_mode"]
    for hook, (_, state) in zip(training.hooks, saved["hooks"], strict=True):
        hook.load_state_dict(state)
    context.epoch, context.step, context.history = saved["epoch"], saved["step"], saved["history"]
    training.stopwatch = Stopwatch(training.device, saved["seconds"])
    training.epoch_started, training.evaluation_seconds = saved["epoch_started"], saved["evaluation_seconds"]
    training.images, training.peak_memory = saved["images"], saved["peak_memory"]
    training.tally.load_state_dict(saved["tally"])
    restore_random_state(saved["random"], training.device)
