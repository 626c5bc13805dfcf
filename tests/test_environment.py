"""The lock file, environment.yml, pyproject.toml and the Makefile agree with each other and with what is installed."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import setuptools
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from apbm_core.study.pages.runner import parse

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINUX = {**default_environment(), "platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64"}
MACOS = {**default_environment(), "platform_system": "Darwin", "sys_platform": "darwin", "platform_machine": "arm64"}


def by_name(lines) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


LOCK_LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCK = by_name(LOCK_LINES)
# A cluster's packages are installed by who has one (`make setup-cluster`), so they are not locked.
EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "cluster"}
DIRECT = by_name([*PROJECT["dependencies"], *sum(EXTRAS.values(), [])])
DIRECT.pop(canonicalize_name(PROJECT["name"]))  # an extra that includes another one


def pin(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, str(requirement)
    return specifier.version


def dependencies(name: str, environment: dict[str, str], extras=("",)) -> set[str]:
    """The names that an installed package needs on a platform, from its own metadata."""
    requirements = map(Requirement, importlib.metadata.requires(name) or [])
    return {
        canonicalize_name(r.name)
        for r in requirements
        if r.marker is None or any(r.marker.evaluate({**environment, "extra": extra}) for extra in extras)
    }


def test_lock_pins_every_package_and_names_no_host_or_path():
    assert len(LOCK) == len(LOCK_LINES) > 100
    for line in LOCK_LINES:
        pin(Requirement(line))
        assert re.fullmatch(r'[\w.-]+==[\w.]+( ; platform_system == "Linux" and platform_machine == "x86_64")?', line)


def test_lock_satisfies_every_direct_dependency():
    for name, requirement in DIRECT.items():
        assert requirement.specifier.contains(pin(LOCK[name])), name


def test_lock_is_complete_for_what_is_installed():
    """Following the installed packages' own metadata from the direct dependencies leads to locked packages only."""
    seen, waiting = set(), set(DIRECT)
    while waiting:
        name = waiting.pop()
        assert name in LOCK, f"{name} is needed but not locked; run make lock"
        seen.add(name)
        waiting |= dependencies(name, default_environment()) - seen
    assert len(seen) > 100


def test_locked_versions_are_installed():
    wanted = {n: pin(r) for n, r in LOCK.items() if r.marker is None or r.marker.evaluate()}
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in wanted}
    assert installed == wanted


def test_what_torch_needs_on_linux_alone_is_not_locked_elsewhere():
    linux_only = dependencies("torch", LINUX) - dependencies("torch", MACOS)
    assert {"triton", "nvidia-cudnn-cu13"} <= linux_only
    assert {name for name, requirement in LOCK.items() if requirement.marker} >= linux_only
    for name, requirement in LOCK.items():
        if requirement.marker:
            assert requirement.marker.evaluate(LINUX) and not requirement.marker.evaluate(MACOS), name
            assert name in linux_only or name.startswith(("nvidia-", "cuda-")), name


def test_conda_environment_has_the_direct_dependencies_at_the_locked_versions():
    entries = YAML(typ="safe").load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    packages = {name: pin(requirement) for name, requirement in by_name(p for p in pip if p[0] != "-").items()}
    assert packages == {name: pin(LOCK[name]) for name in DIRECT}
    assert [entry for entry in pip if entry[0] == "-"] == ["--editable ."]
    (python,) = [entry.removeprefix("python=") for entry in entries if str(entry).startswith("python=")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(f"{python}.0")


def test_wheel_holds_every_package_folder():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("apbm_core/**/*.py")}
    assert set(setuptools.find_packages(ROOT, include=settings["include"])) == found


def make(*arguments: str) -> subprocess.CompletedProcess:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    }
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def runners_options(*arguments: str):
    """What the last command that make would give to the runner asks for."""
    lines = make("--dry-run", *arguments).stdout.splitlines()
    command = [line for line in lines if "-m apbm_core.study.pages.runner" in line][-1]
    return parse(shlex.split(command.partition(" || ")[0])[3:])


def test_make_help_has_a_line_for_every_target():
    lines = make("help").stdout.splitlines()
    targets = {line.split()[1]: line.split(maxsplit=2)[2] for line in lines}
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(targets) == set(phony)
    assert {"setup", "reproduce", "test", "lint", "bench", "lab", "report", "clean"} <= set(targets)
    assert all(len(line) < 120 for line in lines)


@pytest.mark.parametrize("assignment", ["PROFIL=smoke", "EPOCHS=3"])
def test_make_refuses_unknown_variables(assignment):
    result = make("reproduce", assignment)
    assert result.returncode != 0
    assert f"no variable {assignment.split('=')[0]}" in result.stderr and "PROFILE" in result.stderr


def test_make_passes_parameters_on():
    parameters = "PARAMS=seeds=[0,1] 'targets={vgg16: [0.9]}' -p epochs=3"
    options = runners_options("reproduce", "PROFILE=cpu", parameters, "ONLY=02_train 03_prune", "RESULTS=x y")
    assert (options.command, options.profile, options.results) == ("run", "cpu", "x y")
    assert options.only == ["02_train", "03_prune"]
    assert sorted(options.assignments + options.more) == ["epochs=3", "seeds=[0,1]", "targets={vgg16: [0.9]}"]


@pytest.mark.parametrize(("target", "folder"), [("reproduce", "results/own"), ("report", "results")])
def test_make_trains_into_the_readers_own_results_and_reports_on_the_published(target, folder):
    options = runners_options(target)
    assert (options.profile, options.results) == ("quick", folder)


def test_make_setup_refuses_an_old_python(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\nexec python3 -c "import sys; sys.version_info = (3, 9, 1); $2"\n')
    old.chmod(0o755)
    result = make("-f", str(ROOT / "Makefile"), f"--directory={tmp_path}", "setup", f"PYTHON={old}")
    assert "No rule" in result.stderr  # without the lock file there is nothing to set up
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    result = make("-f", str(ROOT / "Makefile"), f"--directory={tmp_path}", "setup", f"PYTHON={old}")
    assert result.returncode != 0 and not (tmp_path / ".venv").exists()
    assert f"{old} is Python 3.9, but 3.11 or newer is needed" in result.stderr
