"""Executed notebooks as files that can be diffed and read in a browser, and the pages that list them.

What an execution leaves of the machine and the moment - paths, addresses, time stamps, progress bars - is taken out, so
that two runs from the same records give the same bytes.
"""

import copy
import html
import io
import re
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_mistune

from apbm_core.errors import RecordError
from apbm_core.files import write_atomically
from apbm_core.study.records import read_record

WIDGET = "application/vnd.jupyter.widget-view+json"
# Outputs may be megabytes without a line break, so these patterns take time linear in the text: each attempt starts at
# the beginning of a path or a word, not at every character of it.
_CELL_FILE = re.compile(r"""(?<![^\s:,"'()<>])([^\s:,"'()<>/]*+)[^\s:,"'()<>]*?/ipykernel_\d+/\d+\.py""")
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
_HASH = re.compile(r"\b([0-9a-f]{10})[0-9a-f]{30}\b")
_PROGRESS = re.compile(r"\d%\|.*\||\b(?=[^\W\d]*\d)\w++ \[\d++:")  # `40%|####  |`, or `3it [00:01`

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .2rem .7rem; text-align: left; }}
a.anchor-link {{ display: none; }}
</style>
{body}
</html>
"""


def clean(executed: nbformat.NotebookNode, source: nbformat.NotebookNode, root: Path) -> nbformat.NotebookNode:
    """A copy of the executed notebook without traces of the machine and the moment it ran on.

    Time stamps and papermill's bookkeeping go, and so does the cell of parameters that others were injected for. In
    text outputs the absolute path of ``root`` becomes ".", the home folder "~", a memory address "0x...". Progress bars
    go: widgets are dead without their kernel, and both kinds show times.

    Args:
        executed: as papermill left it.
        source: the notebook it came from; its cell ids and metadata are kept.
        root: the repository.
    """
    result = copy.deepcopy(executed)
    parameters = executed.metadata.get("papermill", {}).get("parameters", {})
    result.metadata = copy.deepcopy(source.metadata)
    result.metadata["papermill"] = {"parameters": parameters}
    known_ids = {cell.get("id") for cell in source.cells}
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in result.cells):
        # what the source assigns was not what the page was made with
        result.cells = [cell for cell in result.cells if "parameters" not in cell.metadata.get("tags", [])]
    for position, cell in enumerate(result.cells):
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.get("id") not in known_ids:
            cell["id"] = f"added-{position}"  # papermill gives the cells it adds a random id
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_without_bars, cell.outputs) if output is not None]
            for output in cell.outputs:
                _clean_output(output, root)
    return result


def to_text(notebook: nbformat.NotebookNode) -> str:
    """The notebook's file content."""
    return nbformat.writes(notebook) + "\n"


def to_html(notebook: nbformat.NotebookNode, name: str, folder: Path) -> str:
    """The notebook as one HTML page titled ``name``, the pictures in it included; they are looked up in ``folder``."""
    exporter = HTMLExporter(embed_images=True)
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name, "path": str(folder)}})
    return page


