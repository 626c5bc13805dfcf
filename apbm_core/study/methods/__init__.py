"""The methods under comparison: a file of this folder that defines ``LABEL`` is one, named by its file.

A method's file defines ``LABEL`` (how plots call it) and ``prune(task) -> nn.Module`` or ``scores``; where they differ
from the defaults of :class:`~apbm_core.study.methods.definition.Method`, also ``Options`` (its settings, a pydantic
model), ``STARTS_FROM``, ``SCHEDULES``, ``PLACE``, ``COLOUR``, ``MARKER`` and so on. Nothing else names it: adding a
method means adding one file. A user's own method is named by the path of its file, which may lie anywhere and defines
the same (docs/own_criterion.md).
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType

from apbm_core.errors import ConfigError
from apbm_core.study.discovery import modules_defining
from apbm_core.study.methods import user_file
from apbm_core.study.methods.definition import Method, NoOptions, read
from apbm_core.study.validation import closest

__all__ = ["Method", "NoOptions", "all_methods", "default_methods", "get_method", "label", "ordered"]


def all_methods() -> Mapping[str, Method]:
    """The study's methods by name, in the order of tables and plots.

    Raises:
        ConfigError: a file defines ``LABEL`` but not what else a method needs.
    """
    return _found(tuple(__path__))


@lru_cache(maxsize=8)
def _found(folders: tuple[str, ...]) -> Mapping[str, Method]:
    modules = modules_defining("LABEL", __name__, folders)
    found = [read(module, module.__name__.rpartition(".")[2], module.__file__) for module in modules]
    return MappingProxyType({method.name: method for method in sorted(found, key=lambda m: (m.place, m.name))})


def default_methods() -> list[str]:
    """The names of the methods that run where none are named."""
    return [name for name, method in all_methods().items() if method.default]


def get_method(name: str) -> Method:
    """The method called ``name``, or the one in the file ``name`` if that ends in ``.py``.

    Raises:
        ConfigError: there is none of that name (the message lists those there are), or the file defines no method.
    """
    if name.endswith(".py"):
        return user_file.load(name)
    known = all_methods()
    if name not in known:
        raise ConfigError(
            f"there is no method {name!r}{closest(name, known)} Allowed: {', '.join(known)}, or the path of a .py file."
        )
    return known[name]


def label(name: str) -> str:
    """How tables and plots call a method; a file that is gone since it was recorded goes by its own name.

    ``method@rule`` is a method whose widths follow another rule than the others'
    (:func:`apbm_core.study.report.frames.series`).
    """
    name, _, rule = name.partition("@")
    if rule:
        return f"{label(name)}, {rule} widths"
    try:
        return get_method(name).label
    except ConfigError:
        return name.removesuffix(".py").rsplit("/", 1)[-1]


def ordered(names: Iterable[str]) -> list[str]:
    """The different ones of ``names`` in the order of tables and plots: the study's own first, then the user's."""
    places = {name: place for place, name in enumerate(all_methods())}
    return sorted(set(names), key=lambda name: (places.get(name.partition("@")[0], len(places)), name))
