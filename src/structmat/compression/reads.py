"""What the code of a model reads of its layers beside calling them, found in its source."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache, cached_property
from types import FunctionType
from typing import Any, cast

from torch import nn

Path = tuple[str, ...]
"""Names and indices after ``self``; ``"*"`` for an index that is not written as a constant."""

_CHAIN = r"((?:\.\w+|\[[^\[\]]*\])+)"
_PATH = re.compile(rf"\bself{_CHAIN}")
_ASSIGNED = re.compile(rf"\b(\w+)\s*=\s*self{_CHAIN}[ \t]*$", re.MULTILINE)
_LOOP = re.compile(rf"\bfor\s+(?:\w+\s*,\s*)?(\w+)\s+in\s+(?:\w+\()?self{_CHAIN}")
_PART = re.compile(r"\.(\w+)|\[([^\[\]]*)\]")
_CONSTANT = re.compile(r"\d+|(['\"])\w+\1")


def reader_of(name: str, wanted: Iterable[str], modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The class of a module around a layer whose code reads one of the wanted attributes of the layer, and which.

    Args:
        name: of the layer.
        wanted: attributes, such as ``"weight"`` or ``"out_proj.weight"``.
        modules: of the model by name.
    """
    parts = tuple(name.split("."))
    for count in reversed(range(len(parts))):
        owner = modules.get(".".join(parts[:count]))
        if owner is None:
            continue
        if isinstance(owner, nn.TransformerEncoderLayer):
            return None  # reads weights in the fast path of evaluation, which it can be told to decline
        paths = _read_by(cast(Hashable, type(owner)))
        for attribute in wanted if paths else ():
            if any(_begins(path, (*parts[count:], *attribute.split("."))) for path in paths):
                return type(owner).__name__, attribute
    return None


def _begins(path: Path, start: Path) -> bool:
    return len(path) >= len(start) and all(a in ("*", b) for a, b in zip(path, start, strict=False))


@cache
def _read_by(owner: Hashable) -> frozenset[Path]:
    """The paths in all methods and properties of a class but those of initialisation."""
    found: set[Path] = set()
    for name, method in _methods(owner):
        if name.startswith("__") or "init" in name or name in ("reset_parameters", "extra_repr"):
            continue
        if not (getattr(method, "__module__", None) or "").startswith("torch.nn.modules.module"):
            found |= _read_in(method)
    return frozenset(found)


def _methods(owner: Hashable) -> Iterator[tuple[str, FunctionType]]:
    for name, member in inspect.getmembers(owner):
        function: Any = member
        if isinstance(member, property):
            function = member.fget
        elif isinstance(member, cached_property):
            function = member.func
        if isinstance(function, FunctionType):
            yield name, function


@cache
def _read_in(method: FunctionType) -> frozenset[Path]:
    try:
        source = textwrap.dedent(inspect.getsource(method))
    except (OSError, TypeError):
        return frozenset()  # without source: what it reads shows in calibration, where such layers are never called
    found = [_path(chain) for chain in _PATH.findall(source)]
    held = [(variable, _path(chain)) for variable, chain in _ASSIGNED.findall(source)]
    for variable, chain in _LOOP.findall(source):
        path = _path(chain)
        held.append((variable, (*(path[:-1] if path[-1] in ("values", "items") else path), "*")))
    for variable, start in held:
        found += [start + _path(chain) for chain in re.findall(rf"(?<![\w.]){variable}{_CHAIN}", source)]
    return frozenset(path for path in found if len(path) > 1)


def _path(chain: str) -> Path:
    return tuple(_part(*part) for part in _PART.findall(chain))


def _part(attribute: str, index: str) -> str:
    return attribute or (index.strip("'\"") if _CONSTANT.fullmatch(index) else "*")
