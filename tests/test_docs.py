"""docs/methods.md says what the code does, and the rendered pages show docstrings, formulas and links as meant."""

import html
import importlib.util
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from apbm_core.fusion import FilterFusion, FusionSettings
from apbm_core.study.networks.models import build_model
from apbm_core.study.networks.published_widths import PUBLISHED_WIDTHS

ROOT = Path(__file__).parents[1]
METHODS = (ROOT / "docs" / "methods.md").read_text()


def test_every_cited_section_is_there():
    sections = set(re.findall(r"^## (\d)\. ", METHODS, re.MULTILINE))
    cited = {}
    for folder in ("apbm_core", "tests", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            for number in re.findall(r"methods\.md (\d)", path.read_text()):
                cited.setdefault(number, path.name)
    assert len(cited) >= 6
    assert {number: path for number, path in cited.items() if number not in sections} == {}


PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text()
    named = re.findall(r"\b(?:apbm_core|notebooks|docs|examples|tests)/[\w/.*-]*\w", text)
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [name for name in named if not any(ROOT.glob(name))] == []
    assert [name for name in linked if not (page.parent / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page):
    """`test_file.py` is a file, `test_name` a test of the file named before it in the line or cell, or of any."""
    tests = {path: re.findall(r"def (test_\w+)", path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    missing = []
    for part in re.split(r"[|\n]", page.read_text()):
        files = list(tests)
        for named in re.findall(r"\btest_\w+(?:\.py\b|\.{3}|\*)?", part):
            there = [test for path in files for test in tests[path]]
            if named.endswith(".py"):
                files = [path for path in tests if path.name == named]
                missing += [] if files else [named]
            elif named[-1] in ".*":  # only how its name begins
                missing += [] if any(test.startswith(named.rstrip(".*")) for test in there) else [named]
            elif named not in there:
                missing.append(named)
    assert not missing


def test_published_counts_are_those_of_the_networks():
    for widths in PUBLISHED_WIDTHS.values():
        assert f"{widths.parameters:,}" in METHODS, widths
        with torch.device("meta"):
            network = build_model(widths.model, widths.num_classes, widths.widths)
        assert sum(parameter.numel() for parameter in network.parameters()) == widths.parameters


def test_training_a_bank_is_training_the_fused_weight_with_a_preconditioned_gradient():
    """methods.md 1: with P fixed, SGD on W is SGD on P W whose gradient is multiplied by K = P P^T."""
    torch.manual_seed(0)
    inputs = torch.randn(16, 3, 6, 6, dtype=torch.float64)
    conv = nn.Conv2d(3, 8, 3, bias=False).double()
    fusion = FilterFusion(8, 4, FusionSettings()).double()
    fusion.rescore(conv.weight, 0.2)
    fused = (fusion.matrix @ conv.weight.detach().flatten(1)).view(4, 3, 3, 3).requires_grad_()
    parametrize.register_parametrization(conv, "weight", fusion, unsafe=True)
    kernel = fusion.matrix @ fusion.matrix.T
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
    bank = torch.optim.SGD([conv.parametrizations.weight.original], **settings)
    slim = torch.optim.SGD([fused], **settings)
    for _ in range(20):
        for optimizer, weight in ((bank, None), (slim, fused)):
            optimizer.zero_grad()
            output = conv(inputs) if weight is None else nn.functional.conv2d(inputs, weight)
            output.tanh().square().mean().backward()
        fused.grad = (kernel @ fused.grad.flatten(1)).view_as(fused)
        bank.step(), slim.step()
    assert (kernel - torch.eye(4)).abs().max() > 0.1
    torch.testing.assert_close(conv.weight.detach(), fused.detach(), rtol=1e-6, atol=1e-9)


# roles and directives of reStructuredText, formulas, literals, LaTeX commands, marks of formulas, Markdown's headings
LEFT_OVER = re.compile(r":\w+:`|\.\. \w+::|\$\$|\\\(|``|\\[a-z]{3,}|[\u27e6\u27e7]|^\s*##+ ", re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    folder = tmp_path_factory.mktemp("site") / "api"
    build.main(folder)
    return folder


@pytest.mark.slow
def test_rendered_pages_show_no_markup(site):
    found = []
    for page in site.rglob("*.html"):
        text = re.sub(r"<(script|style|pre|code|math)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
        found += [f"{page.name}: {text[max(0, m.start() - 30) : m.end() + 30]!r}" for m in LEFT_OVER.finditer(text)]
    assert not found, "\n".join(found)
    assert (site / "methods.html").read_text().count("<math") > 40
    assert "<mtr>" in (site / "apbm_core" / "similarity.html").read_text()


@pytest.mark.slow
def test_rendered_links_lead_somewhere(site):
    dead = []
    for page in site.rglob("*.html"):
        for link in map(html.unescape, re.findall(r'href="([^"]+)"', page.read_text())):
            parts = urlsplit(link)
            if parts.scheme or not parts.path:  # within a page, pdoc links to inherited members that it does not show
                continue
            target = (page.parent / unquote(parts.path)).resolve()
            anchor = f'id="{parts.fragment}"' if parts.fragment else ""
            if not target.exists() or (anchor and anchor not in target.read_text()):
                dead.append(f"{page.name}: {link}")
    assert not dead, "\n".join(sorted(set(dead))[:20])
