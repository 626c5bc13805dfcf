"""The training loop: the only one. It knows networks, data and recipes; methods act through hooks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apbm_core.errors import ConfigError, TrainingDiverged
from apbm_core.files import sha256
from apbm_core.study.data.batches import Augmentation, BatchSource
from apbm_core.study.data.datasets import DataSplit
from apbm_core.study.training.averaging import Lookahead
from apbm_core.study.training.checkpoint import CheckpointFile
from apbm_core.study.training.device import (
    CompiledForward,
    autocast,
    memory_format,
    peak_memory_bytes,
    pick_device,
    seed_everything,
)
from apbm_core.study.training.divergence import LossGuard, first_non_finite, non_finite_parameter
from apbm_core.study.training.evaluation import evaluate
from apbm_core.study.training.hooks import Context, Hook
from apbm_core.study.training.lowering import choose_lowered, lowered
from apbm_core.study.training.meters import Stopwatch, Tally
from apbm_core.study.training.optimizer import build_optimizer
from apbm_core.study.training.precision import resolve_precision
from apbm_core.study.training.recipes import Recipe, learning_rate
from apbm_core.study.training.state import restore, state_of
from apbm_core.study.training.stopping import Stopped

_ROW = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds", "images_per_second")
_STEPS_BETWEEN_LOSS_CHECKS = 50  # on accelerators; a CPU is asked at every step


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training reports; the trained network is the module that was passed in."""

    history: list[dict[str, Any]]  # a row for each epoch: see train
    seconds: float  # of training, hooks included; not validation, not writing checkpoints, not steps that were lost
    evaluation_seconds: float
    images: int
    images_per_second: float
    peak_memory_bytes: int
    precision: str
    channels_last: bool
    lowered: tuple[str, ...]  # layers that were trained as matrix products: see lowering.py


