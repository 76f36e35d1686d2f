"""What a layer can become that is a matrix only at the start: one file each, and this folder is the only list.

Such a structure is fitted, counted and saved as a family is, but the layer that is built of it is no linear map any
more once it has been trained. So it is no family: nothing tries it unasked, and :class:`StructuredLinear` refuses it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from structmat.structure import Structure


@cache
def nonlinear() -> Mapping[str, type[Structure]]:
    """The structures of this folder by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return MappingProxyType(
        {
            name: value
            for module in modules
            for name, value in sorted(vars(module).items())
            if inspect.isclass(value) and issubclass(value, Structure) and value.__module__ == module.__name__
        }
    )
