"""JupyterLab as a reader meets it, in headless Chromium: what `make lab` opens, and what its buttons do to a study.

Without a network. The repository is a copy with a study of a few seconds on scikit-learn's digits.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from apbm_core.study.pages import lab
from apbm_core.study.records import read_record
from apbm_core.study.training.checkpoint import load_checkpoint

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: apt-get install chromium"),
]
ROOT = Path(__file__).parents[3]
PATIENCE = 300  # seconds for anything to come; a busy machine is slow, and waiting for what is there costs nothing
EPOCHS = 8
TINY = f"""
description: one run of {EPOCHS} epochs on digits
notebooks: [02_train]
dataset: digits
models: [resnet20]
methods: [apbm]
targets: {{resnet20: [0.5]}}
epochs: {EPOCHS}
train_subset: 512
test_subset: 100
recipe_overrides: {{batch_size: 64}}
workers: 1
device: cpu
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A repository with the notebooks, the trained networks, the profile `tiny` and one page of `quick` to read."""
    root = tmp_path_factory.mktemp("lab") / "repository"
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    (root / "notebooks/profiles/tiny.yaml").write_text(TINY)
    shutil.copytree(ROOT / "results/trained", root / "results/trained")
    (root / "results/quick").mkdir(parents=True)
    rendered = nbformat.read(ROOT / "results/quick/04_compare.ipynb", as_version=4)
    rendered.cells = [nbformat.v4.new_markdown_cell("# A page that was rendered")]
    nbformat.write(rendered, root / "results/quick/04_compare.ipynb")
    (root / "README.md").write_text("# The words in front\n")
    return root


@pytest.fixture(scope="module")
def address(root) -> str:
    """JupyterLab as `make lab` starts it, on that repository."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from pathlib import Path; from apbm_core.study.pages import lab\n"
    code += "lab.main(sys.argv[2:], Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(root)]
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--IdentityProvider.token=secret",
               "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR"):
        variables[name] = str(root / ".jupyter" / name)
    with (root / "log").open("w") as log:
        server = subprocess.Popen([*command, *options], env=variables, stderr=log, stdout=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: server.poll() is not None or answers(f"{address}/api?token=secret"), "JupyterLab to answer")
        assert server.poll() is None, (root / "log").read_text()
        yield address
    finally:
        server.terminate()
        server.wait(60)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url)
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def page(address):
    """The browser on the address that JupyterLab opens by itself; at the end nothing was asked of a network."""
    asked = []
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 6000})  # Lab leaves out cells that are out of view
        page.set_default_timeout(1000 * PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/?token=secret")
        yield page
        browser.close()
    others = [url for url in asked if not url.startswith((address, "data:", "blob:", address.replace("http", "ws")))]
    assert not others, "Lab asked something of a network"


def follow(page, words: str) -> None:
    """Click a link of the welcome page."""
    page.click(f".lm-TabBar-tabLabel:text-is('{lab.WELCOME}')")
    page.click(f".jp-MarkdownViewer a:has-text('{words}')")


class Notebook:
    """The notebook that is in front, its kernel ready."""

    def __init__(self, page, name: str):
        self.page = page
        page.wait_for_selector(f".lm-TabBar-tab.lm-mod-current.jp-mod-current:has-text('{name}')")
        self.panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        self.wait_for_kernel()

    def wait_for_kernel(self) -> None:
        self.page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'")

    def write(self, cell: int, text: str) -> None:
        """Replace the source of a cell, as by hand."""
        self.panel.locator(".jp-Cell").nth(cell).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(text)

    def start(self) -> None:
        """Run > Run All Cells; ``window.ran`` is what comes of it."""
        self.page.evaluate("() => { window.ran = jupyterapp.commands.execute('notebook:run-all-cells'); }")

    def finish(self) -> None:
        self.page.evaluate("window.ran")
        self.wait_for_kernel()

    def errors(self) -> list[str]:
        """What stands on red: errors, and whatever else was printed to the standard error output."""
        return self.panel.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()


# ---- the welcome page ----


def test_the_welcome_page_is_shown_as_a_page(page):
    page.wait_for_selector(".jp-RenderedMarkdown h1:has-text('Welcome')")
    links = page.locator(".jp-RenderedMarkdown a:not(.jp-InternalAnchorLink)")
    assert links.count() == len(list((ROOT / "notebooks").glob("*.ipynb"))) + 2


def test_its_links_open_what_they_name(page):
    for words, title in (("04_compare", "A page that was rendered"), ("What was found", "The words in front")):
        follow(page, words)
        page.wait_for_selector(f"h1:has-text('{title}')")  # to be visible


def test_a_published_page_that_is_opened_stays_as_it_was(page, root):
    path = root / "results/quick/04_compare.ipynb"
    before = path.read_bytes()
    follow(page, "04_compare")
    Notebook(page, path.name)  # once its kernel is ready, Lab would write down which Python it is
    page.evaluate("jupyterapp.commands.execute('docmanager:save-all')")
    page.wait_for_selector("text=notebook is read-only")
    assert path.read_bytes() == before


# ---- explore ----


def test_explore_runs_as_it_is_and_its_sliders_redraw_the_layers(page, root):
    follow(page, "Explore")
    notebook = Notebook(page, "explore.ipynb")
    notebook.start()
    notebook.finish()
    assert notebook.errors() == []
    boxes = notebook.panel.locator(".explorer")
    assert boxes.count() == 2
    for box in (boxes.nth(0), boxes.nth(1)):
        kept, share = box.locator("rect.kept").count(), box.get_attribute("data-own-share")
        assert kept > 0 and 0 < float(share) < 1
        box.locator('input[name="tau"]').focus()
        page.keyboard.press("ArrowRight")
        sync_api.expect(box).not_to_have_attribute("data-own-share", share)
        assert box.locator("rect.kept").count() == kept
    source = nbformat.read(root / "notebooks/explore.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in source.cells), "the reader's copy is run, and not the source"


# ---- a study ----


@pytest.fixture(scope="module")
def study(page) -> Notebook:
    follow(page, "02 Training")
    return Notebook(page, "02_train.ipynb")


def parameters(changes: str) -> str:
    return f'profile = "tiny"\nresults = "results/own"\nchanges = {changes}'


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("{'epoch': 3}", ["'epoch'", "did you mean epochs?"]),
        ("{'epochs': 0, 'workers': -1, 'seeds': []}", ["epochs = 0", "workers = -1", "seeds = []"]),
    ],
)
def test_a_wrong_parameter_is_named_in_a_few_lines_and_nothing_runs(study, root, changes, words):
    study.write(1, parameters(changes))
    study.start()
    study.finish()
    (error,) = study.errors()
    assert len(error.strip().splitlines()) <= 5 and "Traceback" not in error and "ConfigError" in error
    assert all(word in error for word in words)
    assert not (root / "results/own/tiny/runs").exists()


