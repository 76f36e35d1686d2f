"""The kinds of modules that compression knows, one file each: an adapter says all that is to be known of a kind.

This folder is the only list: its modules are imported, the subclasses of :class:`Layer` and :class:`Splitter` in them
are the adapters. A third party adds adapters by an entry point of the group ``structmat.layers`` that names a module.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from torch import nn

from structmat.compression.budget import Budget, Flops, Latency
from structmat.compression.layers.base import Content, Described, Layer, Load, Members, Splitter
from structmat.errors import ModelError
from structmat.structure import Structure

__all__ = [
    "Content",
    "Described",
    "Layer",
    "Load",
    "Members",
    "Splitter",
    "cost_of",
    "layer_named",
    "layer_of",
    "layers",
    "splitter_named",
    "splitter_of",
    "splitters",
    "structured_layer_of",
]

ENTRY_POINT_GROUP = "structmat.layers"

Kind = TypeVar("Kind", Layer, Splitter)


def _found(base: type[Kind]) -> tuple[Kind, ...]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    modules += [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]
    return tuple(
        value()
        for module in modules
        for _, value in sorted(vars(module).items())
        if inspect.isclass(value)
        and issubclass(value, base)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    )


@cache
def layers() -> tuple[Layer, ...]:
    """Adapters of modules with one matrix."""
    return _found(Layer)  # type: ignore[type-abstract]


@cache
def splitters() -> tuple[Splitter, ...]:
    """Adapters of modules with several."""
    return _found(Splitter)  # type: ignore[type-abstract]


def layer_of(module: nn.Module) -> Layer | None:
    """The adapter of a dense module."""
    return next((adapter for adapter in layers() if adapter.kind(module) is not None), None)


def layer_named(kind: str) -> Layer:
    """The adapter of a kind of dense modules. Raises :class:`~structmat.errors.ModelError`."""
    found = next((adapter for adapter in layers() if kind in adapter.kinds), None)
    if found is None:
        raise ModelError(f"Layers of kind {kind!r} are not known to compress.")
    return found


def structured_layer_of(module: nn.Module) -> Layer | None:
    """The adapter of a structured module."""
    return next((adapter for adapter in layers() if adapter.is_structured(module)), None)


def cost_of(budget: Budget, site: Described, structure: Structure, load: Load) -> float:
    """What a layer costs in the unit of a budget, all its matrices together."""
    adapter = layer_named(site.kind)
    if isinstance(budget, Flops):
        return adapter.flops(site, structure, load)
    if isinstance(budget, Latency):
        return adapter.microseconds(site, structure, load, budget.batch)
    return site.copies * budget.cost(structure, site.shape, load.rows)


def splitter_of(module: nn.Module) -> Splitter | None:
    """The adapter that takes a module apart."""
    return next((adapter for adapter in splitters() if adapter.splits(module)), None)


def splitter_named(name: str) -> Splitter:
    """By the name that files hold. Raises :class:`~structmat.errors.ModelError`."""
    found = next((adapter for adapter in splitters() if adapter.name == name), None)
    if found is None:
        known = ", ".join(adapter.name for adapter in splitters())
        raise ModelError(f"Modules of kind {name!r} are not known to be taken apart; known are {known}.")
    return found
