"""The notebooks of the study as sources: their parameters cell, which of them a profile shows, and whether they are
clean.

A notebook of the study is `notebooks/<nn>_<name>.ipynb`; its cell tagged `parameters` assigns three literals,
`profile`, `results` and `changes`, which the runner sets.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat

from apbm_core.errors import ConfigError
from apbm_core.study.grid.profiles import (
    choices,
    first_line,
    lay_over,
    load_profile,
    parse_assignments,
    profile_names,
)
from apbm_core.study.records import OWN, PUBLISHED_RESULTS

CELL = ("profile", "results", "changes")
"""What the parameters cell of every notebook of the study assigns."""


@dataclass(frozen=True)
class Source:
    """A notebook under notebooks/."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def notebook(self) -> nbformat.NotebookNode:
        """The notebook in nbformat 4. Raises ConfigError if the file is not one."""
        try:
            notebook = nbformat.read(self.path, as_version=4)
            nbformat.validate(notebook)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, nbformat.ValidationError) as error:
            raise ConfigError(f"{self.path.name} is not a readable notebook ({first_line(error)}).") from error
        return notebook

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """What the parameters cell assigns, in order.

        Raises:
            ConfigError: not exactly one code cell is tagged `parameters`, or it holds more than literal assignments.
        """
        cells = [cell for cell in self.notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        if len(cells) != 1 or cells[0].cell_type != "code":
            raise ConfigError(f"{self.path.name} needs exactly one code cell tagged `parameters`; it has {len(cells)}.")
        return _literal_assignments(cells[0].source, self.path.name)


@dataclass(frozen=True)
class Reproduction:
    """A profile, what was changed in it, and the notebooks that show it."""

    root: Path
    profile: str
    description: str
    results: Path
    notebooks: tuple[Source, ...]
    changes: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything goes: <results>/<profile>."""
        return self.results / self.profile

    @property
    def published(self) -> Path:
        """Where the committed records of this profile are, if there are any."""
        return self.root / PUBLISHED_RESULTS / self.profile

    def parameters(self) -> dict[str, Any]:
        """The parameters to inject into a notebook."""
        return {"profile": self.profile, "results": self.displayed(self.results), "changes": dict(self.changes)}

    def displayed(self, path: Path) -> str:
        """``path`` as it is shown to the user: relative to the repository, where it lies inside."""
        return displayed(path, self.root)


def prepare(
    root: Path,
    profile: str = "quick",
    results: str | Path = OWN,
    assignments: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Reproduction:
    """Check everything that can be checked before a notebook starts.

    Args:
        root: the repository.
        profile: a file name in notebooks/profiles, without its ending.
        results: the folder for all results; a relative one is under ``root``.
        assignments: `name=value` strings that override the profile.
        only: names of the notebooks to run; the profile's if empty.

    Raises:
        ConfigError: an unknown profile, notebook or parameter, or a value that StudyParameters refuses.
    """
    everything = study_notebooks(root)
    chosen = select(everything, only)
    settings = load_profile(root, profile)
    shown = select(everything, settings.notebooks)
    changes = parse_assignments(assignments)
    lay_over(settings, changes)
    return Reproduction(root, profile, settings.description, root / results, chosen if only else shown, changes)


def study_notebooks(root: Path) -> tuple[Source, ...]:
    """The notebooks that make up the study, in the order of their numbers. Raises ConfigError if there are none."""
    sources = tuple(Source(path) for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")))
    if not sources:
        raise ConfigError(f"{root / 'notebooks'} holds no notebook of the study, named like 01_method.ipynb.")
    return sources


def select(sources: Sequence[Source], only: Sequence[str]) -> tuple[Source, ...]:
    """The sources named in ``only``, all of them if it is empty. Raises ConfigError for a name that is none of them."""
    names = [source.name for source in sources]
    for name in only:
        if name not in names:
            raise ConfigError(f"there is no notebook {name!r}{choices(name, names)}")
    return tuple(source for source in sources if not only or source.name in only)


def displayed(path: Path, root: Path) -> str:
    """``path`` relative to the repository where it lies inside: shorter, and the same on every machine."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def check_sources(root: Path) -> list[str]:
    """What is wrong with the notebooks and profiles in the repository, a sentence each; empty if nothing is.

    A source carries no outputs and no execution counts; its parameters cell assigns literals, and those of the study
    assign nothing but profile, results and changes; a profile sets parameters that the study has, and to values it
    takes.
    """
    paths = sorted((root / "notebooks").glob("*.ipynb"))
    problems = [] if paths else [f"{root / 'notebooks'} holds no notebooks."]
    for source in map(Source, paths):
        try:
            problems += _leftovers(source)
            names = list(source.defaults)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if source.name[:2].isdigit() and names != list(CELL):
            problems.append(
                f"{source.path.name}: the parameters cell must assign {', '.join(CELL)} and nothing else, for the "
                f"study's parameters are said once, in its profile; it assigns {', '.join(names)}."
            )
    for name in profile_names(root) if paths else ():
        try:
            prepare(root, name)
        except ConfigError as error:
            problems.append(f"profile {name}: {error}")
    return problems


def _leftovers(source: Source) -> list[str]:
    """What an execution left behind in a source notebook."""
    cells = list(enumerate(source.notebook.cells, start=1))
    dirty = [str(i) for i, cell in cells if cell.get("outputs") or cell.get("execution_count") is not None]
    injected = [str(i) for i, cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    problems = []
    if dirty:
        problems.append(f"{source.path.name}: cells {', '.join(dirty)} carry outputs or execution counts; clear them.")
    if injected:
        problems.append(f"{source.path.name}: cell {injected[0]} was injected by a run; delete it.")
    if not source.notebook.metadata.get("kernelspec"):
        problems.append(f"{source.path.name}: the metadata name no kernel; save it once with a Python 3 kernel.")
    return problems


def _literal_assignments(code: str, where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(code).body:
            targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
            assigns = isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None
            if not assigns or len(targets) != 1 or not isinstance(targets[0], ast.Name):
                raise ValueError(f"line {statement.lineno} is not of the form name = value")
            if targets[0].id in values:
                raise ValueError(f"{targets[0].id} is assigned twice")
            values[targets[0].id] = ast.literal_eval(statement.value)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: the parameters cell may only assign literals, like epochs = 3 ({first_line(error)}). "
            "Derived values belong in the next cell, where they follow the parameters."
        ) from error
    return values
