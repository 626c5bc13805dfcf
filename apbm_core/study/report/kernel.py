"""What a notebook's kernel is asked for: errors in a few lines, and the parameters that papermill injected."""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from IPython.core.getipython import get_ipython

from apbm_core.errors import ApbmError
from apbm_core.study.grid.bars import bar
from apbm_core.study.grid.profiles import PLACE
from apbm_core.study.training.hooks import Context

MOST_LINES = 5
_INJECTED = "# Parameters\n"  # how the cell begins that papermill inserts
_CHANGES = "changes"


def show_errors_briefly() -> None:
    """From here on the kernel shows an error of this package as its message, in at most five lines, and an interrupt as
    what to do next. Errors of any other kind keep their traceback. Without IPython nothing happens."""
    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((ApbmError, KeyboardInterrupt), _show)


def _show(shell: Any, kind: type, error: BaseException, trace: TracebackType, tb_offset: int | None = None) -> list:
    lines = brief(error)
    shell._showtraceback(kind, error, lines)
    return lines


def brief(error: BaseException) -> list[str]:
    """An error's message in at most five lines, with what to do next."""
    if isinstance(error, KeyboardInterrupt):
        said = str(error) or "Interrupted."
        return [said, "What is finished is recorded. Run this cell again, and it goes on from the last checkpoint."]
    lines = str(error).splitlines() or [type(error).__name__]
    kept = lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], f"... {len(lines) - MOST_LINES + 1} more"]
    return [f"{type(error).__name__}: {kept[0]}", *kept[1:]]


@contextmanager
def epochs_bar(epochs: int, words: str) -> Iterator[Callable[[Context], None]]:
    """A bar that counts the epochs of one training, with the time left; what it yields is ``train``'s ``progress``."""
    with bar(total=epochs, unit="epoch", desc=words) as shown:
        yield lambda context: shown.update(round(epochs * context.progress, 3) - shown.n)


def injected_by_papermill() -> dict[str, Any]:
    """What papermill assigned by name in the cell that it inserts, but for profile, results and changes; empty without
    such a cell.

    The names are read from the cell and not from the kernel's variables, where other cells' would be among them.
    """
    shell = get_ipython()
    cells = [cell for cell in (shell.user_ns.get("In", []) if shell is not None else []) if cell.startswith(_INJECTED)]
    if not cells:
        return {}
    names = [
        target.id
        for statement in ast.parse(cells[-1]).body
        for target in getattr(statement, "targets", [])
        if isinstance(target, ast.Name)
    ]
    return {name: shell.user_ns[name] for name in names if name not in (*PLACE, _CHANGES) and name in shell.user_ns}
