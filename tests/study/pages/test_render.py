"""Cleaning outputs: what goes, what stays, and that lines of a million characters are no obstacle."""

import re
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apbm_core.study.pages import render

MILLION = 1_000_000
BAR = re.compile(r"^.*(?:\d+%\|.*\||\d+\w* \[\d+:).*\n?", re.MULTILINE)
"""A line with a progress bar, as plain as can be; it takes quadratic time for long words and numbers."""


def cleaned(text: str) -> str:
    """What is left of a cell's printed text."""
    output = nbformat.v4.new_output("stream", name="stdout", text=text)
    cell = nbformat.v4.new_code_cell("...", outputs=[output])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    (cell,) = render.clean(notebook, notebook, Path("/nowhere/at all")).cells
    return "".join(output.text for output in cell.outputs)


LONG = {
    "digits": "7" * MILLION,
    "digits before a bracket": "7" * MILLION + " [x",
    "a word of letters and digits": "a1" * (MILLION // 2),
    "brackets": "1 [1" * (MILLION // 4),
    "percent signs": "1%" * (MILLION // 2) + "|",
    "a path": "/ab" * (MILLION // 3),
    "base64": "data:image/png;base64," + "iVBORw0KGgo/" * (MILLION // 12),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_line_of_a_million_characters_stays_as_it_is(kind):
    text = f"before\n{LONG[kind]}\nafter\n"
    assert cleaned(text) == text


@pytest.mark.parametrize("bar", ["40%|####      | 2/5 [00:01<00:02]", "3it [00:01, 2.0it/s]", "\r  0%|          | 0/3"])
def test_a_bar_after_a_million_characters_goes_with_its_line(bar):
    assert cleaned(f"before\n{'7' * MILLION} {bar}\nafter\n") == "before\nafter\n"


@given(st.lists(st.sampled_from(["1", "2a", "é", "_", " [", "[", "%|", "|", "00:", ":", " ", "\n", "\r"]), max_size=14))
def test_exactly_the_lines_with_bars_go(parts):
    text = "".join(parts) + "\nlast\n"
    assert cleaned(text) == BAR.sub("", text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/tmp/ipykernel_12/345.py:3: UserWarning: x", "<cell>:3: UserWarning: x"),
        ('File "/var/folders/a_b/T/ipykernel_1/2.py", line 1', 'File "<cell>", line 1'),
        ("a /tmp/ipykernel_1/2.py (/tmp/ipykernel_1/3.py)", "a <cell> (<cell>)"),
        ("/tmp/ipykernel_1/notes.txt", "/tmp/ipykernel_1/notes.txt"),
        ("/ab" * (MILLION // 3) + "/ipykernel_1/2.py", "<cell>"),
    ],
)
def test_a_cells_temporary_file_is_called_cell(text, left):
    assert cleaned(text) == left
