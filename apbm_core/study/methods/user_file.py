"""A method of the user's own, in a Python file: named by its path, told apart by its content."""

import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import util
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from apbm_core.errors import ConfigError
from apbm_core.files import sha256
from apbm_core.study.methods.ranking import Scores, prune_by
from apbm_core.study.networks.layers import named_convolutions

STARTS_FROM = ("scratch", "pretrained", "sparse")
SCHEDULES = ("equal", "published", "equal-time")


def load(path: str, no_options: type[BaseModel]) -> ModuleType:
    """The file as a module that defines ``LABEL``, ``prune`` and ``Options``.

    ``Options`` is the file's own (``no_options`` if it has none) with the file's SHA-256 as one option more. So the
    content is part of what identifies a run: an edited criterion is a new run, and the old one's record stays.

    Raises:
        ConfigError: there is no such file, it cannot be executed, or it does not define what a method needs.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the method {path!r} is a file that cannot be read ({error.strerror}); relative paths start from "
            f"{Path.cwd()}."
        ) from None
    return _module(path, content, no_options)


@lru_cache(maxsize=32)
def _module(path: str, content: bytes, no_options: type[BaseModel]) -> ModuleType:
    digest = sha256(content)
    name = f"apbm_method_{Path(path).stem}_{digest[:10]}"
    module = util.module_from_spec(util.spec_from_file_location(name, path))
    sys.modules[name] = module  # where dataclasses and pydantic look up a class's module
    try:
        exec(compile(content, path, "exec"), module.__dict__)  # what was hashed, not what the file says by now
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}. Correct the file.") from error
    _check(module, path)
    if not hasattr(module, "prune"):
        images = getattr(module, "IMAGES", 0)
        module.prune = prune_by(_checked(module.scores, path), images=images)
    module.Options = _with_source(getattr(module, "Options", no_options), path, digest)
    return module


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


def _with_source(options: type[BaseModel], path: str, digest: str) -> type[BaseModel]:
    """``options`` with the file's digest among them, and refusing unknown ones like every other method's."""

    class Options(options):
        model_config = ConfigDict(frozen=True, extra="forbid")

        source_sha256: str = Field(digest, description="the content of the method's file")

        @field_validator("source_sha256")
        @classmethod
        def _is_current(cls, value: str) -> str:
            if value != digest:
                raise ValueError(f"{path} was edited since this run was asked for; start the study again.")
            return value

    return Options
