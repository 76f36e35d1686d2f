"""The terms of a Kronecker block that apply their factors in one order, stacked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from structmat.kernels import affine, apply
from structmat.nn.kronecker.activation import Activation, Slopes, is_pure, rectify
from structmat.nn.kronecker.direct import Direct, is_direct, run_direct, takes_direct
from structmat.nn.kronecker.recompute import recomputed
from structmat.nn.kronecker.shape import Bias, BlockShape, Order
from structmat.program import Chain, Contraction, Crop, Pad, Program
from structmat.structures.kronecker import lowered, stored_axes

TERM = -1
"""Stands for the axis of the terms in a list of axes."""


@dataclass(frozen=True)
class Gap:
    """A place between two stages.

    Args:
        place: its number, which is that of the stage before it.
        axes: of the array there, in the layout that the stages work with; :data:`TERM` is that of the terms.
        sizes: of these axes.
        made: the axis that the stage before it made.
    """

    place: int
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    made: int

    @property
    def numel(self) -> int:
        """Numbers there."""
        return math.prod(self.sizes)

    def along(self, *axes: int) -> tuple[int, ...]:
        """The shape of a tensor that varies along these axes and is the same along the others."""
        return tuple(size if axis in axes else 1 for axis, size in zip(self.axes, self.sizes, strict=True))

    def to_natural(self, tensor: Tensor) -> Tensor:
        """From a shape of :meth:`along` (or all sizes) to (terms, axis 0, axis 1, ...)."""
        return tensor.permute([self.axes.index(axis) for axis in (TERM, *range(len(self.axes) - 1))])

    def from_natural(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`to_natural`."""
        return tensor.permute([axis + 1 for axis in self.axes])


@dataclass(frozen=True)
class Layout:
    """How the terms of one order are computed: a program a run of linear stages, and the gaps between them.

    Args:
        shape: of the block.
        order: in which the axes are contracted.
        terms: that have this order.
    """

    shape: BlockShape
    order: Order
    terms: int

    @cached_property
    def gaps(self) -> tuple[Gap, ...]:
        """All places between stages, those without an activation too."""
        count = len(self.order)
        found = []
        for place, sizes in enumerate(self.shape.hidden(self.order)):
            made = self.order[place]
            if count == 2:
                axes: tuple[int, ...] = (0, TERM, 1)
            elif self.terms == 1:
                axes = (TERM, *range(count))
            else:
                axes = (TERM, made, *self.order[place + 1 :], *self.order[:place])
            by_axis = (*sizes, self.terms)
            found.append(Gap(place, axes, tuple(by_axis[axis] for axis in axes), made))
        return tuple(found)

    @cached_property
    def active(self) -> tuple[Gap, ...]:
        """The places where something happens."""
        return tuple(gap for gap, active in zip(self.gaps, self.shape.activated, strict=True) if active)

    def programs(self, *, merged: bool = False) -> tuple[Program, ...]:
        """From gap to gap of :attr:`active`; or, ``merged``, one program for the whole, as if nothing happened
        there."""
        shape = self.shape
        steps: list[Program] = []
        if shape.in_features < math.prod(shape.inputs):
            steps.append(Pad(shape.in_features, math.prod(shape.inputs)))
        stops = () if merged else tuple(gap.place for gap in self.active)
        parts: list[list[Program]] = [steps]
        place = 0
        for step in lowered(self.terms, shape.pairs, self.order).steps:
            parts[-1].append(step)
            if isinstance(step, Contraction):
                if place in stops:
                    parts.append([])
                place += 1
        if shape.out_features < shape.outer_array:
            parts[-1].append(Crop(shape.outer_array, shape.out_features))
        return tuple(part[0] if len(part) == 1 else Chain(tuple(part)) for part in parts)


