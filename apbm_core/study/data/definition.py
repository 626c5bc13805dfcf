"""What a layout of images on disk is, and what all layouts check."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from apbm_core.errors import DataError
from apbm_core.study.data.images import Images, fingerprint
from apbm_core.study.data.named import NamedDataset

SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False)
class Decoded:
    """A data set as a layout yields it: both splits and the class names in the order of the labels."""

    train: Images
    test: Images
    classes: tuple[str, ...]


class Layout(Protocol):
    """One data set in one layout."""

    description: str  # the layout in words, for ``ImageDataset.source``; without the machine's own path
    location: Path  # where it is
    worth_caching: bool  # whether reading means decoding tens of thousands of images
    classes: tuple[str, ...]  # class names in the order of the labels, known before anything is decoded

    def key(self) -> str:
        """A digest that changes when the files change; cheap beside `read`."""

    def read(self) -> Decoded:
        """Read and check everything. Raises DataError, which names the path, for every fault."""


def require_published(decoded: Decoded, published: NamedDataset, folder: Path) -> Decoded:
    """Refuse a complete set that is not the published one: lossless WebP has no checksum and decodes when damaged."""
    for split, images, count, expected in zip(
        SPLITS, (decoded.train, decoded.test), published.counts, published.fingerprints or (None, None), strict=True
    ):
        if expected is not None and len(images) == count and fingerprint(images) != expected:
            raise DataError(
                f"{folder}: the {split} images have the number but not the content of {published.title}'s. They are "
                "damaged or were altered (recompressed as JPEG, say): fetch them again, or keep altered images as a "
                "folder of images under another name."
            )
    return decoded


def expected_size(published: NamedDataset) -> str:
    return f"{published.title} images are {published.side} x {published.side}"


def digest_of_stats(folder: Path, files: list[Path]) -> str:
    """A digest of the names, sizes and modification times of ``files``."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
