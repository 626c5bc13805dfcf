"""Environments that hold this project's wheel, what one of its extras declares, and nothing else.

The packages are those that are installed already, linked one by one: a second torch would take gigabytes and minutes.
Which ones belong follows from their own metadata, as pip would follow it.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NAME = "apbm-core"


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, so that nothing is left beside them."""
    source = folder / "source"
    shutil.copytree(ROOT / "apbm_core", source / "apbm_core", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path, extras: Iterable[str] = ()) -> Path:
    """A virtual environment with the wheel and the packages that it and ``extras`` lead to; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in needed([Requirement(f"{NAME}[{','.join(extras)}]")], packages) - {NAME}:
        _link(importlib.metadata.distribution(name), packages)
    return python


def needed(requirements: list[Requirement], packages: Path) -> set[str]:
    """The names that ``requirements`` lead to on this machine; this project's own metadata is read in ``packages``."""
    seen, waiting = {}, list(requirements)
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        if extras <= seen.get(name, set()):
            continue
        seen.setdefault(name, set()).update(extras)
        if name == NAME:
            (distribution,) = importlib.metadata.distributions(name=name, path=[str(packages)])
        else:
            distribution = importlib.metadata.distribution(name)
        for other in map(Requirement, distribution.requires or []):
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(other)
    return set(seen)


def _link(distribution: importlib.metadata.Distribution, packages: Path) -> None:
    site = Path(distribution.locate_file("")).resolve()
    for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        target = packages / top
        if not target.exists():  # several packages share a folder, such as nvidia/
            os.symlink(site / top, target)


def run(python: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run an environment's Python away from the sources, with none of this environment's variables for Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [python, *arguments], cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=300
    )


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
