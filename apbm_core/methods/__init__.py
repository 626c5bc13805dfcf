"""The methods under comparison: one file each, found by its name.

A method's file defines ``LABEL`` (how plots call it) and ``prune(task) -> nn.Module``; where they differ from the
defaults below, also ``Options`` (its settings, a pydantic model), ``STARTS_FROM`` and ``SCHEDULES``. Adding a method
means adding one file and its name to ``NAMES``.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from torch import nn

from apbm_core.errors import ConfigError
from apbm_core.validation import closest

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
    """The method called ``name``.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    if name not in NAMES:
        raise ConfigError(f"there is no method {name!r}{closest(name, NAMES)} Allowed: {', '.join(NAMES)}.")
    module = importlib.import_module(f"apbm_core.methods.{name}")
    return Method(
        name=name,
        label=module.LABEL,
        prune=module.prune,
        Options=getattr(module, "Options", NoOptions),
        starts_from=getattr(module, "STARTS_FROM", "pretrained"),
        schedules=getattr(module, "SCHEDULES", ("equal",)),
    )
