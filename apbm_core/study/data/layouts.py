"""The layouts of an image data set on disk, each found by its files and read into memory with every fault named.

`find_layout` takes the first that is there:

1. torchvision's own: ``<root>/cifar-10-batches-py``, ``<root>/cifar-100-python``;
2. Hugging Face's: ``<root>/<name>/{train,test}.parquet``;
3. a folder of images: ``<root>/<name>/{train,test}/<class>/*.png``.

One that is there but damaged is an error, never a reason to try the next.
"""

from pathlib import Path

import numpy as np
import torch

from apbm_core.study.data import cifar
from apbm_core.study.data.definition import SPLITS, Decoded, Layout, digest_of_stats
from apbm_core.study.data.image_folder import ImageFolderLayout
from apbm_core.study.data.images import Images, generator_for, stratified_sample
from apbm_core.study.data.named import NAMED
from apbm_core.study.data.parquet import ParquetLayout, parquet_files


def find_layout(name: str, root: Path) -> Layout | None:
    """The layout in which ``root`` holds ``name``, or ``None`` if it is there in none."""
    if cifar.is_torchvisions(name) and cifar.torchvision_folder(name, root).is_dir():
        return TorchvisionLayout(name, root)
    folder = root / name
    if name in NAMED and any(parquet_files(folder, split) for split in SPLITS):
        return ParquetLayout(folder, NAMED[name])
    if any((folder / split).is_dir() for split in SPLITS):
        return ImageFolderLayout(folder, NAMED.get(name))
    return None


class TorchvisionLayout:
    """CIFAR as torchvision downloads it: pickles with known MD5 sums."""

    worth_caching = False  # nothing is compressed

    def __init__(self, name: str, root: Path) -> None:
        self._name, self._root, self.classes = name, root, NAMED[name].classes
        self.location = cifar.torchvision_folder(name, root)
        self.description = f"{self.location.name} (torchvision's layout, MD5 checked)"

    def key(self) -> str:
        return digest_of_stats(self.location, sorted(self.location.iterdir()))

    def read(self) -> Decoded:
        return Decoded(*cifar.read_torchvision(self._name, self._root), self.classes)


def read_digits() -> Decoded:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 pixels of 17 grey levels, each made a 4 x 4 block of RGB 0..255.

    A stratified fifth is the test set, always the same.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    everything = Images(
        torch.from_numpy(np.repeat(pixels[..., None], 3, axis=-1)), torch.from_numpy(digits.target.astype(np.int64))
    )
    test = stratified_sample(everything.labels, round(len(everything) / 5), generator_for("digits"))
    in_train = torch.ones(len(everything), dtype=torch.bool)
    in_train[test] = False
    return Decoded(everything.select(in_train.nonzero()[:, 0]), everything.select(test), tuple("0123456789"))
