"""Renders the API's pages and the texts beside this file, for reading without a network: ``make docs``.

The pages of the modules are pdoc's, which reads the docstrings as they stand and needs little that Jupyter does not
bring already. Formulas become MathML, which browsers draw by themselves; pdoc alone would fetch MathJax from a server.
"""

import argparse
import html
import os
import pkgutil
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import markdown2
import pdoc
import pdoc.render
from jinja2 import pass_context
from latex2mathml.converter import convert

import apbm_core

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
TEXTS = ("methods", "own_criterion", "clusters", "faults")

_EXTRAS = ["code-friendly", "cuddled-lists", "fenced-code-blocks", "header-ids", "tables"]
_CODE = re.compile(r"```.*?```|``.+?``|`[^`\n]+`", re.DOTALL)
_MATH = re.compile(
    r"\$\$(?P<block>.+?)\$\$|\\\\\((?P<role>.+?)\\\\\)|(?<![\w$\\])\$(?P<inline>[^\s$](?:[^$]*?[^\s$])?)\$(?![\w$])",
    re.DOTALL,
)
_MARK = re.compile(r"\u27e6(\d+)\u27e7")
_LITERAL_BLOCK = re.compile(r"::(?=[ ]*\n[ ]*\n)")
_CITATION = re.compile(r"methods\.md(</code>)? (\d)\b")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #212529; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; vertical-align: top; }}
code, pre {{ background: #f6f8fa; border-radius: 4px; padding: .1em .3em; font-size: 90%; }}
pre {{ padding: .7rem; overflow-x: auto; }}
math[display=block] {{ margin: 1rem 0; }}
</style>
<p><a href="index.html">API</a>{others}</p>
{body}
</html>
"""


class Formulas:
    """Formulas taken out of Markdown, which would read their underscores and stars, and put into its HTML as MathML."""

    def __init__(self):
        self.mathml: list[str] = []

    def take_out(self, text: str) -> str:
        """Markdown with a mark for each formula, ``$..$`` or ``$$..$$``; code is left alone."""
        pieces, end = [], 0
        for code in _CODE.finditer(text):
            pieces += [_MATH.sub(self._mark, text[end : code.start()]), code[0]]
            end = code.end()
        return "".join(pieces) + _MATH.sub(self._mark, text[end:])

    def put_in(self, page: str) -> str:
        """HTML with the formulas where their marks are."""
        return _MARK.sub(lambda match: self.mathml[int(match[1])], page)

    def _mark(self, match: re.Match) -> str:
        latex = " ".join((match["block"] or match["role"] or match["inline"]).split())
        self.mathml.append(convert(latex, display="block" if match["block"] else "inline"))
        mark = f"\u27e6{len(self.mathml) - 1}\u27e7"
        return f"\n\n{mark}\n\n" if match["block"] else mark


def modules() -> list[str]:
    """What pdoc is asked for: the package's public names, its modules, and the study with all that is in it."""
    found = [info.name for info in pkgutil.iter_modules(apbm_core.__path__, "apbm_core.")]
    return ["apbm_core", *(name for name in found if not name.rpartition(".")[2].startswith("_"))]


def render_api(folder: Path) -> None:
    """pdoc's pages of all modules.

    Raises:
        SystemExit: pdoc warned, of a docstring or an annotation it could not read.
    """
    pdoc.render.configure(
        docformat="google", show_source=False, search=False, footer_text=f"apbm_core {apbm_core.__version__}"
    )
    formulas, to_markdown = Formulas(), pdoc.render.env.filters["to_markdown"]

    @pass_context
    def to_markdown_without_formulas(context, docstring: str) -> str:
        return formulas.take_out(_LITERAL_BLOCK.sub(":", to_markdown(context, docstring)))

    pdoc.render.env.filters["to_markdown"] = to_markdown_without_formulas
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        pdoc.pdoc(*modules(), output_directory=folder)
    if problems := [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]:
        sys.exit("\n".join(problems))
    for page in folder.rglob("*.html"):
        methods = "../" * (len(page.relative_to(folder).parts) - 1) + "methods.html"
        text = formulas.put_in(page.read_text())
        page.write_text(_CITATION.sub(rf'<a href="{methods}#\2">methods.md \2</a>\1', text))


def render_text(name: str, folder: Path, names: list[str]) -> None:
    """One of the texts as a page; a heading ``## 3. HRank`` gets the anchor ``3``."""
    formulas = Formulas()
    text = formulas.take_out((DOCS / f"{name}.md").read_text())
    body = formulas.put_in(markdown2.markdown(text, extras=_EXTRAS))
    title = re.search(r"<h1[^>]*>(.*?)</h1>", body)[1]
    body = re.sub(r'<h2 id="[^"]*">(\d+)\. ', r'<h2 id="\1">\1. ', body)
    body = re.sub(r'href="([\w-]+)\.md', r'href="\1.html', body)
    body = re.sub(r'href="\.\./', f'href="{os.path.relpath(ROOT, folder.resolve())}/', body)
    others = "".join(f' &middot; <a href="{other}.html">{other.replace("_", " ")}</a>' for other in names)
    page = _PAGE.format(title=html.escape(re.sub("<.*?>", "", title)), others=others, body=body)
    (folder / f"{name}.html").write_text(page)


def main(folder: Path) -> None:
    """Render everything aside, then put it in the place of what was there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        render_api(aside)
        names = [name for name in TEXTS if (DOCS / f"{name}.md").exists()]
        for name in names:
            render_text(name, aside, names)
        aside.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{folder}/index.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render the API's pages and the texts in docs/.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results/api"))
    main(parser.parse_args().folder)
