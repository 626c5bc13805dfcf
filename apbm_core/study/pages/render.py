"""Executed notebooks as files that can be diffed.

What an execution leaves of the machine and the moment - paths, addresses, time stamps, progress bars - is taken out, so
that two runs from the same records give the same bytes.
"""

import copy
import io
import re
from pathlib import Path

import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"
# Outputs may be megabytes without a line break, so these patterns take time linear in the text: each attempt starts at
# the beginning of a path or a word, not at every character of it.
_CELL_FILE = re.compile(r"""(?<![^\s:,"'()<>])([^\s:,"'()<>/]*+)[^\s:,"'()<>]*?/ipykernel_\d+/\d+\.py""")
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
_PROGRESS = re.compile(r"\d%\|.*\||\b(?=[^\W\d]*\d)\w++ \[\d++:")  # `40%|####  |`, or `3it [00:01`


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


def warnings_in(notebook: nbformat.NotebookNode) -> list[str]:
    """The lines that a cleaned notebook's cells wrote to standard error."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    streams = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    return [line for text in streams for line in text.splitlines() if line.strip()]


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