def test_what_was_interrupted_goes_on_when_it_is_run_again(study, root):
    results = root / "results/own/tiny"
    study.write(1, parameters("{}"))
    study.start()
    wait_until(lambda: any(results.glob("work/*/*.ckpt")), "the first epoch to be saved")
    study.panel.locator("[data-jp-item-name='interrupt']").click()
    study.finish()
    (error,) = study.errors()
    assert "Run this cell again, and it goes on from the last checkpoint" in error and "Traceback" not in error
    assert len(error.strip().splitlines()) <= 5 and not any(results.glob("runs/*.json"))

    (checkpoint,) = results.glob("work/*/*.ckpt")
    identity = json.loads(checkpoint.read_bytes().split(b"\n", 1)[0].split(b" ", 3)[3])
    before = load_checkpoint(checkpoint, identity)["history"]
    assert 0 < len(before) < EPOCHS

    study.start()
    study.finish()
    assert study.errors() == []
    (path,) = results.glob("runs/*.json")
    after = read_record(path).history
    assert len(after) == EPOCHS
    seconds = [[row["seconds"] for row in history] for history in (before, after)]
    assert seconds[1][: len(before)] == seconds[0], "epochs that were done were trained again"  # no two take as long
    assert study.panel.locator(".jp-RenderedImage img").count() == 2
