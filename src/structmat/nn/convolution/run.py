"""Running a plan on maps of channels, and counting its multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from structmat.kernels import apply
from structmat.modes import is_traced
from structmat.nn.convolution.geometry import Geometry, places
from structmat.nn.convolution.plan import (
    Add,
    Axes,
    Axis,
    Convolve,
    Plan,
    Reorder,
    Resize,
    Rows,
    Scale,
    Spread,
    Step,
    channels,
    full,
    taps_of,
)
from structmat.nn.kronecker.recompute import recomputed
from structmat.program import cost

PATCH_NUMBERS = 1 << 21
"""Numbers of patches that are written out at a time (8 MB in float32), unless one image alone has more."""


@dataclass(frozen=True)
class Run:
    """A plan with the tensors that it reads.

    Args:
        geometry: whose padding, if not of zeros, was done already.
        groups: of the layer; each tensor has a leading axis of that size.
        tensors: by name.
    """

    geometry: Geometry
    groups: int
    tensors: Mapping[str, Tensor]

    def __call__(self, plan: Plan, x: Tensor, bias: Tensor | None) -> Tensor:
        """The plan's outcome for (batch, groups * channels, *sizes), plus a bias (groups * outputs,)."""
        last = plan[-1]
        fused = bias if isinstance(last, Convolve) and is_plain(last) else None
        for step in plan[:-1]:
            x = self._step(step, x)
        x = self._convolve(last, x, fused) if isinstance(last, Convolve) else self._step(last, x)
        if bias is None or fused is not None:
            return x
        return x + bias.reshape(-1, *[1] * self.geometry.dims)

    def _step(self, step: Step, x: Tensor) -> Tensor:
        dims, groups = self.geometry.dims, self.groups
        match step:
            case Convolve():
                return self._convolve(step, x, None)
            case Scale():
                return x * self.tensors[step.stage.weight].reshape(-1, *[1] * dims)
            case Reorder():
                inner = x.reshape(x.shape[0], groups, *step.sizes, *x.shape[2:])
                last = range(2 + len(step.sizes), inner.dim())
                return inner.permute(0, 1, *(2 + axis for axis in step.axes), *last).reshape(x.shape)
            case Resize():
                lead = x.unflatten(1, (groups, x.shape[1] // groups // step.unit, step.unit))
                return F.pad(lead, [0] * (2 * dims + 2) + [step.before, step.after]).flatten(1, 3)
            case Spread():
                return self._spread(step, x)
            case Rows():
                return self._rows(step, x)
            case Add():
                total = self(step.parts[0], x, None)
                for part in step.parts[1:]:
                    total = total + self(part, x, None)
                return total

    def _convolve(self, step: Convolve, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = _kernels(step, self.tensors[step.stage.weight], self.groups, self.geometry.dims)
        if not step.each:
            return self._grouped(step, x, weight, bias)
        taps = [axis for axis in (*step.a, *step.d) if axis.tap in step.each]
        outcomes = []
        for index in product(*(range(axis.size) for axis in taps)):
            view = x
            for axis, tap in zip(taps, index, strict=True):
                assert axis.tap is not None
                view = self.geometry.select(view, axis.tap, tap)
            outcomes.append(self._grouped(step, view, weight[index], None))
        # (*taps, batch, groups, *channels, *sizes), then each axis of taps at its own place among the channels
        y = torch.stack(outcomes)
        index_axes = (*step.a, Axis(step.stage.b), *step.d)
        held = [axis.size for axis in index_axes if axis.tap is None]
        y = y.reshape(*(axis.size for axis in taps), x.shape[0], self.groups, *held, *y.shape[3:])
        tap_at, channel_at = iter(range(len(taps))), iter(range(len(taps) + 2, y.dim()))
        order = [len(taps), len(taps) + 1]
        for axis in index_axes:
            if axis.tap is None:
                order.append(next(channel_at))
            elif axis.tap in step.each:
                order.append(next(tap_at))
        y = y.permute(*order, *channel_at)
        return y.flatten(1, -self.geometry.dims - 1)

    def _grouped(self, step: Convolve, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One convolution. ``weight`` is (groups, a, d, b, c, *kernel), with ``a`` and ``d`` of size 1 if shared."""
        groups, a, d, b, c = weight.shape[:5]
        kernel = weight.flatten(0, 3)
        count = groups * a * d
        along = step.along
        if is_plain(step):
            return self.geometry.convolve(x, kernel, bias, count, along)
        batch, (shared_a, shared_d) = x.shape[0], (channels(step.a) // a, channels(step.d) // d)
        sizes = range(7, 7 + self.geometry.dims)
        y = x.reshape(batch, groups, a, shared_a, c, d, shared_d, *x.shape[2:])
        y = y.permute(0, 3, 6, 1, 2, 5, 4, *sizes)
        y = y.reshape(batch * shared_a * shared_d, count * c, *x.shape[2:])
        y = self.geometry.convolve(y, kernel, None, count, along)
        y = y.reshape(batch, shared_a, shared_d, groups, a, d, b, *y.shape[2:])
        return y.permute(0, 3, 4, 1, 6, 5, 2, *sizes).flatten(1, 6)

    def _spread(self, step: Spread, x: Tensor) -> Tensor:
        spread = taps_of(step.axes)
        for tap in step.taps:
            if tap not in spread:
                x = self.geometry.select(x, tap, 0)
        x = x.reshape(x.shape[0], self.groups, *(a.size for a in step.axes if a.tap is None), *x.shape[2:])
        for position, axis in enumerate(step.axes):
            if axis.tap is not None:
                taps = [self.geometry.select(x, axis.tap, tap) for tap in range(axis.size)]
                x = torch.stack(taps, 2 + position)
        return x.flatten(1, -self.geometry.dims - 1)

    def _rows(self, step: Rows, x: Tensor) -> Tensor:
        if not step.taps:
            return self._pointwise(step, x)
        sizes = [
            self.geometry.out_size(axis, size) if axis in step.taps else size for axis, size in enumerate(x.shape[2:])
        ]
        numbers = places(sizes) * self.groups * full(step.axes)
        images = max(1, PATCH_NUMBERS // max(1, numbers))
        if is_traced() or x.shape[0] <= images:
            return self._patches(step, x)
        names = tuple(self.tensors)

        def some(part: Tensor, given: Sequence[Tensor]) -> Tensor:
            return Run(self.geometry, self.groups, dict(zip(names, given, strict=True)))._patches(step, part)

        # The patches of all parts together are what must not be kept for the backward pass.
        given = tuple(self.tensors.values())
        return torch.cat([recomputed(some, part, given) for part in x.split(images)])

    def _patches(self, step: Rows, x: Tensor) -> Tensor:
        dims, groups = self.geometry.dims, self.groups
        held = [axis.size for axis in step.axes if axis.tap is None]
        own, spread = _only(self.geometry, step.taps), taps_of(step.axes)
        y = own.windows(x.reshape(x.shape[0], groups, *held, *x.shape[2:]))
        # (batch, groups, *channels, *places, *taps) to (groups, batch, *places, *index)
        first = 2 + len(held)
        where, order = iter(range(2, first)), []
        for axis in step.axes:
            order.append(next(where) if axis.tap is None else first + dims + axis.tap)
        ones = [first + dims + axis for axis in range(dims) if axis not in spread]
        y = y.permute(1, 0, *range(first, first + dims), *order, *ones)
        return self._multiplied(step, y.flatten(2 + dims))

    def _pointwise(self, step: Rows, x: Tensor) -> Tensor:
        return self._multiplied(
            step, x.unflatten(1, (self.groups, x.shape[1] // self.groups)).movedim(1, 0).movedim(2, -1)
        )

    def _multiplied(self, step: Rows, rows: Tensor) -> Tensor:
        """Of (groups, batch, *places, index): (batch, groups * outputs, *places)."""
        made = [
            apply(step.program, {name: tensor[group] for name, tensor in self.tensors.items()}, rows[group])
            for group in range(self.groups)
        ]
        y = torch.stack(made, 1) if self.groups > 1 else made[0].unsqueeze(1)
        return y.movedim(-1, 2).flatten(1, 2)


def _only(geometry: Geometry, taps: Sequence[int]) -> Geometry:
    """The geometry along some axes; along the others every place reads itself."""
    if len(taps) == geometry.dims:
        return geometry
    keep = [axis in taps for axis in range(geometry.dims)]

    def pick(values: Sequence[int], other: int) -> tuple[int, ...]:
        return tuple(value if kept else other for value, kept in zip(values, keep, strict=True))

    return Geometry(
        pick(geometry.kernel, 1),
        pick(geometry.stride, 1),
        pick(geometry.dilation, 1),
        tuple(pair if kept else (0, 0) for pair, kept in zip(geometry.padding, keep, strict=True)),
        geometry.mode,
        geometry.transposed,
        pick(geometry.output_padding, 0) if geometry.transposed else (),
    )


def is_plain(step: Convolve) -> bool:
    """Whether channels come and go in the order in which a grouped convolution has them."""
    stage = step.stage
    shared = (stage.shared_a and channels(step.a) > 1) or (stage.shared_d and channels(step.d) > 1)
    return not step.each and not shared and channels(step.d) == 1


def _kernels(step: Convolve, weight: Tensor, groups: int, dims: int) -> Tensor:
    """A stored weight as (*each, groups, a, d, b, c, *kernel), with ``a`` and ``d`` of size 1 where shared."""
    stage = step.stage
    weight = weight.reshape(groups, *stage.stored_shape)
    if stage.transposed:
        weight = weight.transpose(2, 3)
    a: Axes = () if stage.shared_a else step.a
    d: Axes = () if stage.shared_d else step.d
    weight = weight.reshape(groups, *(x.size for x in a), stage.b, *(x.size for x in (*step.c, *d)))
    of_a = range(1, 1 + len(a))
    of_c = range(2 + len(a), 2 + len(a) + len(step.c))
    of_d = range(of_c.stop, of_c.stop + len(d))
    each = [i for i, axis in zip((*of_a, *of_d), (*a, *d), strict=True) if axis.tap is not None]
    taps = {axis.tap: i for i, axis in zip(of_c, step.c, strict=True) if axis.tap is not None}
    wide = [[i for i in part if i not in each and i not in taps.values()] for part in (of_a, of_d, of_c)]
    order = [*each, 0, *wide[0], *wide[1], 1 + len(a), *wide[2], *(taps[axis] for axis in sorted(taps))]
    flat_a, flat_d, flat_c = [places([weight.shape[i] for i in part]) for part in wide]
    outer = [weight.shape[i] for i in each]
    kernel = [weight.shape[taps[axis]] if axis in taps else 1 for axis in range(dims)]
    return weight.permute(order).reshape(*outer, groups, flat_a, flat_d, stage.b, flat_c, *kernel)


def multiply_adds(plan: Plan, geometry: Geometry, groups: int, sizes: Sequence[int]) -> int:
    """Of one input of these sizes: products with weights, whatever is padding."""
    return _count(plan, geometry, groups, list(sizes))


def _count(plan: Plan, geometry: Geometry, groups: int, sizes: list[int]) -> int:
    total = 0
    for step in plan:
        taps: Sequence[int] = ()
        match step:
            case Convolve():
                stage = step.stage
                after = [*sizes]
                for axis in (*step.each, *step.along):
                    after[axis] = geometry.out_size(axis, sizes[axis])
                # A transposed convolution multiplies at the places of its input.
                at = [
                    sizes[axis] if geometry.transposed and axis in step.along else after[axis]
                    for axis in range(geometry.dims)
                ]
                each = places([axis.size for axis in (*step.a, *step.d) if axis.tap in step.each])
                inner = channels(step.a) * stage.b * stage.c * channels(step.d)
                total += groups * each * inner * places(at)
                sizes = after
                continue
            case Scale():
                total += groups * step.stage.size * places(sizes)
            case Spread():
                taps = step.taps
            case Rows():
                sizes = [geometry.out_size(axis, n) if axis in step.taps else n for axis, n in enumerate(sizes)]
                total += groups * cost(step.program).macs * places(sizes)
            case Add():
                total += sum(_count(part, geometry, groups, [*sizes]) for part in step.parts)
                taps = step.taps
            case _:
                pass
        sizes = [geometry.out_size(axis, n) if axis in taps else n for axis, n in enumerate(sizes)]
    return total
