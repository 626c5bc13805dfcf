"""Progress bars that suit where they are read: a terminal, a notebook, or a log file."""

import sys
from typing import Any

from tqdm.auto import tqdm

LOG_SECONDS = 30.0
"""A bar in a file is a line at every change, so there it changes no more often than this."""


def bar(**options: Any) -> tqdm:
    """A bar of tqdm's, whose ``options`` these are; in a log file it writes a line in :data:`LOG_SECONDS`."""
    if not (sys.stderr.isatty() or _is_notebook()):
        options = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS} | options
    return tqdm(**{"miniters": 0, "leave": False} | options)


def _is_notebook() -> bool:
    """Whether a kernel shows what this process does; IPython is not imported for the question."""
    shell = sys.modules.get("IPython")
    return shell is not None and shell.get_ipython() is not None


class EpochsBar:
    """The epochs of several runs in one bar: how many are done, the time left, and how the latest run stands.

    Epochs that were trained at another time, or by another process, are counted and do not make the rest seem faster.

    Args:
        epochs: of all runs together.
    """

    def __init__(self, epochs: float):
        self._bar = bar(total=epochs, unit="epoch", smoothing=0, bar_format=_FORMAT)
        self._done: dict[str, float] = {}  # epochs by run
        self._last = ""

    def __enter__(self) -> "EpochsBar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @property
    def epochs(self) -> float:
        """How many are done."""
        return self._bar.n

    def stand(self, run: str, epochs: float, words: str, before: float = 0.0) -> None:
        """``run`` has done so many ``epochs``, of which those up to ``before`` were done at another time."""
        known = self._done.get(run, 0.0)
        if before > known:
            for count in ("n", "last_print_n", "initial"):
                setattr(self._bar, count, getattr(self._bar, count) + before - known)
            known = before
        self._done[run] = max(known, epochs)
        said = ", ".join(filter(None, [f"{run}: {words}" if words else "", self._last]))
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(self._done[run] - known)

    def end(self, run: str, epochs: float, words: str, total: float) -> None:
        """``run`` is over after ``epochs`` in all, with what ``words`` say of it; ``total`` epochs are wanted now."""
        self._last, self._bar.total = words, total
        if hasattr(self._bar, "container"):  # a notebook's bar has a widget, with a total of its own
            self._bar.container.children[1].max = total
        self.stand(run, epochs, "", before=0.0 if run in self._done else epochs)


_FORMAT = "{percentage:3.0f}%|{bar}| {n:.1f}/{total:g} epochs [{elapsed}<{remaining}{postfix}]"
