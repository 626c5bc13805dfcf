"""Files that are found rather than listed: the modules of a package that define a certain name."""

import ast
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType


def modules_defining(name: str, package: str, folders: Iterable[str]) -> Iterator[ModuleType]:
    """The modules below ``package`` that assign ``name`` at their top level, in alphabetical order.

    They are told by their source; the others are not imported, so a module that asks for them may be one of them.

    Args:
        name: such as "LABEL".
        package: the package's full name.
        folders: its search path, ``__path__``.
    """
    for entry in pkgutil.iter_modules(folders):
        source = entry.module_finder.find_spec(entry.name).loader.get_source(entry.name)
        if source is not None and name in _assigned(ast.parse(source)):
            yield importlib.import_module(f"{package}.{entry.name}")


def _assigned(tree: ast.Module) -> set[str]:
    targets = []
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets.append(statement.target)
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
