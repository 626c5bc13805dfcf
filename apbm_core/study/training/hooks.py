"""What a method may do inside the training loop, and what it is told.

Order of the calls, and where the loop's own work falls between them::

    start                                      once, before anything is restored from a checkpoint
    for each epoch:
        before_epoch
        for each batch:
            (forward pass) on_loss (backward pass) after_backward (optimizer's step) after_step
        after_epoch
        (validation, checkpoint)

Several hooks are called one after the other in the order they were given.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Context:
    """Where the training stands. Hooks may change the model's and the optimizer's values, not the counters."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    epochs: int
    steps_per_epoch: int
    epoch: int = 0  # counted from 0
    step: int = 0  # steps of this epoch that are done; in on_loss .. after_step, the index of the one being taken
    history: list[dict[str, Any]] = field(default_factory=list)  # one row for each finished epoch
    labels: Tensor | None = None  # of the batch that is being learnt from, shape (N,)
    course: tuple[float, float] = (0.0, 1.0)  # from where to where this training goes in the whole of a method's

    @property
    def progress(self) -> float:
        """The share of all steps that is done, in [0, 1]; of the whole method's, if this is a part of it."""
        return self.progress_after(self.step)

    def progress_after(self, step: int) -> float:
        """The progress once ``step`` steps of this epoch are done."""
        share = (self.epoch * self.steps_per_epoch + step) / (self.epochs * self.steps_per_epoch)
        begin, end = self.course
        return begin + (end - begin) * share


class Hook:
    """A method's part in the loop; override what is needed, every call does nothing by default.

    A training that resumes must go on as if it had not stopped: whatever a hook remembers between two steps, and that
    is not in the model or the optimizer, belongs into :meth:`state_dict`. Random numbers come from torch's generators,
    whose states the checkpoint holds.
    """

    def start(self, context: Context) -> None:
        """Before the first epoch, and again whenever the training resumes; the saved state then replaces what this
        set in the model, the optimizer and the hook. Parameters cannot be added here: the optimizer exists already."""

    def before_epoch(self, context: Context) -> None:
        """In training mode, before the first batch; not again when the training resumes in the middle of an epoch."""

    def on_loss(self, context: Context, loss: Tensor) -> Tensor:
        """The scalar to minimise, made of the ``loss`` so far (float32, outside autocast)."""
        return loss

    def after_backward(self, context: Context) -> None:
        """The gradients are there, the optimizer has not used them yet."""

    def after_step(self, context: Context) -> None:
        """The optimizer has changed the parameters."""

    def after_epoch(self, context: Context) -> dict[str, Any] | None:
        """Values to add to the epoch's row of the history: numbers, strings, lists. Validation comes after this, so
        it measures the network as the epoch leaves it."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the hook must remember: tensors, numbers, strings, None, and dicts, lists and tuples of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, the tensors on the CPU."""
