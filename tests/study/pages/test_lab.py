"""What `make lab` puts before a reader: links that lead somewhere, copies that are theirs."""

import asyncio
import re
from pathlib import Path

import pytest

from apbm_core.study.pages import lab

ROOT = Path(__file__).parents[3]


def test_every_link_of_the_welcome_page_leads_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", lab.welcome(ROOT))
    notebooks = [link for link in links if "/" not in link]
    assert {f"{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} == set(notebooks)
    for link in links:
        path = ROOT / "notebooks" / link if link in notebooks else ROOT / lab.MY / link
        assert path.resolve().is_file(), link
        assert path.suffix in (".ipynb", ".md"), "Lab shows no page of HTML with its links"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "notebooks/profiles").mkdir(parents=True)
    for name in ("01_method", "explore"):
        (tmp_path / f"notebooks/{name}.ipynb").write_bytes((ROOT / f"notebooks/{name}.ipynb").read_bytes())
    return tmp_path


def test_copies_are_made_once_and_the_readers_changes_stay(root):
    assert lab.prepare(root) == (["01_method.ipynb", "explore.ipynb"], [])
    mine = root / lab.MY / "explore.ipynb"
    assert mine.read_bytes() == (root / "notebooks/explore.ipynb").read_bytes()
    mine.write_text("mine")
    assert lab.prepare(root) == ([], ["explore.ipynb"])
    assert mine.read_text() == "mine" and (root / lab.MY / lab.WELCOME).read_text().startswith("# Welcome")


def test_lab_saves_over_no_published_result_and_everything_else(root):
    files = lab.Files(root_dir=str(root))
    for folder, kept in (("results/quick", True), ("results/own/quick", False), (lab.MY, False), ("resultsx", False)):
        (root / folder).mkdir(parents=True)
        (root / folder / "page.md").write_text("text")
        for path in (f"{folder}/page.md", f"/{folder}/page.md"):
            assert asyncio.run(files.get(path, content=False))["writable"] != kept, path


def test_git_ignores_the_copies():
    assert "/my/" in (ROOT / ".gitignore").read_text().splitlines()