class KroneckerChain(nn.Module):
    """The terms of a block that have the same order.

    Parameters: ``factor0``, ``factor1``, ... with an axis of the terms, stored as the stages read them (for two factors
    left first (m, k, n) and (q, k, p), right first (m, n, k) and (k, q, p)), and for each place with an activation
    ``bias0``, ... and, if the activation is :class:`Slopes`, ``slope0``, ...

    Args:
        layout: how they are computed.
        inner: the activation between stages.
        recompute: keep only the input for the backward pass.
    """

    def __init__(
        self,
        layout: Layout,
        inner: Activation | None,
        *,
        recompute: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.inner, self.recompute = layout, inner, recompute
        shape = layout.shape
        for index, (m, n) in enumerate(shape.pairs):
            where = stored_axes(layout.terms, layout.order, index)
            stored = [0, 0, 0]
            for axis, size in zip(where, (layout.terms, m, n), strict=True):
                stored[axis] = size
            self.register_parameter(f"factor{index}", nn.Parameter(torch.empty(stored, device=device, dtype=dtype)))
        for gap in layout.active:
            if shape.bias in (Bias.FULL, Bias.AXIS):
                sizes = gap.sizes if shape.bias is Bias.FULL else gap.along(TERM, gap.made)
                zeros = torch.zeros(sizes, device=device, dtype=dtype)
                self.register_parameter(f"bias{gap.place}", nn.Parameter(zeros))
            if isinstance(inner, Slopes):
                start = torch.full(gap.along(TERM), inner.start, device=device, dtype=dtype)
                if inner.learned:
                    self.register_parameter(f"slope{gap.place}", nn.Parameter(start))
                else:
                    self.register_buffer(f"slope{gap.place}", start)
        # Without biases and activations inside, all stages run in one pass.
        silent = inner is None and shape.bias not in (Bias.FULL, Bias.AXIS)
        self._gaps = () if silent else layout.active
        self._programs = layout.programs(merged=silent)
        self._names = tuple(
            name for kind in ("factor", "bias", "slope") for name in self._stored() if name.startswith(kind)
        )

        self._direct = self._as_direct()

    def _as_direct(self) -> Direct | None:
        """For the way without a graph: two factors, no padding, an activation that it knows."""
        layout, shape = self.layout, self.layout.shape
        full = (shape.in_features, shape.out_features) == (math.prod(shape.inputs), shape.outer_array)
        if len(layout.order) != 2 or not full or not self._gaps or not is_direct(self.inner):
            return None
        (m, n), (q, p) = shape.pairs
        (gap,) = self._gaps
        biased = shape.bias in (Bias.FULL, Bias.AXIS)
        return Direct(layout.order == (0, 1), m, n, p, q, layout.terms, self.inner, gap.sizes, biased)

    def _stored(self) -> list[str]:
        return [*self._parameters, *self._buffers]

    @property
    def is_direct(self) -> bool:
        """Whether it is trained by products and activations written out, without a graph inside."""
        return self._direct is not None

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Where something happens between the programs."""
        return self._gaps

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors."""
        return self._names

    @property
    def programs(self) -> tuple[Program, ...]:
        """The linear parts, in the order in which they run."""
        return self._programs

    def factors(self) -> tuple[Tensor, ...]:
        """The factors as matrices (terms, m_i, n_i), views of the parameters."""
        layout = self.layout
        return tuple(
            getattr(self, f"factor{i}").permute(stored_axes(layout.terms, layout.order, i))
            for i in range(len(layout.order))
        )

    def set_factors(self, factors: Sequence[Tensor]) -> None:
        """Copy matrices (terms, m_i, n_i) into the parameters."""
        with torch.no_grad():
            for own, given in zip(self.factors(), factors, strict=True):
                own.copy_(given)

    def natural_bias(self, gap: Gap) -> Tensor | None:
        """The bias at a gap as (terms, axis 0, axis 1, ...), with axes of size 1 where it is the same."""
        held = getattr(self, f"bias{gap.place}", None)
        return None if held is None else gap.to_natural(held)

    def slopes(self, gap: Gap) -> Tensor | None:
        """The slope of each term at a gap, (terms,)."""
        held = getattr(self, f"slope{gap.place}", None)
        return None if held is None else held.reshape(-1)

    def forward(self, x: Tensor, outer: Tensor | None = None) -> Tensor:
        """Rows (..., in_features) to (..., out_features), plus the bias ``outer`` (out_features,) if there is one."""
        tensors = [getattr(self, name) for name in self._names]
        if outer is not None:
            tensors.append(outer)
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            dtype = torch.get_autocast_dtype(x.device.type)
            x, tensors = x.to(dtype), [t.to(dtype) for t in tensors]
        if self._direct is not None and takes_direct(x, tensors) and x.shape[-1] == self.layout.shape.in_features:
            return run_direct(self._direct, self._run, x, tensors, recompute=self.recompute)
        if self.recompute and self._gaps and is_pure(self.inner):
            return recomputed(self._run, x, tensors)
        return self._run(x, tensors)

    def _run(self, x: Tensor, given: Sequence[Tensor]) -> Tensor:
        tensors = dict(zip(self._names, given, strict=False))
        outer = given[-1] if len(given) > len(self._names) else None
        return self.run_with(tensors, x, outer=outer)

    def run_with(
        self, tensors: dict[str, Tensor], x: Tensor, *, outer: Tensor | None = None, slope: Tensor | None = None
    ) -> Tensor:
        """What :meth:`forward` does, of given tensors, in operations that are differentiable any number of times.

        Args:
            tensors: by :attr:`names`.
            x: the rows.
            outer: the bias of the outcome.
            slope: of a rectifier, in place of what the inner activation holds itself.
        """
        for gap, program in zip(self._gaps, self._programs, strict=False):
            x = self.stage(program, tensors, x, self._flat(gap, tensors))
            x = self.activate(gap, x, tensors) if slope is None else rectify(x, slope)
        return self.stage(self._programs[-1], tensors, x, outer)

    def hidden(self, x: Tensor) -> list[tuple[Gap, Tensor]]:
        """What arrives at each activation, before it, as rows in the layout of the gap."""
        tensors = {name: getattr(self, name) for name in self._names}
        found = []
        for gap, program in zip(self._gaps, self._programs, strict=False):
            x = self.stage(program, tensors, x, self._flat(gap, tensors))
            found.append((gap, x))
            x = self.activate(gap, x, tensors)
        return found

    @staticmethod
    def stage(program: Program, tensors: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """A linear part with its bias."""
        return apply(program, tensors, x) if bias is None else affine(program, tensors, x, bias)

    @staticmethod
    def _flat(gap: Gap, tensors: dict[str, Tensor]) -> Tensor | None:
        held = tensors.get(f"bias{gap.place}")
        return None if held is None else held.expand(gap.sizes).reshape(-1)

    def activate(self, gap: Gap, rows: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """Apply the activation of a gap."""
        if self.inner is None:
            return rows
        if isinstance(self.inner, Slopes):
            slope = tensors[f"slope{gap.place}"]
            return rectify(rows.unflatten(-1, gap.sizes), slope).flatten(-len(gap.sizes))
        return self.inner(rows)
