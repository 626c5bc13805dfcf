"""Image data sets: finding them, reading them into memory, and splitting them without touching the test set.

    dataset = load_dataset("cifar10")
    split = dataset.split("tuning", seed=0)      # 45,000 to train on, 5,000 to choose by, 10,000 to report once

A data set is a few hundred megabytes at most and stays in memory as uint8; `augment` makes the batches.
"""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from apbm_core.errors import ConfigError, DataError
from apbm_core.study.data import cifar
from apbm_core.study.data.cache import default_cache_dir, read_through_cache
from apbm_core.study.data.definition import Decoded, Layout
from apbm_core.study.data.images import Images, channel_statistics, generator_for, stratified_sample
from apbm_core.study.data.layouts import find_layout, read_digits
from apbm_core.study.data.named import NAMED, NamedDataset, known_side

__all__ = ["DataSplit", "ImageDataset", "Images", "SplitKind", "class_count", "known_side", "load_dataset"]

SplitKind = Literal["final", "tuning"]

_STATISTICS_TOLERANCE = 1e-5  # the known ones are stated to five decimals

_PURPOSES = {
    "train_subset": "subset",
    "test_subset": "subset_test",
}  # what seeds the choice; a change is another choice


@dataclass(frozen=True, eq=False)
class DataSplit:
    """What one run trains on, chooses by and reports.

    Attributes:
        train: training images.
        val: held-out training images for every choice that a run makes; ``None`` in a final run, which makes none.
        judge: the images that a tuning run is judged by at its end: ``val``, and all training images that a
            ``train_subset`` left out, for more of them tell smaller differences apart; ``None`` in a final run.
        test: test images, for the one evaluation at the end.
        mean: channel means of the data set's training images on the scale 0..1.
        std: channel standard deviations of the same.
        num_classes: number of classes.
    """

    train: Images
    val: Images | None
    test: Images
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int
    judge: Images | None = None


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set in memory.

    Attributes:
        name: the name it was loaded by.
        train_images: uint8, (N, H, W, 3).
        train_labels: int64, (N,).
        test_images: uint8, (M, H, W, 3).
        test_labels: int64, (M,).
        classes: class names in the order of the labels.
        mean: channel means over all pixels of all training images, on the scale 0..1.
        std: channel (population) standard deviations of the same.
        source: where the data came from and what they lack, as a sentence for the record.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def split(
        self, kind: SplitKind, seed: int = 0, train_subset: int | None = None, test_subset: int | None = None
    ) -> DataSplit:
        """Split the data for one run.

        Every choice is stratified by class and has a random generator of its own, derived from ``seed`` and its
        purpose: neither training nor the other choices can shift it. Indices stay in ascending order. The
        normalisation constants are those of the whole training set, whatever part of it is used.

        Args:
            kind: "final" trains on all training images; "tuning" holds 10 % of them out as ``val``.
            seed: which images are held out, and which make up a subset.
            train_subset: use only this many training images, before any is held out. For quick trials.
            test_subset: use only this many test images. For quick trials.

        Raises:
            ConfigError: ``kind`` is unknown, or a subset is larger than its set or too small to have every class.
        """
        if kind not in get_args(SplitKind):
            raise ConfigError(f"the split kind is {kind!r}; it must be one of {', '.join(get_args(SplitKind))}.")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError(f"the split's seed is {seed!r}; it must be an integer.")
        everything = Images(self.train_images, self.train_labels)
        chosen = self._subset("train_subset", everything, train_subset, seed)
        train = everything if chosen is None else everything.select(chosen)
        test = Images(self.test_images, self.test_labels)
        if (few := self._subset("test_subset", test, test_subset, seed)) is not None:
            test = test.select(few)
        val = judge = None
        if kind == "tuning":
            train, val = self._hold_out(train, seed)
            judge = val if chosen is None else _joined(val, everything.select(_complement(chosen, len(everything))))
        return DataSplit(train, val, test, self.mean, self.std, self.num_classes, judge)

    def _subset(self, parameter: str, images: Images, count: int | None, seed: int) -> Tensor | None:
        """Indices of ``count`` of the images, ascending; None for all of them."""
        if count is None:
            return None
        if not isinstance(count, int) or isinstance(count, bool) or not self.num_classes <= count <= len(images):
            raise ConfigError(
                f"{parameter} is {count!r}; it must be a number of images from {self.num_classes} (one for each "
                f"class) to {len(images)} (all that {self.name} has), or None."
            )
        return stratified_sample(images.labels, count, generator_for(_PURPOSES[parameter], seed))

    def _hold_out(self, images: Images, seed: int) -> tuple[Images, Images]:
        held_out = stratified_sample(images.labels, (len(images) + 5) // 10, generator_for("hold out", seed))
        train, val = images.select(_complement(held_out, len(images))), images.select(held_out)
        if len(val) == 0 or len(train.labels.unique()) < len(images.labels.unique()):
            raise ConfigError(
                f"{len(images)} training images of {self.num_classes} classes are too few to hold 10 % out and keep "
                f"every class; use at least {10 * self.num_classes}, or the split kind 'final'."
            )
        return train, val


def _complement(indices: Tensor, count: int) -> Tensor:
    """The indices below ``count`` that are not among ``indices``, ascending."""
    remains = torch.ones(count, dtype=torch.bool)
    remains[indices] = False
    return remains.nonzero()[:, 0]


def _joined(first: Images, second: Images) -> Images:
    return Images(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))


