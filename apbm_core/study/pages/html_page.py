"""Notebooks and texts as HTML pages that need nothing but themselves: no script, no font, no style from a network.

Formulas become MathML, which browsers draw by themselves; the cells that set a page up are folded; a header leads home,
to the pages beside it and to the sections.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_mistune

TEMPLATES = Path(__file__).parent / "templates"
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
    notebook = nbformat.from_dict({**notebook, "cells": [_with_mathml(cell) for cell in notebook.cells]})
    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(TEMPLATES)])
    exporter.embed_images = True
    page, _ = exporter.from_notebook_node(
        notebook,
        resources={
            "title": title_of(notebook) or stem,
            "style": style(),
            "navigation": "@navigation@",
        },
    )
    return page.replace("@navigation@", neighbours.navigation(stem, _sections(page)))


def text_page(title: str, markdown: str, navigation: str = "") -> str:
    """A Markdown text as one HTML page."""
    body = markdown2html_mistune(mathml(markdown))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{style()}</style>\n</head>\n<body>\n{navigation}<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def mathml(markdown: str) -> str:
    """Markdown whose formulas, between dollars, are MathML; code stays as it is."""

    def formula(found: re.Match) -> str:
        if found["code"]:
            return found["code"]
        display = "block" if found["block"] else "inline"
        return convert((found["block"] or found["inline"]).strip(), display=display)

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


def _with_mathml(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if cell.cell_type != "markdown":
        return cell
    return nbformat.from_dict({**cell, "source": mathml(cell.source)})


def _sections(page: str) -> list[tuple[str, str]]:
    """The anchors and words of the second-level headings."""
    found = re.findall(r'<h2[^>]*\bid="([^"]+)"[^>]*>(.*?)</h2>', page, re.DOTALL)
    return [(anchor, re.sub(r"<a class=\"anchor-link\".*?</a>|<[^>]+>", "", words).strip()) for anchor, words in found]
