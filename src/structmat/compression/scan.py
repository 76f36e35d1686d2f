"""Which layers of a model can be compressed, and why the others are kept."""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structmat.compression.kept import (
    Skipped,
    doubt_about,
    forbidden,
    numel,
    others,
    output_heads,
    own_parameters,
    weight_owners,
)
from structmat.compression.layers import Layer, layer_of, splitters
from structmat.compression.layers.embedding import Table
from structmat.compression.parts import Parts, Split, parts_of
from structmat.compression.split import kept_whole, split_apart
from structmat.errors import ModelError
from structmat.structure import Shape


@dataclass(frozen=True)
class Site:
    """A layer that can be compressed: a module that multiplies by one matrix, or by several of one form.

    Args:
        name: of the module in the model, as in ``model.get_submodule(name)``; where that is part of a recurrent net or
            of attention, in the model with these taken apart (:mod:`structmat.compression.split`).
        kind: ``"Linear"``, ``"Conv2d"`` and so on; ``"Conv1D"`` is that of transformers.
        shape: ``(out_features, in_features)`` of a matrix, whatever the storage; of the unfolded kernel of a group.
        bias: whether it has one.
        dtype: of the weight, such as ``"float32"``.
        aliases: other names of the same module.
        copies: how many matrices there are, all of which get one structure, each with tensors of its own.
        detail: what its cost depends on beside these, as its adapter says.
        tied: names of output heads that hold the weight of an embedding, and are replaced together with it.
        parts: rows that may get structures of their own, where that was asked for.
    """

    name: str
    kind: str
    shape: Shape
    bias: bool
    dtype: str
    aliases: tuple[str, ...] = ()
    copies: int = 1
    detail: Hashable = None
    tied: tuple[str, ...] = ()
    parts: Parts | None = None

    @property
    def numbers(self) -> int:
        """Of all its matrices."""
        return self.copies * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Scan:
    """What a model consists of. ``sites`` in the order of ``model.named_modules()``."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    total_parameters: int

    @property
    def compressible_parameters(self) -> int:
        """Numbers in the weights of the sites, biases not counted."""
        return sum(site.numbers for site in self.sites)


def scan(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    asked: Sequence[str] = (),
    split: Mapping[str, Split] | None = None,
) -> Scan:
    """Find the layers to compress: ``nn.Linear``, convolutions, and the matrices of recurrent nets and of attention.

    The adapters in :mod:`structmat.compression.layers` say what is known of each kind. Kept unless asked for are layers
    that are more than a linear map with a weight of their own: weights that are shared or tied, output heads, weights
    that another module reads, and layers with hooks. A layer is asked for by its exact name (without wildcards) in
    ``include`` or by a match in ``asked``. Weights that a parametrization computes are kept always.

    Args:
        model: any module; it may be on the meta device.
        include: glob patterns on names; empty means all. Exact names also ask for layers that would be kept.
        exclude: glob patterns of layers to keep; it wins over ``include``.
        asked: further glob patterns of layers to compress even if they would be kept.
        split: glob pattern to the parts of the rows that may get structures of their own; see
            :func:`structmat.compression.parts.parts_of`. Later patterns win.

    Raises:
        ModelError: a pattern matches no layer, a layer that was asked for can't be replaced at all, one can't be split
            as it was asked for, or nothing is left to compress.
    """
    with split_apart(model):
        found = _scan(model, include, exclude, asked)
        return replace(found, sites=_split(model, found.sites, split)) if split else found


def _split(model: nn.Module, sites: tuple[Site, ...], split: Mapping[str, Split]) -> tuple[Site, ...]:
    """The sites with the parts that they are asked to have."""
    parts: dict[str, Parts | None] = {}
    for pattern, asked in split.items():
        names = matching(pattern, sites)
        if not names:
            raise ModelError(
                f"The pattern {pattern!r} in split matches none of the {len(sites)} layers that are compressed, such "
                f"as {sites[0].name}."
            )
        for site in (site for site in sites if site.name in names):
            parent, child = parent_and_child(model, site.name)
            gates = max((s.gates(parent, child) for s in splitters() if s.is_split(parent)), default=1)
            adapter = adapter_of(model.get_submodule(site.name))
            if not adapter.stacks():
                raise ModelError(
                    f"{site.name} is a {site.kind} and can't be split: its rows get no structures of their own. Leave "
                    f"it out of the pattern {pattern!r}; linear layers and matrices of recurrent nets can."
                )
            parts[site.name] = parts_of(asked, site.name, site.shape[0], gates)
        if all(parts[name] is None for name in names):
            raise ModelError(
                f"{names[0]} has no gates, and nothing else matches the pattern {pattern!r} in split. Give the number "
                f"of equal parts, or the outputs of each, which are {_site(sites, names[0]).shape[0]} in all."
            )
    return tuple(replace(site, parts=parts.get(site.name)) for site in sites)


def _scan(model: nn.Module, include: Sequence[str], exclude: Sequence[str], asked: Sequence[str]) -> Scan:
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, module in modules.items():
        owner = first.setdefault(id(module), name)
        aliases.setdefault(owner, [])
        if owner != name:
            aliases[owner].append(name)
    adapters = {name: adapter for name in aliases if (adapter := layer_of(modules[name])) is not None}
    layers = {name: modules[name] for name in adapters}
    _check_patterns(layers, aliases, include, exclude, asked)
    owners = weight_owners(modules)
    heads = output_heads(model)
    sites: list[Site] = []
    skipped: list[Skipped] = []
    tables = {
        id(modules[name].weight): name
        for name, adapter in adapters.items()
        if adapter.looks_up
        and (any(n in include for n in (name, *aliases[name])) or _matches((name, *aliases[name]), asked))
        and not _matches((name, *aliases[name]), exclude)
    }
    for name, module in layers.items():
        names = (name, *aliases[name])
        wanted = any(n in include for n in names) or _matches(names, asked)
        table = tables.get(id(module.weight), name)
        reason = None
        if table != name:
            reason = f"its weight is that of {table}, with which it gets a structure"
        elif _matches(names, exclude):
            reason = "excluded by name"
        elif include and not _matches(names, include) and not wanted:
            reason = "not among the included names"
        else:
            refused = forbidden(name, module, modules, adapters[name], owners)
            if refused and wanted:
                raise ModelError(f"{name} was asked for but can't be replaced: {refused}. Leave it out.")
            reason = refused or (
                None if wanted else doubt_about(name, names, module, modules, owners, heads, adapters[name])
            )
        weight = cast(Tensor, module.weight)
        if reason is None:
            heads_ = tied_heads(model, module) if adapters[name].looks_up else ()
            sites.append(site_of(name, module, tuple(aliases[name]), heads_))
        else:
            shape_ = () if is_lazy(weight) else tuple(weight.shape)
            skipped.append(Skipped(name, type(module).__name__, shape_, own_parameters(module), reason))
    total = sum(numel(p) for p in model.parameters())
    skipped += others({n: modules[n] for n in aliases if n not in layers}, total, kept_whole(model))
    if not sites:
        kept = "; ".join(f"{s.name or 'the model itself'} ({s.kind}): {s.reason}" for s in skipped[:3])
        raise ModelError(
            f"{type(model).__name__} has no layer that can be compressed: {kept or 'it holds no layer with a weight'}. "
            f"Ask for a kept layer by its exact name in include, or pass a model with layers that are known."
        )
    return Scan(tuple(sites), tuple(skipped), total)


def _site(sites: Sequence[Site], name: str) -> Site:
    return next(site for site in sites if site.name == name)


def adapter_of(module: nn.Module) -> Layer:
    """The adapter of a site's module.

    Raises:
        ModelError: the module is of no kind that is known.
    """
    found = layer_of(module)
    if found is None:
        raise ModelError(f"Layers of type {type(module).__name__} are not known to compress. Leave them out.")
    return found


def site_of(name: str, module: nn.Module, aliases: tuple[str, ...] = (), tied: tuple[str, ...] = ()) -> Site:
    """What there is to say of a module. Raises :class:`~structmat.errors.ModelError`, as :func:`adapter_of`."""
    adapter = adapter_of(module)
    copies, shape = adapter.shape(module)
    dtype = str(cast(Tensor, module.weight).dtype).removeprefix("torch.")
    kind = adapter.kind(module) or ""
    bias, detail = getattr(module, "bias", None) is not None, adapter.detail(module)
    if tied:
        detail = Table(len(tied))
    return Site(name, kind, shape, bias, dtype, aliases, copies, detail, tied)


def tied_heads(model: nn.Module, embedding: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers whose weight is that of an embedding."""
    return tuple(
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and module.weight is embedding.weight
    )


def parent_and_child(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds ``name``, and the attribute's name."""
    parent, _, child = name.rpartition(".")
    return model.get_submodule(parent), child


# ------------------------------------------------------------------------------------------------------- patterns


def matching(pattern: str, sites: Sequence[Site]) -> list[str]:
    """Names of the sites that a glob pattern matches, by any of their names."""
    return [site.name for site in sites if _matches((site.name, *site.aliases), (pattern,))]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_patterns(
    layers: dict[str, nn.Module],
    aliases: dict[str, list[str]],
    include: Sequence[str],
    exclude: Sequence[str],
    asked: Sequence[str],
) -> None:
    names = [n for layer in layers for n in (layer, *aliases[layer])]
    for option, patterns in (("include", include), ("exclude", exclude), ("overrides", asked)):
        if isinstance(patterns, str):
            raise ModelError(f"{option}={patterns!r} is one string. Use a tuple of patterns: {option}=({patterns!r},).")
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise ModelError(
                    f"The pattern {pattern!r} in {option} matches none of the {len(names)} layers. "
                    f"Their names are {shown or 'none'}."
                )


def is_meta(model: nn.Module) -> bool:
    """Whether any parameter has no values."""
    return any(p.device == torch.device("meta") for p in model.parameters())
