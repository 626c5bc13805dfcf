"""Labelled images in memory: decoding, channel statistics, a content fingerprint and stratified sampling.

Images are kept as uint8 in the order (N, H, W, 3), a quarter of the size of float32 and the layout that decoders
write and `channels_last` networks read.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apbm_core.errors import ConfigError, DataError

# Naming them spares Pillow the probing of its forty other decoders.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
DECODE_CHUNK = 250  # images a thread decodes at a time: long enough to hide the pool, short enough to stop on an error


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels.

    Attributes:
        images: uint8, (N, H, W, 3), RGB.
        labels: int64, (N,), class indices from 0.

    Raises:
        DataError: a tensor has another type or shape, or the two disagree about N.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise DataError(
                f"images must be a uint8 tensor of shape (N, H, W, 3), not {self.images.dtype} of shape "
                f"{tuple(self.images.shape)}; convert or permute it first."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be an int64 tensor of shape ({len(self.images)},), one for each image, not "
                f"{self.labels.dtype} of shape {tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Tensor | Sequence[int]) -> "Images":
        """The images at ``indices``, in that order (copied)."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        return Images(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> "Images":
        """The same images on ``device``; nothing is copied when they are there already."""
        return Images(self.images.to(device), self.labels.to(device))


def decode_images(
    encoded: Sequence[bytes | Path], size: tuple[int, int] | None, describe: Callable[[int], str], expected: str
) -> Tensor:
    """Decode images of one size to RGB, in threads.

    Args:
        encoded: the encoded bytes, or the files that hold them; not empty.
        size: (height, width) that every image must have; ``None`` takes the first image's.
        describe: names image ``i`` in an error, for instance "train.parquet: image 3".
        expected: ends the sentence "... is 31 x 31, but ..." when an image has another size.

    Returns:
        uint8, (N, H, W, 3).

    Raises:
        DataError: an image cannot be decoded or has another size; the message names it.
    """
    if size is None:
        size = _decode(encoded[0], None, lambda: describe(0), expected).shape[:2]
    decoded = np.empty((len(encoded), *size, 3), dtype=np.uint8)

    def decode_chunk(start: int) -> None:
        for index in range(start, min(start + DECODE_CHUNK, len(encoded))):
            decoded[index] = _decode(encoded[index], size, lambda i=index: describe(i), expected)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(decode_chunk, range(0, len(encoded), DECODE_CHUNK)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(decoded)


def _decode(encoded: bytes | Path, size: tuple[int, int] | None, name: Callable[[], str], expected: str) -> np.ndarray:
    """One image as (H, W, 3) uint8. The size is compared before decoding, so an absurd header costs no memory."""
    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if size is None or (height, width) == size:
                return _as_rgb(image)
    except Exception as error:  # damaged bytes make Pillow raise almost anything; all of it means "not decodable"
        reason = f"not a {', '.join(IMAGE_FORMATS)} image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(
            f"{name()} cannot be decoded ({reason}). The file is damaged: fetch it again or remove the image."
        ) from error
    raise DataError(f"{name()} is {width} x {height} pixels, but {expected}. Resize or remove it.")


def _as_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8. Sixteen bits of grey become eight, as the same picture saved in eight would have them."""
    if image.mode.startswith("I;16") or image.mode == "I":  # which Pillow would cut off at 255
        levels = np.asarray(image).astype(np.int64)
        grey = ((levels * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def channel_statistics(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and (population) standard deviation of each channel over all pixels of all images, on the scale 0..1.

    Both are computed from an exact integer histogram, so they do not depend on the order of the images or on the
    summation. A channel of one constant value gets a deviation of one grey level, 1/255, so that it can be divided by.

    Args:
        images: uint8, (N, H, W, 3), N >= 1.
    """
    levels = np.arange(256, dtype=np.float64) / 255
    means, deviations = [], []
    for channel in range(3):
        histogram = torch.bincount(images[..., channel].flatten(), minlength=256).cpu().numpy()
        mean = float(histogram @ levels / histogram.sum())
        variance = float(histogram @ (levels - mean) ** 2 / histogram.sum())
        means.append(mean)
        deviations.append(max(math.sqrt(variance), 1 / 255))
    return tuple(means), tuple(deviations)


def fingerprint(images: Images) -> str:
    """A SHA-256 digest of the set of (label, pixels) pairs, the same in whatever order the images come.

    Labels must be below 256.
    """
    pairs = zip(images.images.cpu().numpy(), images.labels.tolist(), strict=True)
    digests = sorted(hashlib.sha256(bytes([label]) + image.tobytes()).digest() for image, label in pairs)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def generator_for(*parts: object) -> torch.Generator:
    """A CPU random generator whose stream depends on all of ``parts`` and on nothing else.

    The seed is a digest of the parts, so (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated. It is a CPU generator
    whatever the training device, because the streams of CPU and GPU generators differ.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def stratified_sample(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Choose ``count`` images at random with the class proportions of the whole.

    The images are permuted once and the first of each class are taken; how many is the class's share of ``count``,
    rounded by the method of largest remainders (ties to the lower class index).

    Args:
        labels: int64, (N,).
        count: between 0 and N.

    Returns:
        ascending indices, int64, (count,).

    Raises:
        ConfigError: ``count`` is not between 0 and N.
    """
    if not 0 <= count <= len(labels):
        raise ConfigError(f"cannot choose {count} of {len(labels)} images; choose between 0 and {len(labels)}.")
    sizes = torch.bincount(labels).tolist()
    quotas = [count * size // max(len(labels), 1) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda label: -(count * sizes[label] % max(len(labels), 1)))
    for label in by_remainder[: count - sum(quotas)]:
        quotas[label] += 1
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    chosen = [order[shuffled == label][:quota] for label, quota in enumerate(quotas)]
    return torch.cat(chosen).sort().values if chosen else order[:0]
