"""What the training loop measures while it runs: its time, its loss and its accuracy."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from apbm_core.study.training.device import synchronize


class Stopwatch:
    """Seconds of wall time while it runs; the device finishes its work before the watch stops."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self._device = device
        self._stopped_at = seconds
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """All seconds so far."""
        if self._started is None:
            return self._stopped_at
        return self._stopped_at + time.perf_counter() - self._started

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        synchronize(self._device)
        self._stopped_at, self._started = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Whatever happens inside does not count."""
        self.stop()
        yield
        self.start()


class Tally:
    """An epoch's loss and accuracy so far, added up on the device so that no step waits for a number."""

    def __init__(self, device: torch.device):
        self._loss = torch.zeros((), device=device, dtype=sum_dtype(device))
        self._correct = torch.zeros((), device=device, dtype=torch.int64)
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss (a scalar), logits (N, classes) and labels (N,)."""
        self._loss += loss.detach().to(self._loss.dtype) * len(labels)
        self._correct += (logits.detach().argmax(1) == labels).sum()
        self.images += len(labels)

    @property
    def mean_loss(self) -> float:
        return self._loss.item() / self.images

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self._correct.item() / self.images

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self._loss, "correct": self._correct, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loss.copy_(state["loss"])
        self._correct.copy_(state["correct"])
        self.images = state["images"]


def sum_dtype(device: torch.device) -> torch.dtype:
    """In what to add up many losses: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64
