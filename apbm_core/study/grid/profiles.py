"""Profiles, and what is said beside them: which value each parameter of a study has, and where it comes from.

A profile is a YAML file `notebooks/profiles/<name>.yaml`: a flat mapping of parameter names to values, with a
`description` and the `notebooks` that it renders. YAML is that of version 1.2: `1e-3` is a number, `no` is a word.
"""

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from apbm_core.errors import ConfigError
from apbm_core.study.grid import parameters as grid_parameters
from apbm_core.study.records import OWN

FOLDER = "notebooks/profiles"
PLACE = ("profile", "results")
"""What decides where results go; not parameters of a study."""

DEFAULT, GIVEN = "default", "given here"


@dataclass(frozen=True)
class Profile:
    """A named set of parameter values, and the notebooks that show it (all that no other is for, if it names none)."""

    name: str
    description: str
    values: Mapping[str, Any]
    notebooks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Effective:
    """Checked parameters and the origin of each: `default`, the profile's name, or `given here`."""

    parameters: Any  # a StudyParameters
    origins: Mapping[str, str]


def repository() -> Path | None:
    """The folder above the working directory, or above this package, that holds the profiles; None without any."""
    places = (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[3])
    return next((place for place in places if (place / FOLDER).is_dir()), None)


def lay_over(profile: Profile, given: Mapping[str, Any], origin: str = GIVEN) -> Effective:
    """The defaults, the profile's values over them, and ``given`` over both; checked all at once.

    Raises:
        ConfigError: naming each value that is unknown, of the wrong type or impossible.
    """
    known = list(grid_parameters.StudyParameters.model_fields)
    require_known(profile.values, known, f"profile {profile.name} is wrong: the study")
    require_known(given, known, "the study")
    parameters = grid_parameters.StudyParameters.parse({**profile.values, **given})
    origins = {
        name: origin if name in given else f"profile {profile.name}" if name in profile.values else DEFAULT
        for name in known
    }
    return Effective(parameters, origins)


def load_profile(root: Path, name: str) -> Profile:
    """Read `notebooks/profiles/<name>.yaml`. Raises ConfigError if it is missing, or no mapping of names to values."""
    folder = root / FOLDER
    if name == Path(OWN).name:
        raise ConfigError(f"no profile can be called {name!r}, for {OWN} holds the reader's own results.")
    known = profile_names(root)
    if name not in known:
        raise ConfigError(f"there is no profile {name!r}{choices(name, known)}")
    try:
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"profile {name} cannot be read as UTF-8 text ({first_line(error)}).") from error
    content = read_yaml(text, f"profile {name}")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"profile {name} must map parameter names to values, like `epochs: 3`; see {folder}.")
    description, notebooks = content.pop("description", ""), content.pop("notebooks", [])
    if not isinstance(description, str):
        raise ConfigError(f"the description of profile {name} must be text, not {description!r}.")
    if not isinstance(notebooks, list) or not all(isinstance(notebook, str) for notebook in notebooks):
        raise ConfigError(f"the notebooks of profile {name} must be a list of names, not {notebooks!r}.")
    return Profile(name, description.strip(), content, tuple(notebooks))


def profile_names(root: Path) -> list[str]:
    """The profiles that exist, sorted."""
    return sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))


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
        values[name] = read_yaml(text, f"the value of {name}")
    return values


def parse_with_assignments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line whose `name=value` strings (``more``) stand before, between and behind its options.

    argparse itself takes them in one place only. Anything else that ``parser`` does not know ends the program.
    """
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "more"):
        options.more = [*options.more, *(text for text in rest if not text.startswith("-"))]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def require_known(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise ConfigError, naming the closest and the allowed ones, unless every name in ``names`` is known."""
    for name in names:
        if name in PLACE:
            raise ConfigError(f"{name} is set with --{name} (make: {name.upper()}=...), not as a parameter.")
        if name not in known:
            raise ConfigError(f"{where} has no parameter {name!r}{choices(name, known)}")


def read_yaml(text: str, what: str) -> Any:
    """The plain value, list or mapping in a text. Raises ConfigError, with ``what`` it is, if it is not YAML."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{what} is not valid YAML: {first_line(Exception(error.problem))}.") from error
    except MarkedYAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {error.problem or first_line(error)}.") from error
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # `!!int x`
        raise ConfigError(f"{what} is not valid YAML: {type(error).__name__}: {first_line(error)}.") from error


def choices(name: str, allowed: Sequence[str]) -> str:
    """A sentence's end: the closest of the allowed names, and all of them."""
    closest = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {closest[0]}?" if closest else "."
    return f"{hint} There is: {', '.join(allowed) or 'none'}."


def first_line(error: Exception) -> str:
    """An error's first line without its full stop, or its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
