"""A method's options as a record states them, so that an option added later leaves the ids of earlier runs alone.

A run's id is a hash of its configuration, options included. An option that comes later says with :func:`added` what was
done before it existed; options that stand at that value are not stated, whatever the default is or becomes::

    class Options(BaseModel):
        fan_in: Literal["own", "dense"] = added("own", if_absent="own", description="...")
"""

from typing import Any

from pydantic import BaseModel, Field

_KEY = "if_absent"


def added(default: Any, *, if_absent: Any, **details: Any) -> Any:
    """A pydantic field that did not exist in the first records; a record that does not state it means ``if_absent``."""
    return Field(default, json_schema_extra={_KEY: if_absent}, **details)


def stated(options: BaseModel) -> dict[str, Any]:
    """The options' JSON values as they are recorded and hashed: without those that are as before they existed."""
    values = options.model_dump(mode="json")
    for name, field in type(options).model_fields.items():
        extra = field.json_schema_extra or {}
        if _KEY in extra and values[name] == extra[_KEY]:
            del values[name]
        elif isinstance(getattr(options, name), BaseModel):
            values[name] = stated(getattr(options, name))
    return values


def completed(kind: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Recorded values with what they do not state filled in, so that today's defaults do not change what was run."""
    values = dict(values)
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra or {}
        if name not in values and _KEY in extra:
            values[name] = extra[_KEY]
        elif isinstance(values.get(name), dict) and _is_model(field.annotation):
            values[name] = completed(field.annotation, values[name])
    return values


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
