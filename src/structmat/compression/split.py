"""Modules with several matrices, taken apart while a model is compressed; where nothing changed, put together again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from structmat.compression.layers import splitter_of
from structmat.compression.reads import reader_of


@dataclass(frozen=True)
class Split:
    """A module that was taken apart: the one that was there, and all its names."""

    whole: nn.Module
    names: tuple[str, ...]


Splits = Mapping[str, Split]
"""By the first name."""


def split_(model: nn.Module, only: Collection[str] | None = None) -> Splits:
    """Put equal modules, whose matrices are modules of their own, in the places of recurrent nets and attention.

    They share the memory of the given ones. Left as they are: those of :func:`kept_whole`.

    Args:
        model: changed in place.
        only: names to look at; None for all.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    whole = kept_whole(model)
    found: dict[str, Split] = {}
    for module in list(model.modules()):
        adapter, own = splitter_of(module), names[id(module)]
        if adapter is None or id(module) in whole or (only is not None and not set(own) & set(only)):
            continue
        found[own[0]] = Split(module, tuple(own))
        _put(model, tuple(own), adapter.split(module))
    return found


def kept_whole(model: nn.Module) -> dict[int, str]:
    """Why modules with several matrices are not taken apart, by identity: the model itself, modules with hooks or
    parametrizations, and those whose parameters another module has or reads too."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    owners: dict[int, set[int]] = {}
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    found: dict[int, str] = {}
    for module in model.modules():
        if splitter_of(module) is None:
            continue
        inside = {id(part) for part in module.modules()}
        reader = _reader(module, names[id(module)], modules)
        if module is model:
            found[id(module)] = "it is the model itself; wrap it in nn.Sequential"
        elif any(owners[id(parameter)] - inside for parameter in module.parameters()):
            found[id(module)] = "another module has its parameters too"
        elif any(_is_special(part) for part in module.modules()):
            found[id(module)] = "it has hooks or parametrizations, which its parts would lose"
        elif reader is not None:
            found[id(module)] = f"{reader[0]} reads its {reader[1]}"
    return found


def _reader(module: nn.Module, names: Collection[str], modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """As :func:`structmat.compression.reads.reader_of`, of all that a module has no more once it was taken apart."""
    wanted = [name for name, _ in (*module.named_parameters(), *module.named_children())]
    if isinstance(module, nn.RNNBase):
        wanted += ["all_weights", "_flat_weights"]
    return next((found for name in names if name and (found := reader_of(name, wanted, modules)) is not None), None)


def _is_special(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooked) or parametrize.is_parametrized(module)


def whole_again_(model: nn.Module, splits: Splits, changed: Collection[str] = ()) -> dict[str, Split]:
    """Put the modules back that were there, but where a part is among the changed ones.

    Returns:
        What is still taken apart.
    """
    left = {}
    for name, split in splits.items():
        if any(layer.startswith(f"{own}.") for layer in changed for own in split.names):
            left[name] = split
        else:
            split.whole.train(model.get_submodule(name).training)
            _put(model, split.names, split.whole)
    return left


@contextmanager
def split_apart(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[None]:
    """The model with its modules taken apart for a while.

    Args:
        model: restored afterwards.
        layers: names of layers; only modules that hold one of them are taken apart. None for all.
    """
    splits = split_(model)
    if layers is not None:
        splits = whole_again_(model, splits, layers)
    try:
        yield
    finally:
        whole_again_(model, splits)


def _put(model: nn.Module, names: tuple[str, ...], module: nn.Module) -> None:
    for name in names:
        model.set_submodule(name, module)
