"""Linear circuits as programs: levels become sparse stages, or the stages that they are recognized to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structmat.circuit import Circuit, Layer, latest_levels, layers, narrow_levels
from structmat.circuit.arrays import Ints, Numbers, is_order, owners
from structmat.circuit.kaleidoscope import Kaleidoscope, MonarchProduct
from structmat.circuit.simplify import prune, without_zero_terms
from structmat.errors import CircuitError, ShapeError
from structmat.program.combinators import Chain, Program, stages
from structmat.program.patterns import Blocks, blocks
from structmat.program.simplify import simplify
from structmat.program.stages import Contraction, Crop, Diagonal, Pad, Permute, Sparse


@dataclass(frozen=True, eq=False)
class Source:
    """Where the entries of a tensor come from: a number each, times a parameter of the circuit (-1 for none)."""

    weight: Numbers
    parameter: Ints


@dataclass(frozen=True, eq=False)
class Compiled:
    """A circuit as a program.

    Attributes:
        program: what runs, on any backend.
        indices: the fixed integer tensors that it reads.
        sources: of the learned tensors that it reads. Each entry is a number of its own, also where the circuit has
            one parameter in several places.
        values: the circuit's parameters.
    """

    program: Program
    indices: Mapping[str, Tensor]
    sources: Mapping[str, Source]
    values: Numbers

    def tensors(self, parameters: Tensor | None = None, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All tensors of the program, learned and fixed.

        Args:
            parameters: (parameters,) values in place of the circuit's own, which the tensors are differentiable in.
            dtype: of the learned tensors; None for that of ``parameters``, or PyTorch's default. Complex numbers make
                it the complex type of the same precision.

        Raises:
            ShapeError: ``parameters`` has another shape.
        """
        wanted = dtype or (torch.get_default_dtype() if parameters is None else parameters.dtype)
        numbers = [source.weight for source in self.sources.values()] + [self.values]
        if any(n.dtype.kind == "c" for n in numbers) and not wanted.is_complex:
            wanted = wanted.to_complex()
        own = _tensor(self.values, wanted) if parameters is None else parameters.to(wanted)
        if own.shape != (len(self.values),):
            raise ShapeError(f"The circuit has {len(self.values)} parameters; got shape {tuple(own.shape)}.")
        found = dict(self.indices)
        for name, source in self.sources.items():
            weight = _tensor(source.weight, wanted)
            trained = source.parameter >= 0
            if trained.any():
                read = own[torch.from_numpy(np.where(trained, source.parameter, 0))]
                weight = weight * torch.where(torch.from_numpy(trained), read, torch.ones_like(read))
            found[name] = weight
        return found


def from_circuit(circuit: Circuit, *, recognize: bool = True) -> Compiled:
    """The program of a linear circuit: one stage or two for each level, between which only live values are kept.

    A level of dense blocks of one size becomes a contraction, after a permutation where the blocks are in no regular
    order; one that scales becomes a diagonal, and one that only moves values costs nothing. The rest becomes sparse
    stages, in which a value that is carried on to a later level is an entry of 1. Of the earliest, the latest and the
    narrowest schedule the one with the fewest multiplications is taken.

    Args:
        circuit: linear, with at least one input and one output.
        recognize: look for contractions, diagonals and permutations.

    Raises:
        CircuitError: the circuit is not linear, or has no inputs or no outputs.
    """
    if not circuit.in_features or not circuit.out_features:
        raise CircuitError(
            f"A program has inputs and outputs; the circuit has {circuit.in_features} and {circuit.out_features}."
        )
    if not circuit.is_linear:
        raise CircuitError(
            "A program is linear, but the circuit is not. Its terms of degree 1 are circuit.linear_part()."
        )
    live = prune(without_zero_terms(circuit))
    schedules = [live.levels, latest_levels(live), narrow_levels(live)]
    found = [_compiled(circuit, layers(live, levels), recognize) for levels in schedules]
    return min(found, key=lambda c: sum(stage.multiplications for stage in stages(c.program)))


