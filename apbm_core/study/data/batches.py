"""Batches for training and evaluation: resident uint8 images, augmented and normalised a batch at a time.

The images are padded once and stay on the training device as uint8. A batch is one gather: permutation, random crop and
horizontal flip are all folded into the index of each pixel. Nothing here has state that moves: a batch depends on
(seed, epoch, step) alone, so a run resumed in the middle of an epoch sees the batches that it would have seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apbm_core.errors import ConfigError
from apbm_core.study.data.images import Images, generator_for


@dataclass(frozen=True)
class Augmentation:
    """Pad, crop at random, flip at random: the CIFAR augmentation of He et al. (*Deep Residual Learning*, section 4.2).

    Attributes:
        padding: black pixels added on each side before the crop.
        crop: side of the square crop; ``None`` keeps the size of the image. A smaller one (24 of 32, say) trains on
            smaller images.
        flip: mirror each image left to right with probability 1/2.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    padding: int = 4
    crop: int | None = None
    flip: bool = True

    def __post_init__(self) -> None:
        _require_integer("padding", self.padding, 0)
        if self.crop is not None:
            _require_integer("crop", self.crop, 1)
        if not isinstance(self.flip, bool):
            raise ConfigError(f"flip is {self.flip!r}; it must be True or False.")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what becomes of images of this size.

        Raises:
            ConfigError: the crop is larger than the padded image, or so much is padded that a crop may miss the image.
        """
        padding, crop = self.padding, self.crop
        if crop is not None and crop > min(height, width) + 2 * padding:
            raise ConfigError(
                f"crop is {crop}, larger than the padded image ({width} x {height} and {padding} on each side); "
                f"use at most {min(height, width) + 2 * padding}."
            )
        side = min(height, width) if crop is None else crop
        if padding >= side:
            raise ConfigError(
                f"padding is {padding}, so a random crop of {side} pixels may hold none of the image; use at most "
                f"{side - 1}."
            )
        return crop or height, crop or width


class BatchSource:
    """The training batches of every epoch.

    No image is left out. The last batch of an epoch is smaller when ``batch_size`` does not divide the number of
    images; were it to hold a single image, which batch normalisation cannot use, that image joins the batch before it.

    Args:
        images: the training images.
        mean: three channel means on the scale 0..1.
        std: three channel standard deviations on the scale 0..1.
        batch_size: at least 2.
        device: where the images are kept and the batches are made.
        augmentation: ``None`` shuffles only.
        seed: decides, with the epoch's number, the order of the images, the crops and the flips.

    Attributes:
        num_images: images in the source.
        image_size: (height, width) of the images in a batch.

    Raises:
        ConfigError: a value is impossible for these images; the message says what is allowed.
    """

    def __init__(
        self,
        images: Images,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        device: torch.device | str = "cpu",
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        _require_integer("batch_size", batch_size, 2)
        _require_integer("seed", seed, None)
        self.num_images = len(images)
        if self.num_images < 2:
            raise ConfigError(
                f"{self.num_images} training images are too few: batches of {batch_size} need at least 2."
            )
        augmentation = augmentation or Augmentation(padding=0, flip=False)
        self.image_size = augmentation.output_size(*images.images.shape[1:3])
        self.batch_size = batch_size
        self.seed = seed
        self._flip = augmentation.flip
        self._device = torch.device(device)
        padded = _pad(images.images.to(self._device), augmentation.padding)
        self._padded_size = tuple(padded.shape[1:3])
        self._pixels = padded.reshape(-1, 3)
        self._labels = images.labels.to(self._device)
        self._normalise = _Normaliser(mean, std, self.image_size[1], self._device)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.num_images, self.batch_size)
        return full if rest == 1 and full > 0 else full + (rest > 0)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``epoch`` from ``start_step`` on, bit-identical to those of an uninterrupted epoch.

        Yields:
            x: float32, (B, 3, h, w), normalised, channels_last in memory; y: int64, (B,).

        Raises:
            ConfigError: ``epoch`` is negative or ``start_step`` is not in 0..steps_per_epoch.
        """
        _require_integer("epoch", epoch, 0)
        _require_integer("start_step", start_step, 0)
        if start_step > self.steps_per_epoch:
            raise ConfigError(f"start_step is {start_step}, but an epoch has {self.steps_per_epoch} steps.")
        order, top, left, mirrored = (values.to(self._device) for values in self._draw(epoch))
        return self._batches(order, top, left, mirrored, start_step)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A whole epoch's random numbers, each (N,): order of the images, crop's top and left, mirrored or not."""
        generator = generator_for("batches", self.seed, epoch)
        order = torch.randperm(self.num_images, generator=generator)
        top, left = (
            torch.randint(padded - cropped + 1, (self.num_images,), generator=generator)
            for padded, cropped in zip(self._padded_size, self.image_size, strict=True)
        )
        mirrored = torch.randint(2, (self.num_images,), generator=generator).bool() & self._flip
        return order, top, left, mirrored

    def _batches(
        self, order: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, start_step: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        (padded_height, padded_width), (height, width) = self._padded_size, self.image_size
        first_pixels = (order * padded_height + top) * padded_width + left
        rows = torch.arange(height, device=self._device) * padded_width
        columns = torch.arange(width, device=self._device)
        for step in range(start_step, self.steps_per_epoch):
            last = step == self.steps_per_epoch - 1
            batch = slice(step * self.batch_size, self.num_images if last else (step + 1) * self.batch_size)
            row_starts = first_pixels[batch, None] + rows
            offsets = torch.where(mirrored[batch, None], columns.flip(0), columns)
            pixels = (row_starts[:, :, None] + offsets[:, None, :]).flatten()
            cropped = self._pixels.index_select(0, pixels).view(-1, height, width, 3)
            yield self._normalise(cropped), self._labels[order[batch]]


def evaluation_batches(
    images: Images,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in order, without augmentation; the last batch may be smaller.

    Yields:
        x: float32, (B, 3, H, W), normalised, channels_last in memory; y: int64, (B,).

    Raises:
        ConfigError: ``batch_size`` is below 1, or ``mean`` or ``std`` are not three usable numbers.
    """
    _require_integer("batch_size", batch_size, 1)
    normalise = _Normaliser(mean, std, images.images.shape[2], torch.device(device))
    return (
        (normalise(pixels.to(device)), labels.to(device))
        for pixels, labels in zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True)
    )


class _Normaliser:
    """(x / 255 - mean) / std by one multiplication and one addition; uint8 (B, h, w, 3) to float32 (B, 3, h, w)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], width: int, device: torch.device) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3 or not all(np.isfinite(value) for value in values):
                raise ConfigError(f"{name} is {tuple(values)}; it must be three finite numbers, one for each channel.")
        if min(std) <= 0:
            raise ConfigError(f"std is {tuple(std)}; each must be above 0, for the images are divided by it.")
        mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        # Repeated over a row of pixels: broadcasting over the three channels alone is several times slower on a CPU.
        self._scale = (1 / (255 * std)).float().repeat(width).to(device)
        self._shift = (-mean / std).float().repeat(width).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        normalised = pixels.flatten(2).float().mul_(self._scale).add_(self._shift)
        return normalised.view(pixels.shape).permute(0, 3, 1, 2)


def _pad(images: Tensor, padding: int) -> Tensor:
    """Pad height and width of (N, H, W, 3) images with black on both sides."""
    return torch.nn.functional.pad(images, (0, 0, *4 * (padding,))) if padding else images


def _require_integer(name: str, value: object, minimum: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (minimum is not None and value < minimum):
        allowed = "an integer" if minimum is None else f"an integer of at least {minimum}"
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}.")