def train(
    model: nn.Module,
    split: DataSplit,
    recipe: Recipe,
    epochs: int,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    hooks: Sequence[Hook] = (),
    checkpoint: str | Path | None = None,
    identity: str = "",
    checkpoint_seconds: float = 60.0,
    checkpoint_steps: int | None = None,
    progress: Callable[[Context], None] | None = None,
    course: tuple[float, float] = (0.0, 1.0),
    stop: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Train ``model`` in place on ``split.train``; ``split.val`` is measured after each epoch, ``split.test`` never.

    Each row of the history holds epoch (from 0), lr (the last step's), train_loss (mean cross-entropy of the batches
    as they were trained on, before the hooks add to it) and train_accuracy, val_loss and val_accuracy if there is a
    validation set, seconds, images_per_second, and what the hooks' ``after_epoch`` return.

    With a ``checkpoint``, a training that was interrupted at any step goes on from the last saved one and ends with
    the same weights, optimizer state and history, bit for bit on a CPU with the same number of threads, and times
    aside; precision, layout and lowered layers stay those that it began with. A finished one returns at once.

    Args:
        model: logits (N, classes) from images (N, 3, H, W); moved to ``device``.
        split: the data.
        recipe: how to train.
        epochs: how long, at least 1.
        seed: of the batches' order and augmentation, and of torch's global generators, which dropout draws from.
        device: "auto", "cpu", "cuda", "mps".
        hooks: a method's part in the loop, called in this order.
        checkpoint: file to save to at each epoch's end and to resume from.
        identity: what is trained here; a checkpoint of another identity, recipe, length or seed is refused.
        checkpoint_seconds: save in the middle of an epoch, too, when the last time is this long ago.
        checkpoint_steps: save every so many steps as well.
        progress: called after each step, an epoch's last one once its row is in ``context.history``.
        course: the part of the recipe's learning-rate course, as shares of it, that these epochs go through; for a
            method that trains in several parts what is one training to the recipe.
        stop: asked after each step, and so never before the first; if it says yes, the state is saved.

    Raises:
        ConfigError: the arguments do not fit together.
        CheckpointError: the checkpoint is damaged or another training's.
        TrainingDiverged: the loss or a parameter is no longer finite; the last good checkpoint stays.
        Stopped: ``stop`` said so, and there are steps left.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ConfigError(f"epochs = {epochs!r} must be a whole number of at least 1.")
    if not 0 <= course[0] < course[1] <= 1:
        raise ConfigError(f"course = {course} must rise from at least 0 to at most 1.")
    device = pick_device(device)
    augmentation = Augmentation(padding=recipe.padding, crop=recipe.crop, flip=recipe.flip)
    source = BatchSource(split.train, split.mean, split.std, recipe.batch_size, device, augmentation, seed)
    part = "" if course == (0.0, 1.0) else f", from {course[0]:.6g} to {course[1]:.6g} of the course"
    file = CheckpointFile(
        checkpoint,
        f"{identity or 'unnamed'}; {epochs} epochs of {source.steps_per_epoch} steps{part}, seed {seed}, "
        f"recipe {recipe.name} {sha256(recipe.model_dump_json(exclude={'lowering'}).encode())[:12]}",
        checkpoint_seconds,
        checkpoint_steps,
    )
    seed_everything(seed)
    training = Training(model, split, source, recipe, epochs, device, tuple(hooks), file, course)
    training.stop = stop or training.stop
    with lowered(model, training.lowered):
        while training.context.epoch < epochs:
            training.train_epoch(progress or (lambda context: None))
    return training.result()


class Training:
    """One call of :func:`train`: what it works with and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        split: DataSplit,
        source: BatchSource,
        recipe: Recipe,
        epochs: int,
        device: torch.device,
        hooks: tuple[Hook, ...],
        file: CheckpointFile,
        course: tuple[float, float],
    ):
        self.model, self.split, self.source, self.recipe = model, split, source, recipe
        if recipe.lookahead:
            hooks = (*hooks, Lookahead(recipe.lookahead))  # last: it averages what the method's own hooks leave
        self.device, self.hooks, self.file = device, hooks, file
        saved = file.load()
        if saved:
            self.precision, self.channels_last = saved["precision"], saved["channels_last"]
        else:
            self.precision, self.channels_last = resolve_precision(recipe.precision, recipe.channels_last, device)
        self.layout = memory_format(self.channels_last)
        model.to(device, memory_format=self.layout)
        if saved:
            self.lowered = tuple(saved.get("lowered", ()))  # earlier versions lowered nothing
        else:
            arithmetic = (self.precision, self.channels_last)
            self.lowered = choose_lowered(model, recipe, source.image_size, device, *arithmetic)
        self.forward = CompiledForward(model, recipe.compile) if recipe.compile else model
        self.guard = LossGuard(device, 1 if device.type == "cpu" else _STEPS_BETWEEN_LOSS_CHECKS)
        self.tally, self.stopwatch = Tally(device), Stopwatch(device)
        self.stop: Callable[[], bool] = lambda: False
        self.epoch_started = 0.0  # the stopwatch's seconds
        self.evaluation_seconds, self.images, self.peak_memory = 0.0, 0, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        optimizer = build_optimizer(model, recipe)
        self.context = Context(model, optimizer, device, epochs, source.steps_per_epoch, course=course)
        for hook in hooks:
            hook.start(self.context)
        if saved:
            restore(self, saved)

    def train_epoch(self, report: Callable[[Context], None]) -> None:
        """The rest of the epoch that the training stands in, up to its checkpoint."""
        context = self.context
        if context.step == 0:
            self.epoch_started = self.stopwatch.seconds
        self.stopwatch.start()
        if context.step == 0:
            self.tally = Tally(self.device)
            self.model.train()
            for hook in self.hooks:
                hook.before_epoch(context)
        for images, labels in self.source.epoch(context.epoch, start_step=context.step):
            images = images.contiguous(memory_format=self.layout)
            self.train_step(images, labels)
            context.step += 1
            if context.step < context.steps_per_epoch:
                is_last = self.stop()
                if is_last or self.file.is_due(context.step):
                    self.raise_if_diverged(images)
                    with self.stopwatch.paused():
                        self.file.save(state_of(self))
                report(context)
                if is_last:
                    raise self.stopped()
        self.raise_if_diverged(images)
        row = {"epoch": context.epoch, "lr": context.optimizer.param_groups[0]["lr"]}
        row |= {"train_loss": self.tally.mean_loss, "train_accuracy": self.tally.accuracy}
        extra = self.after_epoch()
        self.stopwatch.stop()
        seconds = self.stopwatch.seconds - self.epoch_started
        row |= self.validate() | {"seconds": seconds, "images_per_second": self.tally.images / seconds} | extra
        context.history.append(row)
        context.epoch, context.step = context.epoch + 1, 0
        self.peak_memory = max(self.peak_memory, peak_memory_bytes(self.device))
        self.file.save(state_of(self))
        report(context)
        if context.epoch < context.epochs and self.stop():
            raise self.stopped()

    def stopped(self) -> Stopped:
        """The error that ends a training whose state was saved."""
        context, kept = self.context, f"; {self.file.path} holds where it stands" if self.file.exists else ""
        return Stopped(f"stopped in epoch {context.epoch} of {context.epochs}, before step {context.step}{kept}.")

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Forward, backward and update for one batch."""
        context, optimizer = self.context, self.context.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, context.progress) * group.get("lr_scale", 1.0)
        with autocast(self.device, self.precision):
            logits = self.forward(images)
        if logits.shape != (len(labels), self.split.num_classes):
            raise ConfigError(
                f"the model turns {len(labels)} images into an output of shape {tuple(logits.shape)}; the data has "
                f"{self.split.num_classes} classes, so build it with num_classes={self.split.num_classes}."
            )
        cross_entropy = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        loss, context.labels = cross_entropy, labels
        for hook in self.hooks:
            loss = hook.on_loss(context, loss)
        if self.guard.saw_non_finite(loss, context.step):
            self.raise_if_diverged(images)
        optimizer.zero_grad()
        loss.backward()
        for hook in self.hooks:
            hook.after_backward(context)
        optimizer.step()
        for hook in self.hooks:
            hook.after_step(context)
        self.tally.add(cross_entropy, logits, labels)
        self.images += len(labels)

    def after_epoch(self) -> dict[str, Any]:
        """What the hooks add to the epoch's row."""
        extra: dict[str, Any] = {}
        for hook in self.hooks:
            values = hook.after_epoch(self.context) or {}
            if taken := sorted(values.keys() & {*_ROW, *extra}):
                raise ConfigError(
                    f"{type(hook).__name__}.after_epoch returned {', '.join(taken)}, which the row has already; "
                    "choose another name."
                )
            extra |= values
        return extra

    def validate(self) -> dict[str, float]:
        """Loss and accuracy on the validation images, if there are any."""
        if self.split.val is None:
            return {}
        measured = evaluate(
            self.model,
            self.split.val,
            self.split.mean,
            self.split.std,
            device=self.device,
            precision=self.precision,
            channels_last=self.channels_last,
        )
        self.evaluation_seconds += measured.seconds
        return {"val_loss": measured.loss, "val_accuracy": measured.accuracy}

    def raise_if_diverged(self, images: Tensor) -> None:
        """Raise TrainingDiverged if a loss of this epoch or a parameter is not finite."""
        context, step = self.context, self.guard.first_bad_step()
        if step is not None:
            with autocast(self.device, self.precision):
                where = first_non_finite(self.model, images)
        elif parameter := non_finite_parameter(self.model):
            step, where = context.step - 1, f"parameter {parameter!r}, after the step"
        else:
            return
        remedy = f"Lower lr (now {self.recipe.lr:g}), lengthen warmup (now {self.recipe.warmup:g})"
        remedy += ", or set precision to 'float32'." if self.precision == "bfloat16" else "."
        kept = f" The last good checkpoint, {self.file.path}, was kept." if self.file.exists else ""
        raise TrainingDiverged(
            f"training diverged in epoch {context.epoch}, step {step} of {context.steps_per_epoch} (both counted from "
            f"0), at learning rate {context.optimizer.param_groups[0]['lr']:.4g}: the first value that is not finite "
            f"is in {where}. {remedy}{kept}"
        )

    def result(self) -> TrainingResult:
        """The totals of a finished training."""
        return TrainingResult(
            history=self.context.history,
            seconds=self.stopwatch.seconds,
            evaluation_seconds=self.evaluation_seconds,
            images=self.images,
            images_per_second=self.images / self.stopwatch.seconds,
            peak_memory_bytes=self.peak_memory,
            precision=self.precision,
            channels_last=self.channels_last,
            lowered=self.lowered,
        )
