"""Rows of the matrix of a program, without writing the matrix out and without multiplying unit vectors.

Row ``o`` is the transposed program's outcome for the unit vector ``e_o``. Going backwards through the stages, the index
of that vector runs over axes, each of which is *chosen* (one position a row, known) or *dense*. A contraction
``(a, b, c, d)`` cuts the index into three parts; of its weight only what lies at the chosen positions is read, and the
chosen axes of ``a`` and ``d`` stay chosen. So a row of a low-rank matrix is a row of one factor times the other, and a
row of a tensor train one slice of each core. Where an axis that is cut does not lie in these parts, or the stage is of
another kind, chosen axes are written out as zeros and a one, and the stage's transpose is applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from structmat.program.axes import cut
from structmat.program.combinators import Chain, Program, Sum, stages, tensor_sizes
from structmat.program.cost import cost
from structmat.program.derived import derive, underived
from structmat.program.fixed import Reorder, index_of
from structmat.program.reference import apply
from structmat.program.stage import Stage
from structmat.program.stages import Contraction, Crop, Diagonal, Pad, Permute, Shuffle
from structmat.program.transpose import transpose

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class LookupCost:
    """What one row takes.

    Args:
        macs: multiply-adds.
        widest: the longest vector in which a chosen position was written out; 0 if none was.
    """

    macs: int
    widest: int


def take_rows(program: Program, tensors: Tensors, index: Tensor) -> Tensor:
    """Rows (..., in_features) of a program's matrix at positions (...), differentiable in the tensors.

    Args:
        program: with plain or derived weights.
        tensors: by name.
        index: integers from 0 to ``out_features - 1``; they are not checked here.
    """
    program, made = derive(program, tensors)
    walk = _Walk(made, index.reshape(-1))
    return walk.run(program).reshape(*index.shape, program.in_features)


@lru_cache(maxsize=65536)
def lookup_cost(program: Program) -> LookupCost:
    """What one row takes, counted by going the way of :func:`take_rows` without values."""
    plain = underived(program)
    sizes = {**tensor_sizes(plain), **{name: s.in_features for s in stages(plain) for name in s.indices}}
    indices = {name for stage in stages(plain) for name in stage.indices}
    meta = {
        name: torch.empty(size, device="meta", dtype=torch.int64 if name in indices else torch.float32)
        for name, size in sizes.items()
    }
    walk = _Walk(meta, torch.zeros(1, device="meta", dtype=torch.int64))
    walk.run(plain)
    return LookupCost(walk.macs, walk.widest)


@dataclass(frozen=True)
class _Axis:
    """A part of the index; ``chosen`` are positions (rows,), or None where it is dense."""

    size: int
    chosen: Tensor | None = None


_Axes = tuple[_Axis, ...]


class _Walk:
    """One way backwards through a program, counting what it takes a row."""

    def __init__(self, tensors: Tensors, index: Tensor) -> None:
        self.tensors, self.index = tensors, index
        self.macs = self.widest = 0
        like = next((t for t in tensors.values() if t.is_floating_point() or t.is_complex()), None)
        self.like = torch.empty(0, device=index.device) if like is None else like

    def run(self, program: Program) -> Tensor:
        return self._through(program, (_Axis(program.out_features, self.index),), None)

    def _through(self, program: Program, axes: _Axes, values: Tensor | None) -> Tensor:
        """The outcome of the transpose of a program, (rows, in_features)."""
        todo: list[Program] = [program]
        while todo:
            step = todo.pop()
            if isinstance(step, Chain):
                todo.extend(step.steps)
            elif isinstance(step, Sum):
                first, *others = (self._through(part, axes, values) for part in step.parts)
                axes, values = (_Axis(step.in_features),), sum(others, start=first)
            else:
                axes, values = self._stage(step, axes, values)
        return self._written(axes, values)

    def _stage(self, stage: Stage, axes: _Axes, values: Tensor | None) -> tuple[_Axes, Tensor | None]:
        found: tuple[_Axes, Tensor | None] | None = None
        match stage:
            case Contraction():
                found = self._contraction(stage, axes, values)
            case Diagonal(spectrum=False):
                found = self._diagonal(stage, axes, values)
            case Shuffle():
                found = _shuffled(stage, axes, values)
            case Permute() | Reorder() if _is_chosen(axes):
                order = self._order(stage)
                found = (_Axis(stage.in_features, order[_flat(axes)]),), values
            case Crop() if _is_chosen(axes):
                found = (_Axis(stage.size, _flat(axes) + stage.before),), values
            case Pad() if _is_chosen(axes):
                found = self._padded(stage, axes, values)
            case _:
                pass
        if found is not None:
            return found
        wide = self._written(axes, values)
        if isinstance(stage, Crop):
            wide = functional.pad(wide, (stage.before, stage.size - stage.kept - stage.before))
        elif isinstance(stage, Pad):
            wide = wide[:, stage.before : stage.before + stage.size]
        else:
            self.macs += cost(stage).macs
            # Without values there is nothing to apply, and not every stage works on tensors that have none.
            wide = wide.new_empty(wide.shape[0], stage.in_features) if wide.is_meta else self._applied(stage, wide)
        return (_Axis(stage.in_features),), wide

    def _applied(self, stage: Stage, wide: Tensor) -> Tensor:
        return apply(transpose(stage), self.tensors, wide)

    def _order(self, stage: Permute | Reorder) -> Tensor:
        """``p`` with ``y[i] = x[p[i]]``."""
        if isinstance(stage, Reorder):
            return index_of(stage).to(self.index.device)
        index = self.tensors[stage.index]
        return torch.argsort(index) if stage.inverse else index

    def _padded(self, stage: Pad, axes: _Axes, values: Tensor | None) -> tuple[_Axes, Tensor]:
        """Rows outside of what is embedded are zero."""
        position = _flat(axes) - stage.before
        inside = ((position >= 0) & (position < stage.size)).to(self.like.dtype)
        chosen = position.clamp(0, stage.size - 1)
        return (_Axis(stage.size, chosen),), inside if values is None else values * inside

    def _contraction(self, stage: Contraction, axes: _Axes, values: Tensor | None) -> tuple[_Axes, Tensor] | None:
        parts = _cut(axes, (stage.a, stage.b, stage.d))
        if parts is None:
            return None
        a, b, d = parts
        weight = self.tensors[stage.weight].reshape(stage.stored_shape)
        weight = weight.transpose(1, 2) if stage.transposed else weight
        c = (_Axis(stage.c),) if stage.c > 1 else ()
        # The axes of the weight, and what indexes them: letters for dense ones and for c, positions for chosen ones.
        names = iter("abcdefghijklmnopqrsuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
        letters = {id(axis): next(names) for axis in (*a, *b, *c, *d) if axis.chosen is None}
        own = (*(() if stage.shared_a else a), *b, *c, *(() if stage.shared_d else d))
        weight = weight.reshape([axis.size for axis in own])
        chosen = [position for position, axis in enumerate(own) if axis.chosen is not None]
        left = [position for position, axis in enumerate(own) if axis.chosen is None]
        inner = "".join(letters[id(own[position])] for position in left)
        if chosen:
            held = [own[position].chosen for position in chosen]
            weight, inner = weight.permute(*chosen, *left)[tuple(held)], "t" + inner
        after = "t" + "".join(letters[id(axis)] for axis in (*a, *c, *d) if axis.chosen is None)
        if values is None and chosen:
            return (*a, *c, *d), weight.permute([inner.index(letter) for letter in after])
        if values is None:
            values = self.like.new_ones(self.index.shape[0])
        before = [axis for axis in (*a, *b, *d) if axis.chosen is None]
        values = values.reshape(values.shape[0], *(axis.size for axis in before))
        self.macs += math.prod(axis.size for axis in (*before, *c))
        given = "t" + "".join(letters[id(axis)] for axis in before)
        return (*a, *c, *d), torch.einsum(f"{inner},{given}->{after}", weight, values)

    def _diagonal(self, stage: Diagonal, axes: _Axes, values: Tensor | None) -> tuple[_Axes, Tensor]:
        weight = self.tensors[stage.weight].reshape([axis.size for axis in axes])
        chosen = [position for position, axis in enumerate(axes) if axis.chosen is not None]
        left = [position for position, axis in enumerate(axes) if axis.chosen is None]
        if chosen:
            weight = weight.permute(*chosen, *left)[tuple(axes[p].chosen for p in chosen)]
        if values is None:
            return axes, weight.expand(self.index.shape[0], *(weight.shape[1:] if axes else ()))
        self.macs += math.prod(axes[position].size for position in left)
        return axes, values * weight

    def _written(self, axes: _Axes, values: Tensor | None) -> Tensor:
        """The vectors (rows, size of the index)."""
        sizes = [axis.size for axis in axes]
        if not any(axis.chosen is not None for axis in axes):
            assert values is not None, "an index without chosen axes has values"
            return values.reshape(self.index.shape[0], math.prod(sizes))
        self.widest = max(self.widest, math.prod(sizes))
        values = self.like.new_ones(self.index.shape[0]) if values is None else values
        wide = values.new_zeros(self.index.shape[0], *sizes)
        rows = torch.arange(self.index.shape[0], device=self.index.device)
        # Positions come first in what is indexed so, and then the dense axes: as the values have them.
        where = (rows, *(slice(None) if axis.chosen is None else axis.chosen for axis in axes))
        wide[where] = values
        return wide.flatten(1)


def _shuffled(stage: Shuffle, axes: _Axes, values: Tensor | None) -> tuple[_Axes, Tensor | None] | None:
    """An array of ``sizes`` came in and its permuted axes went out."""
    parts = _cut(axes, [stage.sizes[axis] for axis in stage.axes])
    if parts is None:
        return None
    groups = [parts[stage.axes.index(position)] for position in range(len(stage.axes))]
    after = tuple(axis for group in groups for axis in group)
    if values is None:
        return after, None
    dense = [axis for group in parts for axis in group if axis.chosen is None]
    values = values.reshape(values.shape[0], *(axis.size for axis in dense))
    where = {id(axis): position for position, axis in enumerate(dense)}
    return after, values.permute(0, *(1 + where[id(axis)] for axis in after if axis.chosen is None))


def _is_chosen(axes: _Axes) -> bool:
    return bool(axes) and all(axis.chosen is not None for axis in axes)


def _flat(axes: _Axes) -> Tensor:
    """The position in the whole index, of chosen axes."""
    total: Tensor | None = None
    for axis in axes:
        assert axis.chosen is not None, axes
        total = axis.chosen if total is None else total * axis.size + axis.chosen
    assert total is not None, "an index has an axis"
    return total


def _cut(axes: _Axes, sizes: Sequence[int]) -> list[_Axes] | None:
    """The axes that make up parts of these sizes; where there is one position to choose, nothing is to be known."""
    return cut([axis for axis in axes if axis.size > 1 or axis.chosen is None], sizes, _halves)


def _halves(axis: _Axis, outer: int) -> tuple[_Axis, _Axis]:
    inner = axis.size // outer
    if axis.chosen is None:
        return _Axis(outer), _Axis(inner)
    return _Axis(outer, axis.chosen // inner), _Axis(inner, axis.chosen % inner)
