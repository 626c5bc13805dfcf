"""What a method's file defines, checked alike for the study's own files and for a user's."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from apbm_core.errors import ConfigError
from apbm_core.study.methods.ranking import RankingOptions, Scores, prune_by
from apbm_core.study.networks.layers import named_convolutions

STARTS_FROM = ("scratch", "pretrained", "sparse")
SCHEDULES = ("equal", "published", "equal-time")


class NoOptions(BaseModel):
    """For methods without settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Method:
    """A method as the study sees it. In its file each attribute is a constant of the same name in capitals.

    Attributes:
        name: how parameters and records call it: its file's name, or the path of a user's file.
        label: how tables and plots call it.
        prune: ``prune(task) -> network``; a file may define ``scores`` instead (docs/own_criterion.md).
        Options: its settings, a pydantic model.
        starts_from: "scratch"; "pretrained", a dense network that the methods share; or "sparse", a training of its
            own that decides what goes.
        schedules: which of "equal" epochs, its "published" course and "equal-time" it knows.
        chooses_widths: whether it decides itself how many filters each layer keeps; by default those that start from a
            sparse training do.
        starts_slim: whether it builds the small network at once, so that a dense one that is trained already is nothing
            to it.
        default: whether it runs where no methods are named.
        place: where it stands in tables and legends, the lowest first; those without a place come last, by name.
        summary: what it does, in a line.
        source: where it comes from.
        colour, marker: its look in plots, ``#rrggbb`` and a Matplotlib marker; a free one where None.
    """

    name: str
    label: str
    prune: Callable[..., nn.Module]
    Options: type[BaseModel] = NoOptions
    starts_from: str = "pretrained"
    schedules: tuple[str, ...] = ("equal",)
    chooses_widths: bool = False
    starts_slim: bool = False
    default: bool = True
    place: float = math.inf
    summary: str = ""
    source: str = ""
    colour: str | None = None
    marker: str | None = None

    def with_options(self, options: type[BaseModel]) -> "Method":
        """The same method with other settings."""
        return replace(self, Options=options)


_OPTIONAL = ("schedules", "starts_slim", "default", "place", "summary", "source", "colour", "marker")


def read(module: ModuleType, name: str, path: str) -> Method:
    """The method that a module defines.

    Args:
        module: the file's module.
        name: how the study calls the method.
        path: the file, for the messages.

    Raises:
        ConfigError: the module does not define what a method needs; the message names the constant.
    """
    _check(module, path)
    if hasattr(module, "prune"):
        prune, options = module.prune, NoOptions
    else:
        how = {"images": getattr(module, "IMAGES", 0), "fuses": getattr(module, "FUSES", False)}
        prune, options = prune_by(_checked(module.scores, path), **how), RankingOptions
    given = {field: getattr(module, field.upper()) for field in _OPTIONAL if hasattr(module, field.upper())}
    starts_from = getattr(module, "STARTS_FROM", "pretrained")
    return Method(
        name=name,
        label=module.LABEL,
        prune=prune,
        Options=getattr(module, "Options", options),
        starts_from=starts_from,
        chooses_widths=getattr(module, "CHOOSES_WIDTHS", starts_from == "sparse"),
        **given,
    )


def _check(module: ModuleType, path: str) -> None:
    if not isinstance(getattr(module, "LABEL", None), str):
        raise ConfigError(f'{path} must define LABEL, the name that tables and plots show, such as LABEL = "my own".')
    if not any(callable(getattr(module, name, None)) for name in ("prune", "scores")):
        raise ConfigError(
            f"{path} must define scores(model, layers, images, seed) -> {{layer: (n,) scores}}, or prune(task) -> "
            "network. docs/own_criterion.md shows a whole file."
        )
    images = getattr(module, "IMAGES", 0)
    if type(images) is not int or images < 0:
        raise ConfigError(f"{path}: IMAGES = {images!r} must be the number of images that scores() gets, 0 or more.")
    start = getattr(module, "STARTS_FROM", "pretrained")
    if start not in STARTS_FROM:
        raise ConfigError(f"{path}: STARTS_FROM = {start!r} must be one of {', '.join(STARTS_FROM)}.")
    schedules = getattr(module, "SCHEDULES", ("equal",))
    if not isinstance(schedules, tuple) or not schedules or not set(schedules) <= set(SCHEDULES):
        raise ConfigError(f"{path}: SCHEDULES = {schedules!r} must be a tuple of some of {', '.join(SCHEDULES)}.")
    options = getattr(module, "Options", BaseModel)
    if not (isinstance(options, type) and issubclass(options, BaseModel)):
        raise ConfigError(f"{path}: Options must be a pydantic model (a class derived from pydantic.BaseModel).")
    for name in ("CHOOSES_WIDTHS", "STARTS_SLIM", "DEFAULT", "FUSES"):
        if not isinstance(getattr(module, name, True), bool):
            raise ConfigError(f"{path}: {name} = {getattr(module, name)!r} must be True or False.")
    for name in ("SUMMARY", "SOURCE", "MARKER"):
        if not isinstance(getattr(module, name, ""), str):
            raise ConfigError(f"{path}: {name} = {getattr(module, name)!r} must be text.")
    place = getattr(module, "PLACE", 0)
    if isinstance(place, bool) or not isinstance(place, int | float) or math.isnan(place):
        raise ConfigError(f"{path}: PLACE = {place!r} must be a number; methods are listed in the order of theirs.")
    colour = getattr(module, "COLOUR", "#000000")
    if not (isinstance(colour, str) and re.fullmatch("#[0-9A-Fa-f]{6}", colour)):
        raise ConfigError(f"{path}: COLOUR = {colour!r} must be of the form '#rrggbb', such as '#D55E00'.")


def _checked(scores: Scores, path: str) -> Scores:
    """``scores`` with its answers checked: one number a filter for every layer that was asked for."""

    def checked(model: nn.Module, layers: Sequence[str], images: Tensor | None, seed: int) -> dict[str, Tensor]:
        found = scores(model, layers, images, seed)
        for name, convolution in named_convolutions(model, layers).items():
            if not isinstance(found, Mapping) or not isinstance(found.get(name), Tensor):
                raise ConfigError(f"{path}: scores() gave no tensor for layer {name!r}; return one for every layer.")
            if found[name].shape != (convolution.out_channels,):
                raise ConfigError(
                    f"{path}: scores() gave shape {tuple(found[name].shape)} for layer {name!r}, which has "
                    f"{convolution.out_channels} filters; return one number a filter, shape (n,)."
                )
        return {name: found[name].detach() for name in layers}

    return checked
