"""From the program of an unfolded kernel to steps on maps of channels: what need not be unfolded is not.

The program multiplies a patch, whose index runs over axes: channels and the taps of the kernel. A patch at every place
of the output is what unfolding writes out. But while no weight has told the taps of an axis apart, the value at tap
``t`` is that at tap 0 of another place: the axis is *latent*, one map holds it, and nothing is written out. A
contraction ``(a, b, c, d)`` cuts the index at its sizes; for each axis of taps there are three cases:

- it lies in ``c``: the contraction is a convolution along that axis, with the other axes of ``c`` as its channels and
  those of ``a`` and ``d`` as groups;
- it lies in ``a`` or ``d``, and the weight is shared there: it stays latent, and is computed once for all taps;
- it lies in ``a`` or ``d``, and each tap has weights of its own: one convolution a tap, on shifted views.

What cuts through an axis of taps, or has no such form (sparse stages, permutations, Fourier transforms), runs on
patches that are written out, for a few images at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from structmat.program import Chain, Contraction, Crop, Diagonal, Pad, Program, Shuffle, Sum
from structmat.program.axes import cut


@dataclass(frozen=True)
class Axis:
    """One axis of the index: so many channels, or the taps of an axis of the kernel."""

    size: int
    tap: int | None = None


Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Convolve:
    """A contraction as convolutions.

    Args:
        stage: the contraction.
        a, c, d: the axes of the index within its parts.
        along: axes of the kernel along which it convolves.
        each: axes of the kernel whose taps have weights of their own, and so a convolution each.
    """

    stage: Contraction
    a: Axes
    c: Axes
    d: Axes
    along: tuple[int, ...]
    each: tuple[int, ...]

    @property
    def in_channels(self) -> int:
        """Channels of the map that comes in, of one group of the layer."""
        return channels((*self.a, *self.c, *self.d))

    @property
    def out_channels(self) -> int:
        """Those of the map that goes out, without what the taps of :attr:`each` add."""
        return channels(self.a) * self.stage.b * channels(self.d)


@dataclass(frozen=True)
class Scale:
    """A diagonal as a number for each channel."""

    stage: Diagonal


@dataclass(frozen=True)
class Reorder:
    """Channels, viewed as an array of ``sizes``, with their ``axes`` permuted."""

    sizes: tuple[int, ...]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Resize:
    """Channels put into more of them, or some of them kept: positions in steps of ``unit``.

    Negative numbers crop.
    """

    before: int
    after: int
    unit: int


@dataclass(frozen=True)
class Spread:
    """The taps of latent axes written out as channels: of what comes out of a program whose output they index.

    Args:
        axes: of the index.
        taps: axes of the kernel that are applied here, also those of size 1.
    """

    axes: Axes
    taps: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """The rest of the program, on patches that are written out (or on the channels at each place, if none is latent).

    Args:
        program: what is left.
        axes: of its input.
        taps: axes of the kernel that are still to be applied.
    """

    program: Program
    axes: Axes
    taps: tuple[int, ...]


@dataclass(frozen=True)
class Add:
    """Several plans for the same input, their outputs added.

    Args:
        parts: the plans, each of which applies all axes of the kernel that are left.
        taps: these axes.
    """

    parts: tuple[tuple[Step, ...], ...]
    taps: tuple[int, ...]


Step = Convolve | Scale | Reorder | Resize | Spread | Rows | Add
Plan = tuple[Step, ...]


def channels(axes: Axes) -> int:
    """The product of the sizes that are not of taps."""
    return math.prod([axis.size for axis in axes if axis.tap is None])  # of a list: compilers follow no generator here


def full(axes: Axes) -> int:
    """The product of all sizes."""
    return math.prod([axis.size for axis in axes])


def taps_of(axes: Axes) -> tuple[int, ...]:
    """The axes of the kernel among these."""
    return tuple(axis.tap for axis in axes if axis.tap is not None)


def is_lowered(plan: Plan) -> bool:
    """Whether no patch is written out."""
    for step in plan:
        if isinstance(step, Rows) and step.taps:
            return False
        if isinstance(step, Add) and not all(map(is_lowered, step.parts)):
            return False
    return True


def unfolded(program: Program, axes: Axes, dims: int) -> Plan:
    """The plan that writes all patches out."""
    return (Rows(program, axes, tuple(range(dims))),)


def lower(program: Program, axes: Axes, dims: int) -> Plan:
    """The steps that multiply by a program.

    Args:
        program: of the unfolded kernel of one group.
        axes: of its input, in the order of the unfolded index; those of size 1 may be left out.
        dims: axes of the kernel.
    """
    assert full(axes) == program.in_features, (axes, program)
    steps, state = _chain(program, _State(_merged(axes), tuple(range(dims))))
    return (*steps, *_finish(state))


@dataclass(frozen=True)
class _State:
    """What the maps hold: the axes of the index, and which axes of the kernel are still to be applied."""

    axes: Axes
    taps: tuple[int, ...]


def _finish(state: _State) -> Plan:
    return (Spread(state.axes, state.taps),) if state.taps else ()


def _chain(program: Program, state: _State) -> tuple[Plan, _State]:
    todo = [*program.steps] if isinstance(program, Chain) else [program]
    done: list[Step] = []
    while todo:
        found = _one(todo[0], state)
        if found is None:
            rest = Chain(tuple(todo)) if len(todo) > 1 else todo[0]
            done.append(Rows(rest, state.axes, state.taps))
            return tuple(done), _State((Axis(program.out_features),), ())
        steps, state = found
        done.extend(steps)
        todo.pop(0)
    return tuple(done), state


def _one(step: Program, state: _State) -> tuple[Plan, _State] | None:
    match step:
        case Chain():
            return _chain(step, state)
        case Sum():
            parts = []
            for part in step.parts:
                steps, end = _chain(part, state)
                parts.append((*steps, *_finish(end)))
            return (Add(tuple(parts), state.taps),), _State((Axis(step.out_features),), ())
        case Contraction():
            return _contraction(step, state)
        case Shuffle():
            return _shuffle(step, state)
        case Pad() | Crop():
            return _resize(step, state)
        case Diagonal(spectrum=False) if not taps_of(state.axes):
            return (Scale(step),), state
        case _:
            return None


def _contraction(stage: Contraction, state: _State) -> tuple[Plan, _State] | None:
    parts = cut(state.axes, (stage.a, stage.c, stage.d), _halves)
    if parts is None:
        return None
    a, c, d = parts
    own = [*(() if stage.shared_a else taps_of(a)), *(() if stage.shared_d else taps_of(d))]
    latent = {*taps_of(a), *taps_of(d)}
    # An axis of the kernel of size 1 is in no part: the first convolution has its stride and padding.
    along = tuple(tap for tap in state.taps if tap not in latent)
    step = Convolve(stage, a, c, d, along, tuple(own))
    left = tuple(tap for tap in state.taps if tap in latent and tap not in own)
    after = (*_applied(a, own), Axis(stage.b), *_applied(d, own))
    return (step,), _State(_merged(after), left)


def _applied(axes: Axes, taps: Sequence[int]) -> Axes:
    return tuple(replace(axis, tap=None) if axis.tap in taps else axis for axis in axes)


def _shuffle(stage: Shuffle, state: _State) -> tuple[Plan, _State] | None:
    parts = cut(state.axes, stage.sizes, _halves)
    if parts is None:
        return None
    after = tuple(axis for position in stage.axes for axis in parts[position])
    sizes = tuple(channels(group) for group in parts)
    moved = [position for position in stage.axes if sizes[position] > 1]
    steps: Plan = () if moved == sorted(moved) else (Reorder(sizes, stage.axes),)
    return steps, _State(_merged(after), state.taps)


def _resize(stage: Pad | Crop, state: _State) -> tuple[Plan, _State] | None:
    """Whole channels at either end, if channels are the outermost axis."""
    lead = state.axes[0] if state.axes else Axis(1)
    if lead.tap is not None:
        return None
    unit = stage.in_features // lead.size
    if stage.before % unit or stage.out_features % unit:
        return None
    before = stage.before if isinstance(stage, Pad) else -stage.before
    after = stage.out_features - stage.in_features - before
    inner = channels(state.axes) // lead.size
    axes = _merged((Axis(stage.out_features // unit), *state.axes[1:]))
    return (Resize(before // unit, after // unit, inner),), _State(axes, state.taps)


def _merged(axes: Axes) -> Axes:
    """Neighbouring channels as one axis, and no axis of size 1."""
    merged: list[Axis] = []
    for axis in axes:
        if axis.size == 1:
            continue
        if merged and merged[-1].tap is None and axis.tap is None:
            merged[-1] = Axis(merged[-1].size * axis.size)
        else:
            merged.append(axis)
    return tuple(merged)


def _halves(axis: Axis, outer: int) -> tuple[Axis, Axis] | None:
    """Channels can be split, taps can't."""
    return None if axis.tap is not None else (Axis(outer), Axis(axis.size // outer))
