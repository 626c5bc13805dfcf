"""Files that are either the old version or the new one, never half of each."""

import glob
import hashlib
import os
import tempfile
import time
from pathlib import Path

from apbm_core.errors import ApbmError


def write_atomically(path: str | Path, content: bytes | str) -> Path:
    """Write ``content`` to ``path`` so that a crash at any moment leaves the old file or the new one.

    The bytes go to a temporary file beside ``path``, are flushed to disk and renamed over it. The temporary file is
    removed when the write fails, so a full disk leaves nothing behind but the old version.

    Raises:
        ApbmError: the folder cannot be written or the disk is full; the message names the path.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise ApbmError(
                f"cannot write {path}: {error.strerror or error}. Free some space or choose a folder you may write to; "
                "what was there before is unchanged."
            ) from error
        raise
    return path


def remove_stale_temporaries(folder: str | Path, stem: str | None = None, older_than: float = 0.0) -> int:
    """Delete the temporary files that a killed process left in ``folder``; return how many.

    Call it under the lock that writers of these files hold, or, where there is none, give ``older_than``.

    Args:
        folder: need not exist.
        stem: only those of files called so, whatever their ending.
        older_than: only those that were last written so many seconds ago.
    """
    stale, pattern = 0, "*" if stem is None else glob.escape(stem)
    for path in Path(folder).glob(f".{pattern}.*.tmp") if Path(folder).is_dir() else ():
        try:
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()
                stale += 1
        except FileNotFoundError:  # its writer lives, and has just finished
            continue
    return stale


def sha256(data: bytes) -> str:
    """The hexadecimal SHA-256 digest of ``data``."""
    return hashlib.sha256(data).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
