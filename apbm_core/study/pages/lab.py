"""JupyterLab for a reader: a welcome page, copies of the notebooks to play with, one kernel, no news.

    python -m apbm_core.study.pages.lab          what `make lab` starts

The notebooks are copied to ``my/``, which git ignores: whoever turns their knobs there leaves the sources alone. A copy
that is there already is kept. Lab shows no HTML page of a folder with its pictures and links, so the welcome page leads
to the rendered notebooks (``.ipynb``) and not to the ``.html`` beside them. Those can be run, and not be saved over.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import nbformat
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

from apbm_core.files import write_atomically
from apbm_core.study.grid.profiles import load_profile, profile_names
from apbm_core.study.pages.html_page import TEMPLATES, title_of
from apbm_core.study.records import OWN, PUBLISHED_RESULTS

MY = "my"
WELCOME = "welcome.md"


class Files(AsyncLargeFileManager):
    """The repository's files as Lab shows them, of which the published results are there to be read.

    Lab takes a notebook for changed as soon as its kernel has said which Python it is, and saves it within two minutes.
    """

    def is_writable(self, path: str) -> bool:
        """Whether Lab may save or delete the file ``path``, counted from the root, with slashes."""
        return not is_published(path) and super().is_writable(path)


def is_published(path: str) -> bool:
    """Whether ``path``, counted from the root, is among the published results and not among the reader's own."""
    place = PurePosixPath(path.strip("/"))
    return place.is_relative_to(PUBLISHED_RESULTS) and not place.is_relative_to(OWN)


def prepare(root: Path) -> tuple[list[str], list[str]]:
    """Copy the notebooks to ``my/`` and write the welcome page.

    Returns:
        The names that were copied, and those that were there and differ from the source: the reader's own.
    """
    folder = root / MY
    folder.mkdir(exist_ok=True)
    copied, kept = [], []
    for source in sorted((root / "notebooks").glob("*.ipynb")):
        copy = folder / source.name
        if not copy.exists():
            shutil.copyfile(source, copy)
            copied.append(source.name)
        elif copy.read_bytes() != source.read_bytes():
            kept.append(source.name)
    write_atomically(folder / WELCOME, welcome(root))
    return copied, kept


def welcome(root: Path) -> str:
    """The welcome page, as Markdown whose links lead from ``my/`` to what there is."""
    lines = ["# Welcome", "", "**Play**: these are your copies; change what you like, the originals stay.", ""]
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        title = title_of(nbformat.read(path, as_version=4)) or path.stem
        lines.append(f"- [{title}]({path.name})")
    lines += ["", "A cell `changes = {}` near the top says what differs from the profile: `{'epochs': 1}`.", ""]
    lines += ["**Read**: the pages that were rendered from the records.", ""]
    for name in profile_names(root):
        pages = sorted((root / "results" / name).glob("[0-9][0-9]_*.ipynb"))
        if pages:
            links = ", ".join(f"[{path.stem}](../results/{name}/{path.name})" for path in pages)
            lines.append(f"- *{name}* ({load_profile(root, name).description}): {links}")
    for path, words in (("README.md", "What was found, in words"), ("results/README.md", "What is in results/")):
        if (root / path).exists():
            lines.append(f"- [{words}](../{path})")
    lines += [
        "",
        "The front page with charts, `results/index.html`, works in any browser; Lab shows it, too.",
        "",
        "An interrupted run goes on where it stopped: run its cell again.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None, root: Path | None = None) -> None:
    """Prepare ``my/`` and start JupyterLab on the welcome page; further arguments are JupyterLab's."""
    from jupyterlab.labapp import LabApp  # importing it runs Node.js, which the pages of the API have no use for

    root = root or Path(__file__).resolve().parents[3]
    copied, kept = prepare(root)
    if copied:
        print(f"Copied to {MY}/: {', '.join(copied)}")
    if kept:
        print(f"Kept in {MY}/, changed by you or older than the source: {', '.join(kept)}. Delete one to get it anew.")
    LabApp.launch_instance(
        [
            f"--ServerApp.root_dir={root}",
            f"--LabApp.default_url=/lab/tree/{MY}/{WELCOME}",
            f"--LabApp.app_settings_dir={TEMPLATES / 'lab'}",
            f"--ServerApp.contents_manager_class={Files.__module__}.{Files.__name__}",
            "--KernelSpecManager.allowed_kernelspecs=python3",
            *(sys.argv[1:] if arguments is None else arguments),
        ]
    )


if __name__ == "__main__":
    main()
