"""A cache of decoded images that is checked before it is believed.

One file for each data set folder: the tensors, the digest of the source files they were decoded from and a SHA-256 over
everything. A file that is stale, half written or damaged is decoded anew and replaced, with a warning. A cache that
cannot be written costs the time of decoding, nothing else.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from apbm_core.errors import ApbmError
from apbm_core.files import write_atomically
from apbm_core.study.data.definition import Decoded, Layout
from apbm_core.study.data.images import Images

FORMAT = "1"  # raise it when the meaning of the cached tensors changes
LOCK_TIMEOUT = 300  # seconds to wait for another process that decodes the same data before decoding them here too


def default_cache_dir() -> Path:
    """``$APBM_CACHE``, else ``$XDG_CACHE_HOME/apbm``, else ``~/.cache/apbm``."""
    if os.environ.get("APBM_CACHE"):
        return Path(os.environ["APBM_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "apbm"


def read_through_cache(layout: Layout, cache_dir: Path) -> Decoded:
    """What ``layout.read()`` returns, from the cache if it holds it, else decoded and then cached.

    Raises:
        DataError: the source is faulty, as `Layout.read` says.
    """
    place = hashlib.sha256(str(layout.location.resolve()).encode()).hexdigest()[:12]
    path = cache_dir / f"{layout.location.name}-{place}.safetensors"
    key = layout.key()
    cached, fault = _read(path, key)
    if cached is not None:
        return cached
    with _lock(path):
        if path.exists():
            cached, fault = _read(path, key)  # another process may have written it while this one waited
            if cached is not None:
                return cached
        if fault:
            warnings.warn(f"{path}: the cache of decoded images {fault}; decoding them anew.", stacklevel=3)
        decoded = layout.read()
        _write(path, key, decoded)
    return decoded


def _read(path: Path, key: str) -> tuple[Decoded | None, str | None]:
    """The cached data set, or ``None`` and why it is of no use (no reason if there is none)."""
    if not path.exists():
        return None, None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("key")) != (FORMAT, key):
                return None, "is stale (the source files or the format have changed)"
            # Cloned, because the tensors are views of the mapped file, which somebody may truncate under us.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata.get("digest") != _digest(tensors, key, metadata.get("classes", "")):
            return None, "is damaged (its SHA-256 differs)"
        train, test = (Images(tensors[f"{split}.images"], tensors[f"{split}.labels"]) for split in ("train", "test"))
        return Decoded(train, test, tuple(json.loads(metadata["classes"]))), None
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, ApbmError) as error:
        return None, f"is damaged ({error})"


def _write(path: Path, key: str, decoded: Decoded) -> None:
    tensors = {
        f"{split}.{field}": tensor.contiguous()
        for split, images in (("train", decoded.train), ("test", decoded.test))
        for field, tensor in (("images", images.images), ("labels", images.labels))
    }
    classes = json.dumps(decoded.classes)
    metadata = {"format": FORMAT, "key": key, "classes": classes, "digest": _digest(tensors, key, classes)}
    try:
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process killed while it wrote
            leftover.unlink(missing_ok=True)
        write_atomically(path, safetensors.torch.save(tensors, metadata))
    except (ApbmError, OSError) as error:
        warnings.warn(
            f"the decoded images cannot be cached and will be decoded again next time: {error} "
            "Set APBM_CACHE to a folder that can be written.",
            stacklevel=4,
        )


def _digest(tensors: dict[str, Tensor], key: str, classes: str) -> str:
    digest = hashlib.sha256(f"{FORMAT}\0{key}\0{classes}".encode())
    for name in sorted(tensors):
        digest.update(f"\0{name}\0{tuple(tensors[name].shape)}\0{tensors[name].dtype}\0".encode())
        digest.update(memoryview(tensors[name].numpy()).cast("B"))
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process decode while others wait. Where no lock can be had, each decodes: wasteful but harmless."""
    lock = FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT)
    with contextlib.suppress(OSError, NotImplementedError, Timeout):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()  # does nothing when it is not held
