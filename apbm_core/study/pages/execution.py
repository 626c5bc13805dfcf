"""One notebook of a study: executed by papermill and put into the results folder with its page, or kept aside.

The notebook runs in the repository's root, with the interpreter that runs this. A finished one replaces the one before
it in one step; a failed one goes to <profile>/failed/, with its traceback.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from apbm_core import errors
from apbm_core.errors import ApbmError
from apbm_core.files import write_atomically
from apbm_core.study.pages import html_page, render
from apbm_core.study.pages import index as index_pages
from apbm_core.study.pages.sources import Reproduction, Source
from apbm_core.study.training.stopping import Stopped


class NotebookFailed(ApbmError):
    """A cell of a notebook raised an error; the message is that error's, and says where the traceback is."""


def execute(reproduction: Reproduction, source: Source, warned: set[str]) -> float:
    """Execute one notebook of the study and write it, with its page, to ``reproduction.folder``.

    Args:
        reproduction: gives the parameters, the folder and the root, which the notebook runs in.
        source: the notebook.
        warned: what earlier notebooks warned of, which is not printed again; what this one warns of is added.

    Returns:
        The seconds it took.

    Raises:
        NotebookFailed: a cell raised an error, or the kernel died; the notebook is kept in <profile>/failed/.
        KeyboardInterrupt: the kernel was interrupted.
        Stopped: the study's minutes are over.
        ApbmError: the folder cannot be written.
    """
    start = time.perf_counter()
    aside = reproduction.folder / ".executing" / source.path.name
    failed = reproduction.folder / "failed" / source.path.name
    try:
        shutil.rmtree(aside.parent, ignore_errors=True)
        aside.parent.mkdir(parents=True)
        began = aside.parent.stat().st_mtime_ns  # by the clock that stamps the figures
        papermill.execute_notebook(
            _literal(source.path),
            _literal(aside),
            parameters=reproduction.parameters(),
            kernel_name=_kernel(),
            language="python",
            cwd=reproduction.root,
            progress_bar={"desc": source.name, "leave": False} if sys.stderr.isatty() else False,
            coalesce_streams=True,
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's own log, about transports and interrupts
        )
    except (PapermillExecutionError, DeadKernelError) as error:
        if getattr(error, "ename", "") == "KeyboardInterrupt":
            raise KeyboardInterrupt from error
        if getattr(error, "ename", "") == "Stopped":
            raise Stopped(error.evalue) from error
        write_atomically(failed, render.to_text(_read_clean(aside, source, reproduction.root)))
        raise NotebookFailed(
            f"{source.name}: {_sentence(error)}\n"
            f"The notebook with its traceback is {reproduction.displayed(failed)}; what was finished before stays."
        ) from error
    except OSError as error:
        raise ApbmError(f"cannot write {aside}: {error.strerror or error}. What was there is unchanged.") from error

    notebook = _read_clean(aside, source, reproduction.root)
    neighbours = index_pages.neighbours(reproduction.folder)
    page = html_page.notebook_page(notebook, source.name, neighbours)  # it may fail as well
    write_atomically(reproduction.folder / source.path.name, render.to_text(notebook))
    write_atomically(reproduction.folder / f"{source.name}.html", page)
    for line in render.warnings_in(notebook):
        if line not in warned:  # several notebooks have the same to say of the data
            warned.add(line)
            print(f"{source.name}: {line}", flush=True)
    if left := _left_over(reproduction.folder, source, began):
        them = "it if it is" if len(left) == 1 else "them if they are"
        print(f"{source.name} did not write {', '.join(left)} this time: remove {them} not yours.", flush=True)
    failed.unlink(missing_ok=True)
    if failed.parent.is_dir() and not any(failed.parent.iterdir()):
        failed.parent.rmdir()
    return time.perf_counter() - start


def _left_over(folder: Path, source: Source, began: int) -> list[str]:
    """The figures and tables of the notebook's number that are older than its execution: a source that changed made
    them, or a reader did, so they are named and stay."""
    number = source.name[:2]
    files = (path for kind in ("figures", "tables") for path in sorted((folder / kind).glob(f"{number}_*")))
    return [path.relative_to(folder).as_posix() for path in files if path.stat().st_mtime_ns < began]


def _literal(path: Path) -> str:
    """A path for papermill, which would fill in whatever stands between braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _read_clean(path: Path, source: Source, root: Path) -> nbformat.NotebookNode:
    return render.clean(nbformat.read(path, as_version=4), source.notebook, root)


def _sentence(error: Exception) -> str:
    """An error of this package speaks for itself; any other is named, with the cell it came from."""
    if isinstance(error, DeadKernelError):
        return "the Python process died; it may have been out of memory."
    kind = getattr(errors, error.ename, None)
    if isinstance(kind, type) and issubclass(kind, ApbmError):
        return error.evalue
    return f"{error.ename} in cell {error.cell_index + 1}: {error.evalue}".rstrip(": ")


def _kernel() -> str:
    """The kernel that runs this interpreter: the one `make setup` registers, else IPython's own.

    A kernel of the same name in the user's home may belong to another environment, so its interpreter is compared.
    """
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    try:
        return "apbm" if KernelSpecManager().get_kernel_spec("apbm").argv[0] == sys.executable else "python3"
    except NoSuchKernel:
        return "python3"
