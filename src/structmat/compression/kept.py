"""Why layers are kept as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from structmat.compression.layers import Layer, structured_layer_of
from structmat.compression.reads import reader_of

LARGE_SHARE = 0.01
"""A layer of another type is reported from this share of the model's parameters on."""


@dataclass(frozen=True)
class Skipped:
    """A layer that is kept as it is, with the reason."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    reason: str


def forbidden(
    name: str, module: nn.Module, modules: dict[str, nn.Module], adapter: Layer, owners: dict[int, list[str]]
) -> str | None:
    """Why a layer can't be replaced even if asked for, or None."""
    if is_lazy(cast(Tensor, module.weight)):
        return "its weight has no shape yet; run the model once"
    parent = modules.get(name.rpartition(".")[0])
    if name and isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and never calls it"
    if not name:
        return "it is the model itself; wrap it in nn.Sequential"
    if "weight" not in module._parameters:
        return (
            "its weight is computed by a parametrization; remove that first, which keeps the weight as it is (as "
            "torch.nn.utils.parametrize.remove_parametrizations does)"
        )
    if not cast(Tensor, module.weight).is_floating_point():
        return f"its weight has dtype {module.weight.dtype}, which is not real floating point"
    if adapter.looks_up:
        reader = reader_of(name, ("weight",), modules)
        if reader is not None:
            return f"{reader[0]} reads its weight; let a head be an nn.Linear with the same weight"
        for owner in owners.get(id(module.weight), []):
            other, _, key = owner.rpartition(".")
            if modules[other] is not module and not (type(modules[other]) is nn.Linear and key == "weight"):
                return f"its weight is shared with {owner}, which is not that of an nn.Linear"
    return adapter.refusal(module)


def doubt_about(
    name: str,
    names: tuple[str, ...],
    module: nn.Module,
    modules: dict[str, nn.Module],
    owners: dict[int, list[str]],
    heads: set[int],
    adapter: Layer,
) -> str | None:
    """Why a layer is kept unless asked for, or None."""
    if adapter.looks_up:
        return adapter.doubt(module)
    if len(names) > 1:
        return f"the module is shared, its other names are {', '.join(names[1:])}"
    if parametrize.is_parametrized(module):
        return "its bias is computed by a parametrization"
    others = [o for o in owners.get(id(module.weight), []) if o != f"{name}.weight"]
    if others:
        return f"its weight is shared with {', '.join(others)}"
    if id(module) in heads:
        return "it is the output head"
    doubt = adapter.doubt(module)
    if doubt is not None:
        return doubt
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which a replacement would lose"
    reader = reader_of(name, ("weight",), modules)
    return None if reader is None else f"{reader[0]} reads its weight"


def weight_owners(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """All full names of every parameter, by identity; shared storage counts as shared."""
    owners: dict[int, list[str]] = {}
    by_storage: dict[tuple[int, int], list[int]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter):
                continue
            owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
            if parameter.device.type != "meta" and parameter.numel():
                where = (parameter.untyped_storage().data_ptr(), int(parameter.storage_offset()))
                by_storage.setdefault(where, []).append(id(parameter))
    for identities in by_storage.values():
        together = list(dict.fromkeys(n for i in dict.fromkeys(identities) for n in owners[i]))
        for identity in set(identities):
            owners[identity] = together
    return owners


def output_heads(model: nn.Module) -> set[int]:
    """Output heads, where the model (of transformers) says which they are."""
    found: set[int] = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module):
            found.add(id(head))
    return found


def others(modules: dict[str, nn.Module], total: int, whole: Mapping[int, str]) -> Iterator[Skipped]:
    """Layers of other types that hold parameters of their own: embeddings, what is not taken apart (for the reasons in
    ``whole``, by identity), and whatever is large."""
    for name, module in modules.items():
        size = own_parameters(module)
        if not size or isinstance(module, parametrize.ParametrizationList):
            continue
        kind = type(module).__name__
        largest = max(module.parameters(recurse=False), key=numel, default=torch.empty(0))
        shape = () if is_lazy(largest) else tuple(largest.shape)
        if isinstance(module, nn.EmbeddingBag):
            yield Skipped(name, kind, shape, size, "an embedding of bags, whose rows are summed as they are read")
        elif id(module) in whole:
            yield Skipped(name, kind, shape, size, whole[id(module)])
        elif (adapter := structured_layer_of(module)) is not None:
            yield Skipped(name, kind, shape, size, f"already structured: {adapter.content(module).structure}")
        elif isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            yield Skipped(
                name,
                kind,
                shape,
                size,
                f"layers of type {kind} are not known to compress; those of one and two dimensions are",
            )
        elif len(shape) == 3 and size >= LARGE_SHARE * total:
            yield Skipped(
                name,
                kind,
                shape,
                size,
                f"it holds a weight of shape {shape}, which only {kind} knows how to read; if that is a matrix for "
                f"each expert, let it call an sm.nn.ExpertsLinear instead",
            )
        elif len(shape) >= 2 and size >= LARGE_SHARE * total:
            yield Skipped(name, kind, shape, size, f"layers of type {kind} are not known to compress")


def own_parameters(module: nn.Module) -> int:
    """Numbers that a module holds itself, also where they are parametrized."""
    size = sum(numel(p) for p in module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        size += sum(numel(p) for p in cast(nn.Module, module.parametrizations).parameters())
    return size


def numel(parameter: Tensor) -> int:
    """How many numbers it has; none before a lazy one has a shape."""
    return 0 if is_lazy(parameter) else parameter.numel()
