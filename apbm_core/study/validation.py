"""Parameters in, a validated pydantic model out, or one ConfigError that lists everything that is wrong."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from apbm_core.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """``model`` filled with ``values``.

    Args:
        model: the pydantic model to fill.
        values: its fields by name.
        what: what the values are, to start the error with: "recipe 'fast'".

    Raises:
        ConfigError: any value is unknown, missing or not allowed; all of them are listed, a line each.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, model, what)) from None


def describe_validation_error(error: ValidationError, model: type[BaseModel], what: str) -> str:
    """Pydantic's findings as sentences: the parameter, the value it has, what is allowed, the closest known name."""
    problems = [_describe(problem, model) for problem in error.errors(include_url=False)]
    if len(problems) == 1:
        return f"{what}: {problems[0]}"
    return "\n".join([f"{what}: {len(problems)} parameters are wrong.", *(f"  - {problem}" for problem in problems)])


def closest(name: Any, allowed: Iterable[str]) -> str:
    """A sentence's end: ``; did you mean 'x'?`` or, when no allowed name resembles ``name``, a full stop."""
    matches = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."


def _describe(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    location, value, kind = problem["loc"], problem["input"], problem["type"]
    name = ".".join(map(str, location))
    if kind == "extra_forbidden":
        allowed = sorted(_fields_at(model, location[:-1]))
        return f"{name!r} is not a parameter{closest(location[-1], allowed)} Allowed: {', '.join(allowed)}."
    if kind == "missing":
        return f"{name!r} is missing; give it a value."
    if kind in ("value_error", "assertion_error"):
        return ("" if not name else f"{name} = {_shown(value)}: ") + str(problem["ctx"]["error"])
    message = problem["msg"].replace("Input should", "it should")
    if kind == "literal_error" and isinstance(value, str):
        message += closest(value, problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    elif kind in ("float_type", "int_type") and isinstance(value, str) and _is_number(value):
        message += f", and {value!r} is text: write it without quotes (YAML reads 1e-3 as text and 1.0e-3 as a number)."
    return f"{name} = {_shown(value)} is not allowed: {message}" + ("" if message[-1] in ".?" else ".")


def _fields_at(model: type[BaseModel], location: tuple) -> set[str]:
    """The parameter names of the model, or of the one nested in it at ``location``."""
    for step in location:
        field = model.model_fields.get(step) if isinstance(step, str) else None
        if field is None:  # an index into a list, or the tag of a union: stay at this model
            continue
        nested = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_model(kind)]
        if not nested:
            return set()
        tags = set(map(str, location))
        model = next((kind for kind in nested if tags & _tags(kind)), nested[0])
    return set(model.model_fields)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _tags(model: type[BaseModel]) -> set[str]:
    """The names by which a union's error location may call one of its members."""
    return {model.__name__} | {str(tag) for field in model.model_fields.values() for tag in get_args(field.annotation)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
