"""What is imported is declared, what is declared is used, and the wheel works where nothing else is installed."""

import ast
import importlib.metadata
import json
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import bare
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import apbm_core

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Declared, but not imported under its name: who uses it.
USED_OTHERWISE = {
    "ipykernel": "runs the notebooks",
    "ipywidgets": "draws tqdm's bars and the sliders of explore.ipynb",
    "jupyterlab": "make lab",
    "onnx": "torch.onnx",
    "playwright": "the tests in a browser, which are skipped without one",
    "pytest-xdist": "make test",
    "ruff": "make lint",
    "setuptools": "builds the wheel without a network",
}
# Rooms of the study whose modules may need Jupyter to be imported; the others must not.
WITH_JUPYTER = ("apbm_core/study/report/", "apbm_core/study/ablation/", "apbm_core/study/pages/")


def declared(*extras: str) -> set[str]:
    """The distributions that the core and some extras name, an extra that names another one included."""
    lines = list(PROJECT["dependencies"]) + sum((PROJECT["optional-dependencies"][extra] for extra in extras), [])
    names = set()
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        names |= declared(*requirement.extras) if name == canonicalize_name(PROJECT["name"]) else {name}
    return names


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(top-level name, whether importing the module needs it) for every absolute import of a foreign package."""
    tree = ast.parse(source)
    deferred = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in {name.partition(".")[0] for name in names}:
            if name not in sys.stdlib_module_names and name != "apbm_core":
                yield name, id(node) not in deferred


def allowed(path: str) -> tuple[set[str], set[str]]:
    """What a file may import at once, and what only inside a function (where its absence can be explained)."""
    everything = declared(*PROJECT["optional-dependencies"])
    if path.startswith(("tests/", "docs/")):
        return everything, everything
    if path.startswith("apbm_core/study/"):
        at_once = declared("study", *(["notebooks"] if path.startswith(WITH_JUPYTER) else []))
        return at_once, everything - declared("dev") | at_once
    if path.startswith("apbm_core/"):
        return declared(), declared("onnx", "study")
    return declared("study", "notebooks", "onnx"), declared("study", "notebooks", "onnx")  # notebooks, examples


def sources() -> dict[str, str]:
    found = {}
    for folder in ("apbm_core", "tests", "examples", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            found[path.relative_to(ROOT).as_posix()] = path.read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        found[path.relative_to(ROOT).as_posix()] = "\n".join("".join(cell["source"]) for cell in cells)
    return found


def test_what_is_imported_is_declared_for_where_it_is_imported():
    distributions = importlib.metadata.packages_distributions()
    own = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    wrong, used = [], set()
    for path, source in sources().items():
        at_once, later = allowed(path)
        for name, is_needed in imports(source):
            if path.startswith("tests/") and name in own:
                continue
            provided_by = {canonicalize_name(d) for d in distributions.get(name, [name])}
            used |= provided_by
            if not provided_by & (at_once if is_needed else later):
                wrong.append(f"{path} imports {name}{'' if is_needed else ' in a function'}")
    assert not wrong, "\n".join(wrong)
    unused = declared(*PROJECT["optional-dependencies"]) - used - set(USED_OTHERWISE)
    assert unused <= declared("cluster") if "cluster" in PROJECT["optional-dependencies"] else not unused


def test_an_import_is_found_wherever_it_stands():
    found = set(imports("import numpy.linalg\ndef f():\n    from scipy import stats\nif f:\n    import pandas as pd"))
    assert found == {("numpy", True), ("scipy", False), ("pandas", True)}


def test_version_is_said_once_and_has_its_change_noted():
    assert "version" not in PROJECT and Version(apbm_core.__version__)
    assert re.search(rf"^## {re.escape(apbm_core.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


# Runs in an environment with the core alone; the network has a residual sum and a bottleneck without any torchvision.
USE_THE_CORE = """
import importlib.util, sys, torch
others = "pandas matplotlib scipy sklearn torchvision IPython jupyter_client nbformat papermill pytest"
assert not [name for name in others.split() if importlib.util.find_spec(name)]
from torch import nn
import apbm_core
assert "site-packages" in apbm_core.__file__, apbm_core.__file__
assert not [name for name in sys.modules if name.startswith("apbm_core.study")]

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.inner(x)).mean((2, 3)))

torch.manual_seed(0)
images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
slim = apbm_core.fuse(Residual(), images, keep=0.5)
optimizer = torch.optim.SGD(slim.parameters(), lr=0.1, momentum=0.9)
losses = []
for epoch in range(8):
    apbm_core.rescore(slim, progress=epoch / 8)
    apbm_core.collapse(slim, optimizer)
    loss = nn.functional.cross_entropy(slim(images), labels)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
net = apbm_core.compact(slim)
slim.eval(), net.eval()
assert losses[-1] < losses[0], losses
assert net.inner[0].weight.shape == (8, 4, 3, 3) and type(net.inner[0]).__name__ == "Conv2d"
torch.testing.assert_close(net(images), slim(images))
print("version", apbm_core.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return bare.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path for path in (ROOT / "apbm_core").rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    assert {name for name in names if name.startswith("apbm_core/")} == {
        path.relative_to(ROOT).as_posix() for path in files
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.name.startswith(f"apbm_core-{apbm_core.__version__}-py3-none-any")


@pytest.mark.slow
def test_core_alone_compresses_a_network(wheel, tmp_path):
    python = bare.make_environment(tmp_path / "bare", wheel)
    done = bare.run(python, "-I", "-W", "error::DeprecationWarning:apbm_core", "-c", USE_THE_CORE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"version {apbm_core.__version__}\n"


@pytest.mark.slow
def test_study_runs_and_merges_without_jupyter(wheel, tmp_path):
    """`python -m apbm_core.study.grid` with the extra [study] alone, as on a machine of a cluster."""
    python = bare.make_environment(tmp_path / "study", wheel, ["study"])
    profiles = tmp_path / "notebooks" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "tiny.yaml").write_text(
        "dataset: digits\nmodels: [resnet20]\nmethods: [scratch]\ntargets: {resnet20: [0.5]}\nepochs: 1\n"
        "train_subset: 20\ntest_subset: 20\nrecipe_overrides: {batch_size: 5, precision: float32, lowering: off}\n"
        "device: cpu\nworkers: 1\n"
    )
    check = "import importlib.util as u; print([n for n in ('IPython', 'nbformat', 'papermill') if u.find_spec(n)])"
    assert bare.run(python, "-c", check, cwd=tmp_path).stdout == "[]\n"
    done = bare.run(python, "-m", "apbm_core.study.grid", "--profile", "tiny", "--results", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "All 1 runs are recorded" in done.stdout
    merged = bare.run(python, "-m", "apbm_core.study.grid", "merge", "elsewhere", "results/tiny", cwd=tmp_path)
    assert merged.returncode == 0 and "1 records added" in merged.stdout, merged.stderr
