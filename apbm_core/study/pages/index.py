"""The pages that list what is in a results folder: a profile's, and the texts about its records."""

import re
from collections.abc import Iterable
from pathlib import Path

import nbformat
from PIL import Image

from apbm_core.errors import RecordError
from apbm_core.files import write_atomically
from apbm_core.study.pages.html_page import Neighbours, notebook_page, text_page, title_of
from apbm_core.study.records import read_record

_HASH = re.compile(r"\b([0-9a-f]{10})[0-9a-f]{30}\b")


def neighbours(folder: Path) -> Neighbours:
    """The notebooks' pages in ``folder``, in the order of their numbers."""
    found = [(path.stem, title_of(nbformat.read(path, as_version=4)) or path.stem) for path in _notebooks(folder)]
    return Neighbours(found, folder.name)


def write_notebook_pages(folder: Path) -> None:
    """Write every notebook in ``folder`` as an HTML page that leads to the ones beside it."""
    beside = neighbours(folder)
    for path in _notebooks(folder):
        page = notebook_page(nbformat.read(path, as_version=4), path.stem, beside)
        write_atomically(path.with_suffix(".html"), page)


def write_index(folder: Path, profile: str, description: str) -> Path:
    """Write README.md and index.html into ``folder`` (results/<profile>): what is there and which runs it is made of.

    Returns:
        The path of index.html.
    """
    lines = [f"# Results of the profile {profile}", "", description, "", *_about_records(folder / "runs"), ""]
    lines += ["## Pages", ""]
    for stem, title in neighbours(folder).pages:
        lines.append(f"- [{title}]({stem}.html) ([notebook]({stem}.ipynb))")
    for path in sorted(folder.glob("failed/*.ipynb")):
        lines.append(f"- [{path.stem} failed]({_relative(path, folder)}); what is listed above is from before")
    figures = sorted(folder.glob("figures/*.png"))
    lines += ["", "## Figures"] if figures else []
    for path in figures:
        said = caption(path)
        lines += ["", f"![{said}]({_relative(path, folder)})", "", f"*{said}*"]
    tables = sorted([*folder.glob("tables/*.csv"), *folder.glob("tables/*.md")])
    lines += ["", "## Tables", ""] if tables else []
    for path in tables:
        lines.append(f"- [{_words(path)}]({_relative(path, folder)})")
    for path in (path for path in tables if path.suffix == ".md"):
        lines += ["", f"### {_words(path)}", "", path.read_text(encoding="utf-8").strip()]
    return _write_page(folder, f"Results of the profile {profile}", lines)


def caption(figure: Path) -> str:
    """The titles that a stored figure carries, or the words of its name.

    Raises:
        RecordError: the file is no picture.
    """
    try:
        with Image.open(figure) as picture:
            said = picture.info.get("Title", "")
    except OSError as error:
        raise RecordError(f"{figure} is no picture that can be read ({error}); delete it and render again.") from error
    return re.sub(r"[\[\]*_]", "", said) or _words(figure)


def about(records: Iterable) -> str:
    """A sentence on records: how many, when, on what, from which commit; empty without any."""
    records = list(records)
    if not records:
        return ""
    days = sorted(record.finished[:10] for record in records)
    facts = [f"Made from {len(records)} recorded run{'s' * (len(records) > 1)}"]
    facts.append(f"finished {' to '.join(dict.fromkeys((days[0], days[-1])))}")
    for preposition, key in (("on", "device"), ("from commit", "commit")):
        values = {str(record.environment[key]) for record in records if record.environment.get(key)}
        short = sorted(_HASH.sub(r"\1", value) for value in values)
        facts += [f"{preposition} {' and '.join(short)}"] if short else []
    return f"{', '.join(facts)}."


def _about_records(folder: Path) -> list[str]:
    """What :func:`about` says of the recorded runs, and which files are damaged."""
    records, damaged = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read_record(path))
        except RecordError as error:
            damaged += ["", f"Not counted: {error}"]
    return [about(records), *damaged]


def _write_page(folder: Path, title: str, lines: Iterable[str]) -> Path:
    markdown = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
    write_atomically(folder / "README.md", markdown)
    home = '<nav aria-label="pages"><a href="../index.html">Home</a></nav>\n'
    return write_atomically(folder / "index.html", text_page(title, markdown, home))


def _notebooks(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def _words(path: Path) -> str:
    return path.stem.replace("_", " ")


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
