"""CIFAR-10 and CIFAR-100 as published: what a complete copy holds, and torchvision's layout and download of it.

Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
"""

import contextlib
import http.client
import os
import shutil
import socket
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from apbm_core.errors import DataError
from apbm_core.study.data.images import Images

SIZE = (32, 32)
STALLED_AFTER = 30  # seconds without a byte before a download is given up; torchvision's own would wait for ever


@dataclass(frozen=True)
class Published:
    """What is known of a published data set.

    Attributes:
        title: its name in a sentence.
        classes: class names in the order of the labels.
        label_column: the labels' column in the Hugging Face layout.
        counts: training and test images in the complete set.
        torchvision_class: its class in ``torchvision.datasets``.
        fingerprints: ``images.fingerprint`` of the complete training and test set, where known.
    """

    title: str
    classes: tuple[str, ...]
    label_column: str
    counts: tuple[int, int]
    torchvision_class: str
    fingerprints: tuple[str, str] | None = None


_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

PUBLISHED = {
    "cifar10": Published(
        title="CIFAR-10",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        label_column="label",
        counts=(50_000, 10_000),
        torchvision_class="CIFAR10",
        # Of the copy whose training mean is 0.49139968, 0.48215841, 0.44653091 and standard deviation 0.24703223,
        # 0.24348513, 0.26158784: to all digits the values in common use for the original.
        fingerprints=(
            "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
            "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
        ),
    ),
    "cifar100": Published(
        title="CIFAR-100",
        classes=tuple(_CIFAR100_CLASSES.split()),
        label_column="fine_label",
        counts=(50_000, 10_000),
        torchvision_class="CIFAR100",
    ),
}


def torchvision_folder(name: str, root: Path) -> Path:
    """The folder below ``root`` where torchvision keeps the data set ``name``."""
    return root / _torchvision_class(name).base_folder


def read_torchvision(name: str, root: Path) -> tuple[Images, Images]:
    """Read torchvision's copy below ``root``. Its files are pickles: torchvision unpickles them after their MD5 fits.

    Raises:
        DataError: a file is missing or its MD5 differs; the message names it.
    """
    from torchvision.datasets.utils import check_integrity

    dataset_class, folder = _torchvision_class(name), torchvision_folder(name, root)
    meta = (dataset_class.meta["filename"], dataset_class.meta["md5"])
    for file, md5 in [*map(tuple, dataset_class.train_list), *map(tuple, dataset_class.test_list), meta]:
        if not check_integrity(folder / file, md5):
            state = "is not the published file (its MD5 differs)" if (folder / file).exists() else "is missing"
            raise DataError(
                f"{folder / file} {state}. Delete the folder {folder} and fetch the data again: "
                f"with download=True that happens by itself."
            )
    splits = []
    for train in (True, False):
        dataset = dataset_class(root, train=train, download=False)
        labels = torch.tensor(dataset.targets, dtype=torch.int64)
        splits.append(Images(torch.from_numpy(np.ascontiguousarray(dataset.data)), labels))
    return splits[0], splits[1]


def download(name: str, root: Path) -> None:
    """Let torchvision download ``name`` into ``root``.

    The download is made in a hidden folder and moved into place when it is complete and its checksum fits, under a
    lock, so that an interrupted one or a second process leaves no half of a data set behind.

    Raises:
        DataError: the network or the disk failed. Nothing is left behind; the next try starts afresh.
    """
    dataset_class, folder = _torchvision_class(name), torchvision_folder(name, root)
    staging = root / f".{name}.download"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if folder.is_dir():  # another process has finished it while this one waited for the lock
                return
            try:
                with _socket_timeout(STALLED_AFTER):
                    dataset_class(staging, train=True, download=True)
                os.replace(staging / folder.name, folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        raise DataError(f"the download of {dataset_class.url} failed ({error})") from error


def _torchvision_class(name: str) -> type:
    import torchvision.datasets  # slow to import, and only this layout needs it

    return getattr(torchvision.datasets, PUBLISHED[name].torchvision_class)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
