"""The pages in a real browser, without a network: headless Chromium, where it is installed.

Debian's package is `chromium`; Playwright drives it.
"""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch

from apbm_core.study.methods.variants import VariantSettings
from apbm_core.study.pages import explorer, front, html_page
from apbm_core.study.pages.index import neighbours, write_index
from apbm_core.study.records import read_record
from apbm_core.temperature import AnnealedTau

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: apt-get install chromium")

RESULTS = Path(__file__).parents[3] / "results"
NOTEBOOKS = sorted(path for path in RESULTS.glob("*/[0-9][0-9]_*.ipynb") if path.parts[-2] != "own")
A4_LANDSCAPE = {"width": 1032, "height": 700}  # between margins of 12 mm, in pixels of 1/96 inch


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """A function that opens a file at a width; at the end nothing was asked of a network and nothing complained."""
    complaints, pages = [], []

    def open_file(path: Path, width: int = 1400, **context):
        page = browser.new_page(viewport={"width": width, "height": 900}, **context)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda request: None if re.match("file:|data:", request.url) else complaints.append(request.url)
        )
        page.route(re.compile("^(?!file:|data:)"), lambda route: route.abort())
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_file
    for page in pages:
        page.close()
    assert complaints == []


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


# ---- notebook pages ----

# Of every index in a formula: does its middle stand lower than that of what it belongs to? (Of p and i, in some fonts,
# the lower ends are at the same height.)
INDICES = """[...document.querySelectorAll('msub')].map((node) => [...node.children].map((child) => {
    const box = child.getBoundingClientRect(); return box.top + box.bottom;
})).map((middles) => middles.length === 2 && middles[1] > middles[0])"""
# Of every figure: are letters of 10 points, at 160 dots an inch, at least 6.5 pixels high?
LETTERS = """[...document.images].map((image) => image.clientWidth / image.naturalWidth * 160 / 72 * 10 >= 6.5)"""
# Of every column of numbers: how its head and its cells are aligned.
HEADS = """[...document.querySelectorAll('tbody tr:first-child td.n')].map((cell) =>
    [cell.closest('table').querySelectorAll('thead th')[cell.cellIndex], cell]).map((pair) =>
    pair.map((node) => getComputedStyle(node).textAlign))"""