def class_count(name: str, root: str | Path | None = None) -> int | None:
    """How many classes a data set has, told without decoding an image; None for a folder of images that is not there.

    Args:
        name, root: as in :func:`load_dataset`.
    """
    if name in NAMED:
        return len(NAMED[name].classes)
    try:
        layout = find_layout(name, _root(root)) if _is_name(name) else None
        return None if layout is None else len(layout.classes)
    except (OSError, DataError):  # whoever loads it is told what is wrong
        return None


def load_dataset(
    name: str, root: str | Path | None = None, cache_dir: str | Path | None = None, download: bool = True
) -> ImageDataset:
    """Load a data set by name.

    Args:
        name: "cifar10", "cifar100", "digits" (needs no files) or a folder of images below ``root``.
        root: where the data are, in one of the layouts of `layouts`. ``None`` means ``$APBM_DATA``, else ``./data``.
        cache_dir: where decoded images are kept, see `data_cache`. ``None`` means ``$APBM_CACHE``, else the user's
            cache folder.
        download: let torchvision fetch CIFAR into ``root`` if it is not there.

    Raises:
        DataError: the data are missing, damaged or inconsistent; the message names the file and what to do.
        ConfigError: ``name`` is not a plain name.
    """
    if not _is_name(name):
        raise ConfigError(f"the data set's name is {name!r}; it must be the name of a folder, without a path.")
    if name in NAMED and NAMED[name].is_embedded:
        return _dataset(name, read_digits(), "scikit-learn's handwritten digits, 8 x 8 enlarged to 32 x 32")
    root = _root(root)
    try:
        layout = find_layout(name, root) or _downloaded(name, root, download)
        if layout.worth_caching:
            decoded = read_through_cache(layout, Path(cache_dir).expanduser() if cache_dir else default_cache_dir())
        else:
            decoded = layout.read()
    except OSError as error:  # a permission, a dangling link, a failing disk
        raise DataError(
            f"{error.filename or root} cannot be read ({error.strerror or error}). Check that it exists and that you "
            "may read it."
        ) from error
    return _dataset(name, decoded, layout.description)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) is not None


def _root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("APBM_DATA") or "data").expanduser()


def _downloaded(name: str, root: Path, download: bool) -> Layout:
    reason = "there is nothing in a layout that is understood"
    has_download = cifar.is_torchvisions(name)
    if has_download and download:
        try:
            cifar.download(name, root)
            layout = find_layout(name, root)
            if layout is not None:
                return layout
        except DataError as error:
            reason = f"there is none, and {error}"
    elif has_download:
        reason += ", and download=False"
    layouts = [f"{name}/{{train,test}}/<class>/*.png"]
    if name in NAMED:
        layouts = [f"{name}/{{train,test}}.parquet", *layouts]
    if has_download:
        layouts = [f"{cifar.torchvision_folder(name, root).name}/", *layouts]
    embedded = [known for known, row in NAMED.items() if row.is_embedded]
    raise DataError(
        f"the data set {name!r} was looked for in {root.resolve()}: {reason}. Put it there as {' or '.join(layouts)}, "
        f"or name the folder that holds it with APBM_DATA or root=. Known by name are "
        f"{', '.join(NAMED)}; {' and '.join(embedded)} needs no files and no network."
    )


def _dataset(name: str, decoded: Decoded, description: str) -> ImageDataset:
    counts = (len(decoded.train), len(decoded.test))
    source = f"{counts[0]:,} training and {counts[1]:,} test images from {description}."
    mean, std = channel_statistics(decoded.train.images)
    if name in NAMED and counts == NAMED[name].counts:
        _require_statistics(NAMED[name], mean, std, description)
    elif name in NAMED:
        title, complete = NAMED[name].title, NAMED[name].counts
        lack = f"this is not the complete {title}, which has {complete[0]:,} and {complete[1]:,} images."
        warnings.warn(f"{source} But {lack}", stacklevel=3)
        source += f" Warning: {lack}"
    return ImageDataset(
        name=name,
        train_images=decoded.train.images,
        train_labels=decoded.train.labels,
        test_images=decoded.test.images,
        test_labels=decoded.test.labels,
        classes=decoded.classes,
        mean=mean,
        std=std,
        source=source,
    )


def _require_statistics(known: NamedDataset, mean: Sequence[float], std: Sequence[float], description: str) -> None:
    """Refuse a set of the complete one's size with other pixels: they would be normalised otherwise than in any paper.

    Raises:
        DataError: a channel's mean or standard deviation is not the known one, to the digits that are known.
    """
    for what, found, expected in (("mean", mean, known.mean), ("standard deviation", std, known.std)):
        if any(abs(a - b) > _STATISTICS_TOLERANCE for a, b in zip(found, expected, strict=True)):
            is_here, should_be = (", ".join(f"{value:.5f}" for value in values) for values in (found, expected))
            raise DataError(
                f"the training images of {description} have the {what} {is_here}; {known.title}'s have {should_be}. "
                "They were altered: fetch them again, or keep them as a folder of images under another name."
            )
