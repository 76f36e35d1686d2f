"""The families, one file each. This folder is the only list: its modules are imported, their classes are the families.

A third party adds families by an entry point of the group ``structmat.structures`` that names a module.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType

from structmat.errors import StructureError
from structmat.structure import Structure
from structmat.structure import from_json as _from_json
from structmat.structures.nonlinear import nonlinear

ENTRY_POINT_GROUP = "structmat.structures"


@cache
def families() -> Mapping[str, type[Structure]]:
    """Every family by name: those of this folder, then those of third parties.

    Raises:
        StructureError: two families have the same name.
    """
    found: dict[str, type[Structure]] = {}
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    modules += [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]
    for module in modules:
        for name, family in _defined_in(module):
            if name in found:
                raise StructureError(
                    f"Two families are named {name}: in {found[name].__module__} and in {module.__name__}. Rename one."
                )
            found[name] = family
    return MappingProxyType(found)


def _defined_in(module: ModuleType) -> list[tuple[str, type[Structure]]]:
    return [
        (name, value)
        for name, value in sorted(vars(module).items())
        if inspect.isclass(value)
        and issubclass(value, Structure)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]


def everything() -> Mapping[str, type[Structure]]:
    """The families, and what is a matrix only at the start (:mod:`structmat.structures.nonlinear`)."""
    return {**nonlinear(), **families()}


def from_json(data: object) -> Structure:
    """Read what :func:`structmat.structure.to_json` wrote. Raises :class:`~structmat.errors.FormatError`."""
    return _from_json(data, everything())


def __getattr__(name: str) -> type[Structure]:
    if not name.startswith("_") and name in families():
        return families()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
