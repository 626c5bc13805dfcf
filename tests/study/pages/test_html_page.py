"""Pages that need nothing but themselves: formulas as MathML, set-up folded, a header that leads on."""

import html
import re
from xml.etree import ElementTree

import nbformat
import pandas as pd
import pytest

from apbm_core.study.pages import html_page

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


def page(*cells: nbformat.NotebookNode, pages=(("01_a", "First"), ("02_b", "Second"), ("03_c", "Third"))) -> str:
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    return html_page.notebook_page(notebook, "02_b", html_page.Neighbours(pages, "tiny"))


def test_formulas_become_mathml_and_code_stays():
    text = html_page.mathml("$a_i$ and `$HOME` and\n```\n$x$\n```\n$$\\sum_k p_k$$ for 3 dollars")
    assert "`$HOME`" in text and "```\n$x$\n```" in text and text.count("<math") == 2
    inline, block = re.findall(r"<math.*?</math>", text, re.DOTALL)
    assert 'display="inline"' in inline and 'display="block"' in block
    assert "".join(ElementTree.fromstring(inline).itertext()) == "ai"


def test_every_formula_of_the_notebooks_can_be_drawn():
    folder = html_page.TEMPLATES.parents[3] / "notebooks"
    notebooks = [nbformat.read(path, as_version=4) for path in sorted(folder.glob("*.ipynb"))]
    sources = [cell.source for notebook in notebooks for cell in notebook.cells if cell.cell_type != "code"]
    found = re.findall(r"<math.*?</math>", "".join(map(html_page.mathml, sources)), re.DOTALL)
    assert len(found) >= 17
    for formula in found:
        text = "".join(ElementTree.fromstring(formula).itertext())
        assert "\\" not in text, f"a command was not understood: {text}"


def test_the_formulas_of_a_page_are_whole():
    """The exporter parses every tag in a text by itself, which would leave each element of a formula empty."""
    said = page(nbformat.v4.new_markdown_cell("Of $D_{ij}$ and\n\n$$\\sum_k p_k$$"), nbformat.v4.new_code_cell("'$x$'"))
    inline, block = (ElementTree.fromstring(formula) for formula in re.findall(r"<math.*?</math>", said, re.DOTALL))
    name = "{http://www.w3.org/1998/Math/MathML}"
    assert ["".join(part.itertext()) for part in inline.find(f".//{name}msub")] == ["D", "ij"]
    assert "".join(block.itertext()) == "\u2211kpk" and not re.search("[\u27e6\u27e7]", said)


def test_a_page_asks_nothing_of_a_network_and_carries_its_style_once():
    said = page(nbformat.v4.new_markdown_cell("# Title\n\nText $x$ [link](http://example.org).\n\n## Part one"))
    assert "<script" not in said and "<link" not in said and "@import" not in said and "url(" not in said
    assert len(said) < 12_000 and said.count("<style>") == 1
    assert "<title>Title</title>" in said and "$" not in said.split("</style>")[1]


def test_the_header_leads_home_to_both_sides_and_to_the_sections():
    said = page(nbformat.v4.new_markdown_cell("# Title\n\n## Part one\n\n## Part two"))
    header = said[said.index("<nav") : said.index("</nav>")]
    for link in ('href="../index.html"', 'href="index.html">tiny', 'rel="prev" href="01_a.html">&larr; First'):
        assert link in header
    assert 'rel="next" href="03_c.html">Third &rarr;' in header
    anchors = re.findall(r'href="#([^"]+)"', header)
    assert len(anchors) == 2 and all(f'id="{anchor}"' in said for anchor in anchors)
    alone = page(nbformat.v4.new_markdown_cell("# Title"), pages=())
    assert "rel=" not in alone.split("</style>")[1]


def test_set_up_is_folded_and_the_rest_is_not():
    setup = nbformat.v4.new_code_cell("import x", metadata={"tags": ["setup"]})
    shown = nbformat.v4.new_code_cell("show(x)")
    said = page(setup, shown)
    folded = re.search(r'<details class="code">.*?</details>', said, re.DOTALL)[0]
    assert "import" in folded and "show" not in folded and "show" in said


@pytest.mark.parametrize("alternative", ["APBM <leads> with 3 %", None])
def test_a_picture_has_words_for_those_who_cannot_see_it(alternative):
    metadata = {"image/png": {"alt": alternative}} if alternative else {}
    output = nbformat.v4.new_output("display_data", data={"image/png": PIXEL + "\n"}, metadata=metadata)
    said = page(nbformat.v4.new_code_cell("x", outputs=[output]))
    (alt,) = re.findall(r'<img [^>]*alt="([^"]*)"', said)
    assert alt == ("APBM &lt;leads&gt; with 3 %" if alternative else "a picture without words")
    assert f"data:image/png;base64,{PIXEL}" in said


def test_outputs_of_every_kind_are_shown():
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="a < b\n"),
        nbformat.v4.new_output("display_data", data={"text/html": "<table><tr><td>7</td></tr></table>"}),
        nbformat.v4.new_output("execute_result", data={"text/plain": "{'x': 1}"}),
        nbformat.v4.new_output("error", ename="E", evalue="v", traceback=["ConfigError: no such thing"]),
    ]
    said = page(nbformat.v4.new_code_cell("x", outputs=outputs))
    for part in ("a &lt; b", '<div class="scroll"><table>', "{'x': 1}", "ConfigError: no such thing"):
        assert part in html.unescape(said) or part in said, part


def test_heads_stand_over_their_numbers_and_long_words_have_room():
    table = pd.DataFrame({"what": ["a sentence of some length, no less", "short"], "share": [0.5, 1.0]})
    classes = pd.DataFrame({"what": ["", ""], "share": ["n", "n"]})
    output = nbformat.v4.new_output(
        "display_data", data={"text/html": table.style.hide(axis="index").set_td_classes(classes).to_html()}
    )
    said = page(nbformat.v4.new_code_cell("x", outputs=[output]))
    classes = dict((words, found.split()) for found, words in re.findall(r'<t[hd] class="([^"]*)"[^>]*>([^<]*)<', said))
    assert "n" in classes["share"] and "n" not in classes["what"]
    assert "t" in classes["a sentence of some length, no less"] and "t" not in classes["short"]


def test_a_picture_says_how_wide_it_is():
    output = nbformat.v4.new_output("display_data", data={"image/png": PIXEL})
    assert 'style="--px: 1"' in page(nbformat.v4.new_code_cell("x", outputs=[output]))
