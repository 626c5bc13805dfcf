"""Notebooks and texts as HTML pages that need nothing but themselves: no script, no font, no style from a network.

Formulas become MathML, which browsers draw by themselves; the cells that set a page up are folded; a header leads home,
to the pages beside it and to the sections.
"""

import base64
import html
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_mistune

TEMPLATES = Path(__file__).parent / "templates"
_MARK = re.compile("\u27e6(\\d+)\u27e7")
_MATH = re.compile(r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.DOTALL)


@dataclass(frozen=True)
class Neighbours:
    """Where a page's header leads: the pages of its profile in order, as (file stem, title), and the folder's name."""

    pages: Sequence[tuple[str, str]]
    profile: str

    def navigation(self, stem: str, sections: Sequence[tuple[str, str]]) -> str:
        """The header of one page; its sections are (anchor, words)."""
        stems = [name for name, _ in self.pages]
        place = stems.index(stem) if stem in stems else None
        links = ['<a href="../index.html">Home</a>', f'<a href="index.html">{html.escape(self.profile)}</a>']
        for step, arrow, relation in ((-1, "&larr; {}", "prev"), (1, "{} &rarr;", "next")):
            if place is not None and 0 <= place + step < len(stems):
                name, title = self.pages[place + step]
                links.append(f'<a rel="{relation}" href="{name}.html">{arrow.format(html.escape(title))}</a>')
        items = "".join(f'<li><a href="#{anchor}">{words}</a></li>' for anchor, words in sections)
        contents = f"<details><summary>Contents</summary><ul>{items}</ul></details>" if sections else ""
        return f'<nav aria-label="pages">{"".join(links)}{contents}</nav>'


def notebook_page(notebook: nbformat.NotebookNode, stem: str, neighbours: Neighbours) -> str:
    """A notebook with its outputs as one HTML page."""
    formulas: list[str] = []  # put back at last: the exporter would close every tag of a formula by itself
    cells = [_without_formulas(cell, formulas) for cell in notebook.cells]
    notebook = nbformat.from_dict({**notebook, "cells": cells})
    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(TEMPLATES)])
    exporter.embed_images = True
    exporter.register_filter("pixels_across", pixels_across)
    exporter.register_filter("table_classes", table_classes)
    page, _ = exporter.from_notebook_node(
        notebook,
        resources={
            "title": title_of(notebook) or stem,
            "style": style(),
            "navigation": "@navigation@",
        },
    )
    page = page.replace("@navigation@", neighbours.navigation(stem, _sections(page)))
    return _MARK.sub(lambda mark: formulas[int(mark[1])], page)


def text_page(title: str, markdown: str, navigation: str = "") -> str:
    """A Markdown text as one HTML page."""
    body = markdown2html_mistune(mathml(markdown))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{style()}</style>\n</head>\n<body>\n{navigation}<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def mathml(markdown: str, put: Callable[[str], str] = str) -> str:
    """Markdown whose formulas, between dollars, are MathML, or what ``put`` makes of that; code stays as it is."""

    def formula(found: re.Match) -> str:
        if found["code"]:
            return found["code"]
        display = "block" if found["block"] else "inline"
        return put(convert((found["block"] or found["inline"]).strip(), display=display))

    return _MATH.sub(formula, markdown)


def title_of(notebook: nbformat.NotebookNode) -> str:
    """The first heading of a notebook; empty without one."""
    for cell in notebook.cells:
        heading = re.search(r"^# +(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if heading:
            return heading[1].strip()
    return ""


@lru_cache
def style() -> str:
    """The pages' one style sheet, in as few characters as are easily had."""
    text = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return re.sub(r"\s*\n\s*", " ", text).strip()


def pixels_across(png: str) -> int:
    """The width of a picture in pixels, from the head of its base64; the style sheet scales its letters by it."""
    return struct.unpack(">I", base64.b64decode(png[:32])[16:20])[0]


def table_classes(table: str) -> str:
    """A pandas table whose heads over numbers have the class ``n``, as their cells do, and long words the class ``t``.

    Without them a head stands left of its numbers, and a column of words beside many others is a word wide.
    """
    numeric = set(re.findall(r'<td [^>]*class="data row\d+ (col\d+) n"', table))
    heads = re.compile(r'(<th [^>]*class="col_heading level\d+ (col\d+))"')
    table = heads.sub(lambda head: f'{head[1]}{" n" if head[2] in numeric else ""}"', table)
    return re.sub(r'(<td [^>]*class="data row\d+ col\d+)("[^>]*>[^<]{25,}</td>)', r"\1 t\2", table)


def _without_formulas(cell: nbformat.NotebookNode, formulas: list[str]) -> nbformat.NotebookNode:
    """A cell whose formulas are marks; their MathML is appended to ``formulas``."""
    if cell.cell_type != "markdown":
        return cell

    def put(formula: str) -> str:
        formulas.append(formula)
        return f"\u27e6{len(formulas) - 1}\u27e7"

    return nbformat.from_dict({**cell, "source": mathml(cell.source, put)})


def _sections(page: str) -> list[tuple[str, str]]:
    """The anchors and words of the second-level headings."""
    found = re.findall(r'<h2[^>]*\bid="([^"]+)"[^>]*>(.*?)</h2>', page, re.DOTALL)
    return [(anchor, re.sub(r"<a class=\"anchor-link\".*?</a>|<[^>]+>", "", words).strip()) for anchor, words in found]
