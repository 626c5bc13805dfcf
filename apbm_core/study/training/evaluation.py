"""Accuracy and loss of a network on images that it is not trained on."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from apbm_core.errors import DataError
from apbm_core.forward import evaluation_mode
from apbm_core.study.data.batches import evaluation_batches
from apbm_core.study.data.images import Images
from apbm_core.study.training.device import autocast, memory_format, pick_device
from apbm_core.study.training.meters import Tally
from apbm_core.study.training.precision import resolve_precision


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured."""

    accuracy: float  # share of the images whose largest logit is their label's, in [0, 1]
    loss: float  # mean cross-entropy, without label smoothing, in nats
    seconds: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    device: str | torch.device | None = None,
    batch_size: int = 500,
    precision: str = "auto",
    channels_last: str | bool = "auto",
) -> Evaluation:
    """Run ``model`` in evaluation mode over all ``images``; every module gets its own mode back afterwards.

    Args:
        model: logits of shape (N, classes) from images (N, 3, H, W).
        images: uint8 images and their labels.
        mean: of the training images' channels, in 0..1.
        std: likewise.
        device: where to; the model moves there and stays. By default where its parameters are.
        batch_size: images at a time; it only matters for speed and memory.
        precision: "float32", "bfloat16" or "auto", the device's fastest.
        channels_last: the images' layout in memory, or "auto".

    Raises:
        DataError: there are no images.
    """
    if len(images) == 0:
        raise DataError("there are no images to evaluate on; choose a split that has some.")
    started = time.perf_counter()
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = pick_device(device)
    precision, channels_last = resolve_precision(precision, channels_last, device)
    layout = memory_format(channels_last)
    tally = Tally(device)
    model.to(device)
    with evaluation_mode(model):
        for batch, labels in evaluation_batches(images, mean, std, batch_size, device):
            with autocast(device, precision):
                logits = model(batch.contiguous(memory_format=layout))
            tally.add(F.cross_entropy(logits.float(), labels), logits, labels)
    return Evaluation(tally.accuracy, tally.mean_loss, time.perf_counter() - started)