def from_product(product: Kaleidoscope | MonarchProduct) -> Compiled:
    """The program of a product of butterfly or Monarch matrices: one contraction for each factor.

    All entries are learned, the zeros and ones too: so a kaleidoscope matrix starts as a known algorithm. Neighboring
    factors at one stride are multiplied by :func:`~structmat.program.fuse.fuse`, where that is wanted.

    Raises:
        CircuitError: it has no inputs or no outputs.
    """
    if not product.in_features or not product.out_features:
        raise CircuitError(
            f"A program has inputs and outputs; the product has {product.in_features} and {product.out_features}."
        )
    if isinstance(product, Kaleidoscope):
        factors = [(factor.pattern, factor.weight) for factor in product.product.stages]
    else:
        factors = [(factor.pattern, factor.weight) for factor in product.stages]
    steps: list[Program] = [Pad(product.in_features, product.size)]
    sources = {}
    for number, (pattern, weight) in enumerate(factors):
        steps.append(Contraction(f"factor{number}", *pattern))
        sources[f"factor{number}"] = Source(weight, np.full(weight.shape, -1))
    steps.append(Crop(product.size, product.out_features))
    return Compiled(simplify(Chain(tuple(steps))), {}, sources, np.zeros(0))


class _Steps:
    """Stages and their tensors, numbered as they come."""

    def __init__(self) -> None:
        self.stages: list[Program] = []
        self.indices: dict[str, Tensor] = {}
        self.sources: dict[str, Source] = {}

    def permute(self, order: Ints) -> None:
        """A permutation, unless it is the identity."""
        if is_order(order):
            return
        name = f"order{len(self.stages)}"
        self.indices[name] = torch.from_numpy(order.astype(np.int64))
        self.stages.append(Permute(name, len(order)))

    def source(self, layer: Layer, entry: Ints) -> str:
        """A learned tensor of these entries of a layer: its name."""
        name = f"weight{len(self.stages)}"
        self.sources[name] = Source(layer.weight[entry], layer.parameter[entry])
        return name


def _compiled(circuit: Circuit, chosen: tuple[Layer, ...], recognize: bool) -> Compiled:
    steps = _Steps()
    where = np.arange(circuit.in_features)
    for layer in chosen:
        found = _blocks(steps, where, layer) if recognize else None
        if found is None:
            row, column = owners(layer.start), where[layer.column]
            # Entries in one place stay apart: their parameters may differ.
            order = np.lexsort((column, row))
            name, places = steps.source(layer, order), f"places{len(steps.stages)}"
            steps.indices[places] = torch.from_numpy((row * layer.columns + column)[order])
            steps.stages.append(Sparse(name, places, layer.rows, layer.columns, len(order)))
            where = np.arange(layer.rows)
            continue
        if found.order is not None:
            steps.permute(found.order)
        a, b, c, d = found.pattern
        entry = found.entry.ravel()
        if b * c > 1:
            steps.stages.append(Contraction(steps.source(layer, found.entry), a, b, c, d))
        elif np.any(layer.weight[entry] != 1) or np.any(layer.parameter[entry] >= 0):
            steps.stages.append(Diagonal(steps.source(layer, entry), len(entry)))
        where = found.where
    # A contraction leaves the rows of a block apart; the outputs go back to their order.
    steps.permute(where)
    if not steps.stages:
        steps.stages.append(Crop(circuit.in_features, circuit.out_features))
    return Compiled(simplify(Chain(tuple(steps.stages))), steps.indices, steps.sources, circuit.values)


def _blocks(steps: _Steps, where: Ints, layer: Layer) -> Blocks | None:
    """The layer's blocks; what it does not read is dropped before, which only the first layer leaves to do."""
    read = np.zeros(layer.columns, dtype=np.bool_)
    read[layer.column] = True
    if read.all():
        return blocks(where, layer.start, layer.column)
    # In the order of reading, so that a selection of inputs is one permutation.
    _, first = np.unique(layer.column, return_index=True)
    kept = layer.column[np.sort(first)]
    number = np.full(layer.columns, -1)
    number[kept] = np.arange(len(kept))
    found = blocks(np.arange(len(kept)), layer.start, number[layer.column])
    if found is not None:
        steps.permute(np.concatenate([where[kept], where[np.flatnonzero(~read)]]))
        steps.stages.append(Crop(layer.columns, len(kept)))
    return found


def _tensor(values: Numbers, dtype: torch.dtype) -> Tensor:
    wide = values.astype(complex if dtype.is_complex else float) if values.dtype == object else values
    return torch.from_numpy(np.array(wide)).to(dtype)
