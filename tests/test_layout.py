"""How the house is laid out: the method on top imports nothing of the study, and the study's imports run down only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "apbm_core"
TOP = sorted(PACKAGE.glob("*.py"))
STUDY = sorted((PACKAGE / "study").rglob("*.py"))
# Name of a room or a file of the study -> its floor; those on one floor do not import each other.
FLOORS = {
    **{path.stem: 0 for path in PACKAGE.glob("study/*.py") if path.stem != "__init__"},  # they serve every room
    "data": 1,
    "training": 2,
    "networks": 3,  # keeps networks in the training's files
    "records": 4,
    "methods": 5,
    "grid": 6,
    "report": 7,
    "bench": 7,
    "ablation": 8,
    "pages": 9,  # the front page shows the ablation
}


def imported(path: Path) -> Iterator[str]:
    """The dotted names of the package's own modules that a file imports, anywhere in it."""
    package = ["apbm_core", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "apbm_core")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            if module.split(".")[0] == "apbm_core":
                yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", TOP, ids=lambda path: path.stem)
def test_no_file_on_top_imports_the_study(path):
    assert not [name for name in imported(path) if name.startswith("apbm_core.study")]


@pytest.mark.parametrize("room", FLOORS)
def test_the_studys_imports_run_down_only(room):
    files = [path for path in STUDY if path.relative_to(PACKAGE / "study").parts[0].removesuffix(".py") == room]
    assert files, f"there is no room {room}"
    for path in files:
        for name in imported(path):
            parts = name.split(".")
            if parts[:2] == ["apbm_core", "study"] and len(parts) > 2 and parts[2] != room:
                assert FLOORS[parts[2]] < FLOORS[room], f"{path.relative_to(PACKAGE)} imports {name}"


def test_every_room_has_its_floor():
    rooms = {path.relative_to(PACKAGE / "study").parts[0].removesuffix(".py") for path in STUDY} - {"__init__"}
    assert rooms == set(FLOORS)


def test_importing_the_library_loads_the_method_and_nothing_else():
    script = (  # torch-pruning imports timm, and so torchvision, wherever that is installed
        "import sys; sys.modules['timm'] = None; import apbm_core\n"
        "print(*(n for n in sys.modules if n.split('.')[0] == 'apbm_core'));"
        "print(*{n.split('.')[0] for n in sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    ours, others = (set(line.split()) for line in found.stdout.splitlines())
    assert ours <= {f"apbm_core.{path.stem}" for path in TOP} | {"apbm_core"}
    assert not others & {"pandas", "matplotlib", "torchvision", "IPython", "jupyter_core", "sklearn", "pyarrow", "onnx"}
