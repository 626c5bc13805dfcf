"""JupyterLab as a reader meets it, in headless Chromium: a welcome page that is rendered, without a network."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: apt-get install chromium"),
]
ROOT = Path(__file__).parents[3]
PATIENCE = 300_000  # milliseconds


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a repository of its own; its address."""
    root = tmp_path_factory.mktemp("lab") / "repository"
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from pathlib import Path; from apbm_core.study.pages import lab\n"
    code += "lab.main(sys.argv[2:], Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(root)]
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--IdentityProvider.token=secret",
               "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    variables = os.environ | {"JUPYTER_RUNTIME_DIR": str(root / "runtime"), "JUPYTER_CONFIG_DIR": str(root / "config")}
    with (root / "log").open("w") as log:
        server = subprocess.Popen([*command, *options], env=variables, stderr=log, stdout=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/api?token=secret")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (root / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page(lab):
    asked = []
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        yield page
        browser.close()
    others = [url for url in asked if not url.startswith((lab, "data:", "blob:", lab.replace("http", "ws")))]
    assert not others, "Lab asked something of a network"


def test_the_welcome_page_is_shown_as_a_page(page, lab):
    page.goto(f"{lab}/?token=secret")  # leads to the default page
    page.wait_for_selector(".jp-RenderedMarkdown h1:has-text('Welcome')")
    assert page.locator(".jp-RenderedMarkdown a").count() >= 7