def warnings_in(notebook: nbformat.NotebookNode) -> list[str]:
    """The lines that a cleaned notebook's cells wrote to standard error."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    streams = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    return [line for text in streams for line in text.splitlines() if line.strip()]


def write_index(folder: Path, profile: str, description: str) -> Path:
    """Write README.md and index.html into ``folder`` (results/<profile>): what is there and which runs it is made of.

    Returns:
        The path of index.html.
    """
    lines = [f"# Results of the profile {profile}", "", description, "", *_about_records(folder / "runs"), ""]
    lines += ["## Notebooks", ""]
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        lines.append(f"- [{_title(path)}]({path.stem}.html) ([notebook]({path.name}))")
    for path in sorted(folder.glob("failed/*.ipynb")):
        lines.append(f"- [{path.stem} failed]({_relative(path, folder)}); what is listed above is from before")
    tables = sorted([*folder.glob("tables/*.csv"), *folder.glob("tables/*.md")])
    lines += ["", "## Tables", ""] if tables else []
    for path in tables:
        lines.append(f"- [{path.name}]({_relative(path, folder)})")
    for path in (path for path in tables if path.suffix == ".md"):
        lines += ["", f"### {_words(path)}", "", path.read_text(encoding="utf-8").strip()]
    figures = sorted(folder.glob("figures/*.png"))
    lines += ["", "## Figures"] if figures else []
    for path in figures:
        lines += ["", f"![{_words(path)}]({_relative(path, folder)})"]
    return _write_page(folder, f"Results of the profile {profile}", lines)


def write_overview(results: Path) -> Path:
    """Write index.html into ``results``: the profiles that have been run. Its README.md is written by hand."""
    lines = ["# Results", ""]
    for page in sorted(results.glob("*/README.md")):
        _, _, description, *_ = [*page.read_text(encoding="utf-8").splitlines(), "", "", ""]
        name = page.parent.name
        lines.append(f"- [{name}]({name}/index.html) ([as text]({name}/README.md)) {description}".rstrip())
    return write_atomically(results / "index.html", _page("Results", "\n".join(lines)))


def _write_page(folder: Path, title: str, lines: Iterable[str]) -> Path:
    markdown = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
    write_atomically(folder / "README.md", markdown)
    return write_atomically(folder / "index.html", _page(title, markdown))


def _page(title: str, markdown: str) -> str:
    return _PAGE.format(title=html.escape(title), body=markdown2html_mistune(markdown))


def _without_bars(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """The output without its progress bars; None if that was all there was in it."""
    if WIDGET in output.get("data", {}):
        return None
    if output.output_type == "stream":
        output.text = "".join(line for line in io.StringIO(output.text, newline="\n") if not _PROGRESS.search(line))
        return output if output.text.strip() else None
    return output


def _clean_output(output: nbformat.NotebookNode, root: Path) -> None:
    if "text" in output:
        output.text = _anonymous(output.text, root)
    for mime, content in output.get("data", {}).items():
        if mime.startswith("text/") or mime == "image/svg+xml":
            output.data[mime] = _anonymous(content, root)
    if output.output_type == "error":
        output.evalue = _anonymous(output.evalue, root)
        output.traceback = [_anonymous(line, root) for line in output.traceback]
    output.get("metadata", {}).pop("execution", None)


def _anonymous(text: str, root: Path) -> str:
    text = _ADDRESS.sub("at 0x...", _CELL_FILE.sub(r"\1<cell>", text))
    for path, stand_in in ((root.resolve(), "."), (root, "."), (Path.home(), "~")):
        if len(path.parts) > 1:
            text = re.sub(rf"(?<![\w.-]){re.escape(path.as_posix())}(?![\w.-])", stand_in, text)
    return text


def _title(path: Path) -> str:
    """The first heading of a notebook, or its name."""
    for cell in nbformat.read(path, as_version=4).cells:
        heading = re.search(r"^# +(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if heading:
            return heading[1].strip()
    return path.stem


def _words(path: Path) -> str:
    return path.stem.replace("_", " ")


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _about_records(folder: Path) -> list[str]:
    """Sentences on the recorded runs: how many, when, on what, from which commit; and which files are damaged."""
    records, damaged = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read_record(path))
        except RecordError as error:
            damaged += ["", f"Not counted: {error}"]
    if not records:
        return damaged
    days = sorted(record.finished[:10] for record in records)
    facts = [f"Made from {len(records)} recorded run{'s' * (len(records) > 1)}"]
    facts.append(f"finished {' to '.join(dict.fromkeys((days[0], days[-1])))}")
    for preposition, key in (("on", "device"), ("from commit", "commit")):
        values = {str(record.environment[key]) for record in records if record.environment.get(key)}
        short = sorted(_HASH.sub(r"\1", value) for value in values)
        facts += [f"{preposition} {' and '.join(short)}"] if short else []
    return [f"{', '.join(facts)}.", *damaged]
