"""Training states and networks on disk: what is damaged, untrusted or another run's is refused, never half read.

A checkpoint is one line, ``APBM-CHECKPOINT <version> <sha256> <identity as JSON>``, and then what torch.save wrote. The
digest covers the identity and the payload and is compared before anything is unpickled; unpickling itself admits
tensors and plain values only, because a digest says that a file is whole, not that it can be trusted.

A network is a safetensors file, which cannot hold code at all, with its metadata and a digest in the header.
"""

import hashlib
import io
import json
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from apbm_core.errors import CheckpointError
from apbm_core.files import sha256, write_atomically

FORMAT_VERSION = 1
_MAGIC = b"APBM-CHECKPOINT"
_PLAIN = (type(None), bool, int, float, str, bytes)
_START_AGAIN = "Delete it to start this phase again."


def save_checkpoint(path: str | Path, identity: str, payload: Mapping[str, Any]) -> Path:
    """Write ``payload`` to ``path`` as the state of the training that ``identity`` names.

    Args:
        path: the file, replaced atomically.
        identity: the configuration and phase; :func:`load_checkpoint` must be given the same.
        payload: tensors, numbers, strings, None, and dicts, lists and tuples of them.

    Raises:
        CheckpointError: the payload holds something else, which loading would refuse; the message says where.
        ApbmError: the file cannot be written.
    """
    _check_storable(payload, "payload")
    buffer = io.BytesIO()
    torch.save(dict(payload), buffer)
    content = json.dumps(identity).encode() + b"\n" + buffer.getvalue()
    return write_atomically(path, b"%s %d %s %s" % (_MAGIC, FORMAT_VERSION, sha256(content).encode(), content))


def load_checkpoint(path: str | Path, identity: str) -> dict[str, Any]:
    """The payload that :func:`save_checkpoint` wrote, its tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, it was written by another version or for another
            ``identity``, or it holds anything but tensors and plain values.
    """
    path = Path(path)
    magic, version, digest, content = _read(path)
    if magic != _MAGIC:
        raise CheckpointError(
            f"{path} is not a checkpoint of this package, or its beginning is damaged. {_START_AGAIN}"
        )
    if version != str(FORMAT_VERSION).encode():
        raise CheckpointError(
            f"{path} has checkpoint format {version.decode(errors='replace')}; this version of apbm_core reads "
            f"{FORMAT_VERSION}. Use the version that wrote it. {_START_AGAIN}"
        )
    if sha256(content).encode() != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256 digest. {_START_AGAIN}")
    header, _, body = content.partition(b"\n")
    found = json.loads(header)
    if found != identity:
        raise CheckpointError(
            f"{path} belongs to another training.\n  it holds:  {found}\n  wanted:    {identity}\n"
            f"Choose another path for this training. {_START_AGAIN}"
        )
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path} holds something other than tensors and plain values, so it was not loaded: loading it could run "
            f"code. It was not written by this package as it stands. {_START_AGAIN}"
        ) from error


class CheckpointFile:
    """Where one training keeps its state, and when it is time to save it; without a path it does nothing.

    Args:
        path: the file, or None.
        identity: see :func:`save_checkpoint`.
        seconds: how long after the last save another one is due.
        steps: another one is due after each multiple of so many steps of an epoch, too; None: only after seconds.
    """

    def __init__(self, path: str | Path | None, identity: str, seconds: float, steps: int | None = None):
        self.path = None if path is None else Path(path)
        self.identity, self.seconds, self.steps = identity, seconds, steps
        self._last_save = time.perf_counter()

    @property
    def exists(self) -> bool:
        return self.path is not None and self.path.exists()

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None if there is none yet. Errors as :func:`load_checkpoint`."""
        return load_checkpoint(self.path, self.identity) if self.exists else None

    def is_due(self, step: int) -> bool:
        """Whether to save now that ``step`` steps of an epoch are done."""
        if self.path is None:
            return False
        return bool(self.steps and step % self.steps == 0) or time.perf_counter() - self._last_save >= self.seconds

    def save(self, payload: Mapping[str, Any]) -> None:
        """Replace the saved state. Errors as :func:`save_checkpoint`."""
        if self.path is not None:
            save_checkpoint(self.path, self.identity, payload)
            self._last_save = time.perf_counter()


def save_network(path: str | Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write a network's tensors and JSON ``metadata`` as a safetensors file that any reader of the format opens.

    Tensors are stored contiguous, in NCHW order, and tied ones once for each name.

    Raises:
        CheckpointError: an entry is not a tensor (a fused network's extra state: compact the network first).
        ApbmError: the file cannot be written.
    """
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"entry {name!r} is a {type(tensor).__name__}, not a tensor, so {path} was not written; "
                "compact the network first, or use save_checkpoint."
            )
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()
    }
    text = json.dumps(dict(metadata), sort_keys=True)
    # One entry only: safetensors writes several in any order, and equal networks should be equal files.
    header = {"apbm": json.dumps({"metadata": text, "sha256": _network_digest(tensors, text)})}
    return write_atomically(path, safetensors.torch.save(tensors, header))


def read_network(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The (state_dict, metadata) that :func:`save_network` wrote.

    Raises:
        CheckpointError: there is no such file, it is damaged, or another program wrote it.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no network file {path}; check the path.") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); restore it or make it again."
        ) from error
    try:
        content = json.loads(header["apbm"])
        text, digest = content["metadata"], content["sha256"]
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(f"{path} carries no metadata of this package; write it with save_network.") from None
    if _network_digest(tensors, text) != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256 digest; make it again.")
    return tensors, json.loads(text)


def load_network(path: str | Path, build: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """The network in ``path``: ``build(metadata)`` makes the module, the file's tensors fill it.

    Raises:
        CheckpointError: the file cannot be read (see :func:`read_network`) or does not fit the module.
    """
    state_dict, metadata = read_network(path)
    model = build(metadata)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network it was to fill: {error}") from error
    return model


def _read(path: Path) -> tuple[bytes, bytes, bytes, bytes]:
    """The file's magic word, version, digest and the rest; empty where the file ends early."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}; check the path, or start without one.") from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error.strerror or error}. {_START_AGAIN}"
        ) from error
    magic, version, digest, content = (data.split(b" ", 3) + [b""] * 4)[:4]
    return magic, version, digest, content


def _network_digest(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """SHA-256 over the metadata and every tensor's name, type, shape and bytes, in the names' order."""
    digest = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_storable(value: Any, where: str) -> None:
    """Refuse now what torch.load(weights_only=True) would refuse when the training resumes."""
    if type(value) in (dict, OrderedDict) or (where == "payload" and isinstance(value, Mapping)):
        for key, item in value.items():
            _check_storable(key, f"a key of {where}")
            _check_storable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_storable(item, f"{where}[{i}]")
    elif type(value) not in _PLAIN and not isinstance(value, Tensor):
        raise CheckpointError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; keep "
            "tensors, numbers, strings, None, and dicts, lists and tuples of them (call .item() on NumPy scalars)."
        )
