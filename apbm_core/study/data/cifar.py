"""CIFAR in torchvision's layout: found, read and downloaded."""

import contextlib
import http.client
import os
import shutil
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from apbm_core.errors import DataError
from apbm_core.study.data.images import Images
from apbm_core.study.data.named import NAMED

STALLED_AFTER = 30  # seconds without a byte before a download is given up; torchvision's own would wait for ever


def is_torchvisions(name: str) -> bool:
    """Whether torchvision has the data set ``name``."""
    return name in NAMED and NAMED[name].torchvision_class is not None


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

    return getattr(torchvision.datasets, NAMED[name].torchvision_class)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
