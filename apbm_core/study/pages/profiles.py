"""What a study is asked to do: the profiles, `name=value` assignments, and the notebooks' parameters cells.

A profile is a YAML file `notebooks/profiles/<name>.yaml`: a flat mapping of parameter names to values, with an optional
`description`. A notebook of the study is `notebooks/<nn>_<name>.ipynb`; its cell tagged `parameters` assigns literals
only, `profile` and `results` first, and so declares which parameters it takes and what they are by default.
"""

import ast
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat
import yaml

from apbm_core.errors import ConfigError
from apbm_core.study.grid import grid
from apbm_core.study.records import OWN, PUBLISHED

RUNNER_PARAMETERS = ("profile", "results")
"""Declared by every notebook and set by the runner alone, from `--profile` and `--results`."""


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
            raise ConfigError(f"{self.path.name} is not a readable notebook ({_first_line(error)}).") from error
        return notebook

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The parameters that the notebook declares, in order, with their default values.

        Read from the syntax tree rather than with papermill's inspection, which returns defaults as text and drops
        every line that holds a second equals sign.

        Raises:
            ConfigError: not exactly one code cell is tagged `parameters`, or it holds more than literal assignments.
        """
        cells = [cell for cell in self.notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        if len(cells) != 1 or cells[0].cell_type != "code":
            raise ConfigError(f"{self.path.name} needs exactly one code cell tagged `parameters`; it has {len(cells)}.")
        return _literal_assignments(cells[0].source, self.path.name)


@dataclass(frozen=True)
class Profile:
    """A named set of parameter values."""

    name: str
    description: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """Checked parameters and the notebooks to run with them."""

    root: Path
    profile: str
    description: str
    results: Path
    notebooks: tuple[Source, ...]
    values: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything goes: <results>/<profile>."""
        return self.results / self.profile

    @property
    def published(self) -> Path:
        """Where the committed records of this profile are, if there are any."""
        return self.root / PUBLISHED / self.profile

    def parameters_for(self, source: Source) -> dict[str, Any]:
        """The parameters to inject into a notebook: those of this study that it declares."""
        given = {"profile": self.profile, "results": displayed(self.results, self.root), **self.values}
        return {name: value for name, value in given.items() if name in source.defaults}


def prepare(
    root: Path,
    profile: str = "quick",
    results: str | Path = OWN,
    assignments: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Study:
    """Check everything that can be checked before a notebook starts.

    Args:
        root: the repository.
        profile: a file name in notebooks/profiles, without its ending.
        results: the folder for all results; a relative one is under ``root``.
        assignments: `name=value` strings that override the profile.
        only: names of the notebooks to run; all if empty.

    Raises:
        ConfigError: an unknown profile, notebook or parameter, or a value that StudyParameters refuses.
    """
    everything = study_notebooks(root)
    chosen = select(everything, only)
    settings = load_profile(root, profile)
    overrides = parse_assignments(assignments)
    defaults = {name: value for source in everything for name, value in source.defaults.items()}
    require_declared(settings.values, list(defaults), f"profile {profile} is wrong: the study")
    declared = dict.fromkeys(name for source in chosen for name in source.defaults)
    require_declared(overrides, list(declared), " and ".join(only) or "the study")

    values = {**settings.values, **overrides}
    checked = {name: value for name, value in defaults.items() if name not in RUNNER_PARAMETERS}
    grid.StudyParameters.parse({**checked, **values})
    return Study(root, profile, settings.description, root / results, chosen, values)


def study_notebooks(root: Path) -> tuple[Source, ...]:
    """The notebooks that make up the study, in the order of their numbers. Raises ConfigError if there are none."""
    sources = tuple(Source(path) for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")))
    if not sources:
        raise ConfigError(f"{root / 'notebooks'} holds no notebook of the study, named like 01_method.ipynb.")
    return sources


def load_profile(root: Path, name: str) -> Profile:
    """Read `notebooks/profiles/<name>.yaml`. Raises ConfigError if it is missing, or no mapping of names to values."""
    folder = root / "notebooks" / "profiles"
    if name == Path(OWN).name:
        raise ConfigError(f"no profile can be called {name!r}, for {OWN} holds the reader's own results.")
    known = profile_names(root)
    if name not in known:
        raise ConfigError(f"there is no profile {name!r}{_choices(name, known)}")
    try:
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"profile {name} cannot be read as UTF-8 text ({_first_line(error)}).") from error
    content = _read_yaml(text, f"profile {name}")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"profile {name} must map parameter names to values, like `epochs: 3`; see {folder}.")
    description = content.pop("description", "")
    if not isinstance(description, str):
        raise ConfigError(f"the description of profile {name} must be text, not {description!r}.")
    return Profile(name, description.strip(), content)