def is_current(notebook: nbformat.NotebookNode, name: str) -> bool:
    """Whether a rendered notebook has the cells that its source has now; it is rendered anew later than that."""
    source = nbformat.read(RESULTS.parent / "notebooks" / name, as_version=4)
    folded = [
        [(cell.source, "setup" in cell.metadata.get("tags", [])) for cell in one.cells if cell.source != "" and
         not {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", []))]
        for one in (source, notebook)
    ]  # fmt: skip
    return folded[0] == folded[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parts[-2]}-{path.stem}")
def test_a_notebook_reads_well_offline(opened, tmp_path, path):
    notebook = nbformat.read(path, as_version=4)
    file = tmp_path / "page.html"
    file.write_text(html_page.notebook_page(notebook, path.stem, neighbours(path.parent)))
    for width in (390, 1400):
        page = opened(file, width)
        assert fits(page), f"sideways scroll at {width} pixels"
        words = page.evaluate("document.body.innerText")
        assert not re.search(r"\$[^$\n]+\$", words), "a formula was left as it is typed"
        assert all(page.evaluate("[...document.images].map((image) => image.alt.trim())"))
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert all(page.evaluate(INDICES)), "an index stands on the line"
        assert all(page.evaluate(LETTERS)), "a figure's letters are too small to read"
        assert all(head == cell for head, cell in page.evaluate(HEADS)), "a head does not stand over its numbers"
    if is_current(notebook, path.name):
        tops = page.evaluate("[...document.querySelectorAll('main figure, main .scroll table')].filter((node) => "
                             "node.checkVisibility()).map((node) => node.getBoundingClientRect().top)")  # fmt: skip
        assert not tops or min(tops) < 900
    page.emulate_media(media="print")
    page.set_viewport_size(A4_LANDSCAPE)
    tables = "[...document.querySelectorAll('table')].filter((table) => table.offsetParent)"
    heads = f"{tables}.map((table) => [...table.querySelectorAll('th')]).flat()"
    ends = page.evaluate(f"{heads}.map((cell) => cell.getBoundingClientRect().right)")
    assert all(right <= A4_LANDSCAPE["width"] + 1 for right in ends), "a column is lost in print"


def test_a_profiles_index_shows_its_figures_at_any_width(opened, tmp_path):
    (tmp_path / "figures").mkdir()
    figures = sorted((RESULTS / "quick" / "figures").glob("*.png"))
    for figure in figures:
        shutil.copy(figure, tmp_path / "figures")
    index = write_index(tmp_path, "quick", "A name of code `apbm_core.study.networks.storage.load_compact` and more.")
    for width in (390, 1400):
        page = opened(index, width)
        assert fits(page)
        assert page.evaluate("[...document.images].filter((image) => image.naturalWidth && image.alt).length") == len(
            figures
        )


# ---- the front page ----


@pytest.fixture(scope="module")
def front_page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("results") / "index.html"
    path.write_text(front.page(RESULTS))
    return path


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_front_page_fits_and_can_be_read(opened, front_page, width, scheme):
    page = opened(front_page, width, color_scheme=scheme)
    assert fits(page)
    paper, ink = page.evaluate(
        "(({ backgroundColor, color }) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    brightness = [sum(map(int, re.findall(r"\d+", value)[:3])) for value in (paper, ink)]
    assert abs(brightness[0] - brightness[1]) > 450 and (brightness[0] > brightness[1]) == (scheme == "light")
    letters, right = page.evaluate(
        "(() => { const texts = [...document.querySelectorAll('#findings svg text')];"
        " const boxes = texts.map((text) => text.getBoundingClientRect()).filter((box) => box.width);"
        " return [Math.min(...boxes.map((box) => box.height)), Math.max(...boxes.map((box) => box.right))]; })()"
    )
    assert letters > 12 and right <= width, "the first figure can be read and is whole"


def test_without_scripts_the_findings_are_there(opened, front_page):
    page = opened(front_page, java_script_enabled=False)
    assert page.locator("#findings li").count() >= 3 and page.locator("#findings svg:visible").count() >= 1
    assert page.locator("#board").is_hidden()


def board(page) -> list[list[str]]:
    return page.evaluate(
        "[...document.querySelectorAll('#board tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
    )


def test_the_leaderboard_has_every_record_and_its_numbers(opened, front_page):
    page = opened(front_page)
    page.select_option("#f-profile", "")
    heads = page.evaluate("[...document.querySelectorAll('#board th button')].map((button) => button.dataset.by)")
    rows = [dict(zip(heads, row, strict=True)) for row in board(page)]
    records = [read_record(path) for path in sorted(RESULTS.glob("*/runs/*.json"))]
    assert sorted(row["record"] for row in rows) == sorted(record.id for record in records)
    by_place = {(row["profile"], row["record"]): row for row in rows}
    for path in sorted(RESULTS.glob("*/runs/*.json")):
        record, row = read_record(path), by_place[path.parts[-3], path.stem]
        accuracy = record.val_accuracy if record.test_accuracy is None else record.test_accuracy
        assert row["accuracy"] == f"{100 * accuracy:.2f}" or float(row["accuracy"]) == pytest.approx(
            100 * accuracy, abs=0.0051
        )
        assert row["epochs"] == str(record.config.epochs)


def test_the_table_is_sorted_by_keyboard(opened, front_page):
    page = opened(front_page)
    page.locator('#board button[data-by="minutes"]').focus()
    for down in (True, False):
        page.keyboard.press("Enter")
        minutes = [float(row[6]) for row in board(page)]
        assert minutes == sorted(minutes, reverse=down) and len(set(minutes)) > 1
        assert page.evaluate("document.activeElement.dataset.by") == "minutes"
        state = page.locator("#board th", has=page.locator('[data-by="minutes"]')).get_attribute("aria-sort")
        assert state == ("descending" if down else "ascending")


def test_a_mark_that_gets_the_focus_tells_of_its_run_and_its_row(opened, front_page):
    page = opened(front_page)
    mark = page.locator("#chart circle").first
    mark.focus()
    key = mark.get_attribute("data-id")
    row = page.locator(f'#board tr[data-id="{key}"]')
    assert "on" in row.get_attribute("class") and row.get_attribute("data-run") in page.locator("#detail").inner_text()
    assert page.locator("#detail a").get_attribute("href").endswith(".json")


def test_times_of_different_machines_are_never_in_one_picture(opened, front_page):
    page = opened(front_page)
    page.select_option("#f-profile", "")
    page.select_option("#axis", "minutes")
    data = json.loads(page.locator("#runs").text_content())
    at = data["columns"].index("machine")
    machine = {row[0]: data["words"]["machine"][row[at]] for row in data["rows"]}
    choices = page.evaluate("[...document.querySelectorAll('#machine option')].map((option) => option.value)")
    assert len(choices) > 1
    for choice in choices:
        page.select_option("#machine", choice)
        keys = page.evaluate("[...document.querySelectorAll('#chart circle')].map((mark) => +mark.dataset.id)")
        assert keys and {machine[key] for key in keys} == {choice}


# ---- one layer ----


def layer(n: int = 24) -> torch.Tensor:
    """Filters of which some resemble each other, one is a copy, and none is zero."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, 4, 3, 3, generator=generator)
    weight[n // 2 :] += 0.7 * weight[: n - n // 2]
    return weight


@pytest.fixture(scope="module")
def layer_page(tmp_path_factory) -> Path:
    moments = {"trained": torch.nn.Sequential(torch.nn.Conv2d(4, 24, 3))}
    moments["trained"][0].weight.data = layer()
    path = tmp_path_factory.mktemp("layer") / "layer.html"
    box = explorer.box(explorer.network_layers(moments, ["0"]), "a layer")
    page = html_page.text_page("layer", "# Layer").replace("</main>", f"{box}</main>{explorer.scripts()}")
    path.write_text(page)
    return path


SETTINGS = [
    {"tau": tau, "m": m, "metric": metric, "score": score, "mass": mass}
    for tau, m in ((0.3, 5), (1.0, 12), (2.4, 23), (1.0, 24))
    for metric in ("euclidean", "cosine")
    for score in ("relative-entropy", "entropy", "l1", "order")
    for mass in ("all", "unimportant", "assigned")
    if not (m == 24 and mass == "assigned")  # nothing is left to be assigned
]


def expected(setting: dict) -> dict:
    """The same by the package itself."""
    tau = AnnealedTau(start=setting["tau"], end=setting["tau"])
    options = {name: setting[name] for name in ("metric", "score", "mass")}
    fusion = VariantSettings(schedule=tau, rescale=False, **options).fusion(24, setting["m"]).double()
    weight = layer().double()
    kept = fusion.choose(weight, 0.0)
    report = fusion.rescore(weight, 0.0, reselect=False)
    return {"kept": kept.tolist(), "P": fusion.matrix, "ownShare": report.own_share, "selfMass": report.self_mass,
            "entropy": report.entropy}  # fmt: skip


def test_the_browsers_arithmetic_is_the_packages(opened, layer_page):
    page = opened(layer_page)
    found = page.evaluate(
        "(settings) => { const data = JSON.parse(document.querySelector('.explorer script').textContent);"
        "const layer = APBM.unpack(data.layers[0].moments.trained);"
        "return settings.map((s) => { const seen = APBM.look(layer, s); return { ...seen, P: [...seen.P] }; }); }",
        SETTINGS,
    )
    for setting, seen in zip(SETTINGS, found, strict=True):
        wanted = expected(setting)
        assert seen["kept"] == wanted["kept"], setting
        assert torch.tensor(seen["P"]).double().view_as(wanted["P"]).sub(wanted["P"]).abs().max() < 1e-5, setting
        for name in ("ownShare", "selfMass", "entropy"):
            assert seen[name] == pytest.approx(wanted[name], abs=1e-5), (name, setting)


def test_a_slider_moved_by_the_keyboard_redraws_the_layer(opened, layer_page):
    page = opened(layer_page)
    box = page.locator(".explorer")
    assert float(box.get_attribute("data-own-share")) == pytest.approx(
        expected({"tau": 1.0, "m": 12, "metric": "euclidean", "score": "relative-entropy", "mass": "all"})["ownShare"],
        abs=1e-5,
    )
    page.locator('input[name="tau"]').focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.select_option('select[name="mass"]', "unimportant")
    wanted = expected({"tau": 1.2, "m": 12, "metric": "euclidean", "score": "relative-entropy", "mass": "unimportant"})
    assert float(box.get_attribute("data-own-share")) == pytest.approx(wanted["ownShare"], abs=1e-5)
    assert f"{100 * wanted['ownShare']:.1f} %" in box.locator(".said").inner_text()
    assert page.locator("rect.kept").count() == 12
