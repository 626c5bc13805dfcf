"""What a run found out between its trainings, on disk, so that an interrupted run need not find it out again."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apbm_core.errors import CheckpointError
from apbm_core.files import sha256, write_atomically
from apbm_core.study.records import canonical_json


def remembered(path: Path, function: Callable[[], Any]) -> tuple[Any, float]:
    """The JSON value of ``function()`` and the seconds it took: read from ``path``, or computed and written there.

    Raises:
        CheckpointError: the file is damaged.
        ApbmError: it cannot be written.
    """
    if path.exists():
        try:
            content = json.loads(path.read_text())
            checksum, value, seconds = content.pop("checksum"), content["value"], content["seconds"]
            if checksum != sha256(canonical_json(content).encode()):
                raise ValueError("its checksum does not match")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it, and it is computed again.") from None
        return value, seconds
    start = time.perf_counter()
    value = function()
    seconds = time.perf_counter() - start
    content = json.loads(json.dumps({"value": value, "seconds": seconds}))  # as it will be read again
    write_atomically(path, json.dumps(content | {"checksum": sha256(canonical_json(content).encode())}))
    return content["value"], seconds
