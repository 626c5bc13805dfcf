"""Stopping where a run can go on: when its time is up, or when the process is asked to end."""

import math
import time
from dataclasses import dataclass
from types import FrameType

from apbm_core.errors import ApbmError

GO_ON = 75
"""The exit code of a command that was stopped and can go on: EX_TEMPFAIL of sysexits.h."""

_asked = False


class Stopped(ApbmError):
    """A run was stopped on purpose. What it had done is kept, and the same command goes on from there."""


@dataclass(frozen=True)
class StopAt:
    """Calling it says whether to stop: the moment has come, or the process was asked to end.

    Args:
        moment: in seconds since the epoch, as ``time.time()`` tells them, so that it means the same to every process
            and every machine of a cluster.
    """

    moment: float = math.inf

    def __call__(self) -> bool:
        return _asked or time.time() >= self.moment


def ask(signum: int | None = None, frame: FrameType | None = None) -> None:
    """Ask this process to stop where it can go on; fit to be the handler of SIGTERM, a scheduler's notice."""
    global _asked
    _asked = True


def is_asked() -> bool:
    """Whether :func:`ask` was called."""
    return _asked


def forget() -> None:
    """Undo :func:`ask`."""
    global _asked
    _asked = False
