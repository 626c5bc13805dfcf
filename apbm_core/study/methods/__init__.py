"""The methods under comparison: one file each, found by its name.

A method's file defines ``LABEL`` (how plots call it) and ``prune(task) -> nn.Module``; where they differ from the
defaults below, also ``Options`` (its settings, a pydantic model), ``STARTS_FROM`` and ``SCHEDULES``. Adding a method
means adding one file and its name to ``NAMES``; a user's own method is named by the path of its file, which may lie
anywhere and may define ``scores`` in place of ``prune`` (docs/own_criterion.md).
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from torch import nn

from apbm_core.errors import ConfigError
from apbm_core.study.methods import user_file
from apbm_core.study.validation import closest

NAMES = ("dense", "apbm", "dcff", "scratch", "hrank", "polarization", "swp", "l1", "fpgm", "random")


class NoOptions(BaseModel):
    """For methods without settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Method:
    """A method as the study sees it."""

    name: str
    label: str
    prune: Callable[..., nn.Module]
    Options: type[BaseModel]
    starts_from: str  # "scratch", "pretrained" (shared between methods) or "sparse" (a training of its own first)
    schedules: tuple[str, ...]


def get_method(name: str) -> Method:
    """The method called ``name``, or the one in the file ``name`` if that ends in ``.py``.

    Raises:
        ConfigError: there is none of that name (the message lists those there are), or the file defines no method.
    """
    if name.endswith(".py"):
        module = user_file.load(name, NoOptions)
    elif name in NAMES:
        module = importlib.import_module(f"apbm_core.study.methods.{name}")
    else:
        raise ConfigError(
            f"there is no method {name!r}{closest(name, NAMES)} Allowed: {', '.join(NAMES)}, or the path of a .py file."
        )
    return Method(
        name=name,
        label=module.LABEL,
        prune=module.prune,
        Options=getattr(module, "Options", NoOptions),
        starts_from=getattr(module, "STARTS_FROM", "pretrained"),
        schedules=getattr(module, "SCHEDULES", ("equal",)),
    )


def label(name: str) -> str:
    """How tables and plots call a method; a file that is gone since it was recorded goes by its own name.

    ``method@rule`` is a method whose widths follow another rule than the others' (summary.series).
    """
    name, _, rule = name.partition("@")
    if rule:
        return f"{label(name)}, {rule} widths"
    try:
        return get_method(name).label
    except ConfigError:
        return name.removesuffix(".py").rsplit("/", 1)[-1]


def ordered(names: Iterable[str]) -> list[str]:
    """The different ones of ``names`` in the order of tables and plots: ours first, then the user's own."""
    found = set(names)
    return sorted(found, key=lambda name: (_place(name.partition("@")[0]), name))


def _place(name: str) -> int:
    return NAMES.index(name) if name in NAMES else len(NAMES)
