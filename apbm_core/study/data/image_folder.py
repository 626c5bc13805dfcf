"""Folders of images, one folder a class, as people make them themselves."""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from apbm_core.errors import DataError
from apbm_core.study.data.definition import SPLITS, Decoded, digest_of_stats, expected_size, require_published
from apbm_core.study.data.images import Images, decode_images
from apbm_core.study.data.named import NamedDataset

SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".ppm",
    ".pgm",
)  # as torchvision, and GIF


class ImageFolderLayout:
    """``{train,test}/<class>/*.png``: RGB images of one size; the classes are the folders' names in order.

    Numbers in names count as numbers: class 10 comes after class 9. Without ``test``, ``val`` is taken for it. Hidden
    files are left out.
    """

    worth_caching = True

    def __init__(self, folder: Path, published: NamedDataset | None) -> None:
        self.location, self._published = folder, published

    def key(self) -> str:
        files = [file for split in SPLITS for _, file in self._files[split]]
        return digest_of_stats(self.location, files)

    def read(self) -> Decoded:
        size = self._published.size if self._published else None
        splits = []
        for split in SPLITS:
            labels, files = zip(*self._files[split], strict=True)
            expected = expected_size(self._published) if self._published else "all images must be of one size"
            pixels = decode_images(files, size, lambda index, files=files: str(files[index]), expected)
            size = tuple(pixels.shape[1:3])
            splits.append(Images(pixels, torch.tensor(labels, dtype=torch.int64)))
        decoded = Decoded(*splits, self.classes)
        return require_published(decoded, self._published, self.location) if self._published else decoded

    @cached_property
    def classes(self) -> tuple[str, ...]:
        names = {}
        for split in SPLITS:
            folder = self._folder(split)
            if not folder.is_dir():
                raise DataError(f"{folder} is missing: both {' and '.join(SPLITS)} are needed, with the same classes.")
            names[split] = {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."}
            if not names[split]:
                raise DataError(f"{folder} has no class folders; put the images into one folder for each class.")
        if names["train"] != names["test"]:
            only = "; ".join(
                f"only in {split}: {', '.join(sorted(names[split] - names[other]))}"
                for split, other in (SPLITS, SPLITS[::-1])
                if names[split] - names[other]
            )
            raise DataError(f"{self.location}: train and test must have the same class folders ({only}).")
        if self._published and len(names["train"]) != len(self._published.classes):
            raise DataError(
                f"{self.location} has {len(names['train'])} class folders, but {self._published.title} has "
                f"{len(self._published.classes)} classes. Complete it, or give a data set of your own another name."
            )
        return tuple(sorted(names["train"], key=natural_order))

    @property
    def description(self) -> str:
        """The layout in words: also what was taken for the test set, left out, or put into an order of its own."""
        test = self._folder("test").name
        said = f"{self.location.name}/{{train,{test}}}/<class>/ (folders of images"
        if hidden := self._hidden():
            said += f"; {hidden} hidden {'files' if hidden > 1 else 'file'} left out"
        if all(name.isdecimal() for name in self.classes):
            said += "; classes in the order of their numbers"
        return said + ")"

    def _folder(self, split: str) -> Path:
        folder = self.location / split
        val = self.location / "val"
        return val if split == "test" and not folder.is_dir() and val.is_dir() else folder

    def _hidden(self) -> int:
        """How many hidden files lie among the images."""
        folders = [self._folder(split) / name for split in SPLITS for name in self.classes]
        return sum(1 for folder in folders for file in folder.iterdir() if file.name[0] == "." and file.is_file())

    @cached_property
    def _files(self) -> dict[str, list[tuple[int, Path]]]:
        """(label, file) of every image, by class and name."""
        return {split: list(self._files_of(split)) for split in SPLITS}

    def _files_of(self, split: str) -> Iterator[tuple[int, Path]]:
        for label, name in enumerate(self.classes):
            folder = self._folder(split) / name
            visible = (file for file in folder.iterdir() if file.name[0] != ".")  # not macOS's ._ files
            files = sorted(file for file in visible if file.suffix.lower() in SUFFIXES)
            if not files:
                raise DataError(f"{folder} holds no image ({', '.join(SUFFIXES)}); add some or remove the class.")
            yield from ((label, file) for file in files)


def natural_order(name: str) -> tuple:
    """A sort key by which numbers in names count as numbers: 2 before 10."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
