"""Why layers are kept as they are."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from structmat.compression.layers import Layer, splitter_of, structured_layer_of

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
    if not cast(Tensor, module.weight).is_floating_point():
        return f"its weight has dtype {module.weight.dtype}, which is not real floating point"
    if adapter.looks_up:
        _, _, child = name.rpartition(".")
        if parent is not None and child in _weights_read_by(cast(Hashable, type(parent))):
            return f"{type(parent).__name__} reads its weight; let a head be an nn.Linear with the same weight"
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
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is computed by a parametrization"
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
    parent_name, _, child = name.rpartition(".")
    parent = modules[parent_name]
    if isinstance(parent, nn.TransformerEncoderLayer):
        return None  # reads weights in the fast path of evaluation, which it can be told to decline
    while isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential) and parent_name:
        parent_name, _, child = parent_name.rpartition(".")  # an item is read by who holds the list
        parent = modules[parent_name]
    if child in _weights_read_by(cast(Hashable, type(parent))):
        return f"{type(parent).__name__} reads its weight"
    return None


def read_by_parent(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the source of a module's parent reads tensors of it, which are not there once it is taken apart.

    Args:
        name: of a recurrent net or of attention.
        modules: of the model, by name.
    """
    parent_name, _, child = name.rpartition(".")
    parent = modules.get(parent_name)
    if parent is None or type(parent).__module__.startswith("torch.nn."):
        return False
    return any(own == child and read != "weight" for own, read in _tensors_read_by(cast(Hashable, type(parent))))


def _weights_read_by(parent: Hashable) -> frozenset[str]:
    """Names ``child`` for which the source of a class reads ``self.child.weight`` outside of initialisation."""
    return frozenset(child for child, read in _tensors_read_by(parent) if read == "weight")


_READS = re.compile(
    r"\bself\.(\w+)(?:\[[^\]]*\])?\.((?:weight|bias)_[ih][ihr]_l\w+|in_proj_\w+|[qkv]_proj_weight|out_proj\.weight|weight\b)"
)
"""A tensor of a child, or of an item of one."""


@cache
def _tensors_read_by(parent: Hashable) -> frozenset[tuple[str, str]]:
    """(child, tensor) that the source of a class reads of its children outside of initialisation."""
    found: set[tuple[str, str]] = set()
    for name, method in inspect.getmembers(parent, inspect.isfunction):
        if name.startswith("__") or "init" in name or name in ("reset_parameters", "extra_repr"):
            continue
        if (getattr(method, "__module__", None) or "").startswith("torch.nn.modules.module"):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(method))
        except (OSError, TypeError):
            continue  # a class without source: what it reads shows in calibration, where such layers are never called
        found.update(_READS.findall(source))
    return frozenset(found)


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


def others(modules: dict[str, nn.Module], total: int) -> Iterator[Skipped]:
    """Layers of other types that hold parameters of their own: embeddings, and whatever is large."""
    for name, module in modules.items():
        size = own_parameters(module)
        if not size or isinstance(module, parametrize.ParametrizationList):
            continue
        kind = type(module).__name__
        largest = max(module.parameters(recurse=False), key=numel, default=torch.empty(0))
        shape = () if is_lazy(largest) else tuple(largest.shape)
        if isinstance(module, nn.EmbeddingBag):
            yield Skipped(name, kind, shape, size, "an embedding of bags, whose rows are summed as they are read")
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
        elif splitter_of(module) is not None and len(shape) >= 2:
            reason = "it was not taken apart: it has hooks or parametrizations, or its tensors are read by others"
            yield Skipped(name, kind, shape, size, reason)
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