def profile_names(root: Path) -> list[str]:
    """The profiles that exist, sorted."""
    return sorted(path.stem for path in (root / "notebooks" / "profiles").glob("*.yaml"))


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse `name=value` strings whose values are YAML: `epochs=3`, `lr=1e-3`, `seeds=[0, 1]`, `widths=null`.

    Raises:
        ConfigError: no equals sign, an empty value, a name given twice, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not name.isidentifier() or not text:
            raise ConfigError(f"{assignment!r} is not of the form name=value, like epochs=3 or seeds=[0,1].")
        if name in values:
            raise ConfigError(f"parameter {name} is given twice; give it once.")
        values[name] = _read_yaml(text, f"the value of {name}")
    return values


def require_declared(names: Iterable[str], declared: Sequence[str], where: str) -> None:
    """Raise ConfigError, naming the closest and the allowed ones, unless every name in ``names`` is declared."""
    for name in names:
        if name in RUNNER_PARAMETERS:
            raise ConfigError(f"{name} is set with --{name} (make: {name.upper()}=...), not as a parameter.")
        if name not in declared:
            allowed = [other for other in declared if other not in RUNNER_PARAMETERS]
            raise ConfigError(f"{where} has no parameter {name!r}{_choices(name, allowed)}")


def select(sources: Sequence[Source], only: Sequence[str]) -> tuple[Source, ...]:
    """The sources named in ``only``, all of them if it is empty. Raises ConfigError for a name that is none of them."""
    names = [source.name for source in sources]
    for name in only:
        if name not in names:
            raise ConfigError(f"there is no notebook {name!r}{_choices(name, names)}")
    return tuple(source for source in sources if not only or source.name in only)


def displayed(path: Path, root: Path) -> str:
    """``path`` relative to the repository where it lies inside: shorter, and the same on every machine."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def check_sources(root: Path) -> list[str]:
    """What is wrong with the notebooks and profiles in the repository, a sentence each; empty if nothing is.

    A source carries no outputs and no execution counts, and declares its parameters as literals; a parameter has the
    same default in every notebook of the study; a profile sets declared parameters only.
    """
    paths = sorted((root / "notebooks").glob("*.ipynb"))
    problems = [] if paths else [f"{root / 'notebooks'} holds no notebooks."]
    defaults: dict[str, tuple[Any, str]] = {}
    for source in map(Source, paths):
        try:
            problems += _leftovers(source)
            names = list(source.defaults)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if not source.name[:2].isdigit():
            continue
        if names[:2] != list(RUNNER_PARAMETERS):
            problems.append(f"{source.path.name}: the parameters cell must begin with profile and results.")
        for name, value in source.defaults.items():
            first, where = defaults.setdefault(name, (value, source.name))
            if repr(value) != repr(first):
                problems.append(f"{name} is {first!r} by default in {where}, but {value!r} in {source.name}.")
    for name in profile_names(root):
        try:
            require_declared(load_profile(root, name).values, list(defaults), f"profile {name}: the study")
        except ConfigError as error:
            problems.append(str(error))
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
            f"{where}: the parameters cell may only assign literals, like epochs = 3 ({_first_line(error)}). "
            "Derived values belong in the next cell, where they follow the parameters."
        ) from error
    return values


def _choices(name: str, allowed: Sequence[str]) -> str:
    closest = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {closest[0]}?" if closest else "."
    return f"{hint} There is: {', '.join(allowed) or 'none'}."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


class _CoreSchemaLoader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2's core schema, and no duplicate keys.

    PyYAML follows version 1.1, where `1e-3` and `1.e3` are strings, `no` and `on` are booleans, `010` is eight and
    `1:30` is ninety.
    """

    yaml_implicit_resolvers: dict[str, list] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _CoreSchemaLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _read_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _CoreSchemaLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"{what} is not valid YAML: {problem}.") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # `!!int x`, `[[[[...`
        raise ConfigError(f"{what} is not valid YAML: {type(error).__name__}: {_first_line(error)}.") from error
