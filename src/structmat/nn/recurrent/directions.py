"""One direction of one layer over all times: one product for the inputs, one call a time for the state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structmat.kernels import Product, repeated, tuning
from structmat.kernels.recorded_recurrence import recordable
from structmat.kernels.recurrence import recur
from structmat.modes import is_followed
from structmat.nn.linear import FrozenLinear, StructuredLinear
from structmat.nn.recurrent.cells import Cell, State
from structmat.nn.recurrent.gates import GateLinear
from structmat.nn.recurrent.hooks import is_hooked
from structmat.nn.recurrent.packing import packing
from structmat.nn.recurrent.parts import in_parts
from structmat.nn.recurrent.recorded import run_recorded
from structmat.nn.recurrent.source import Source, source
from structmat.program import Program


def run_direction(
    cell: Cell,
    matrices: tuple[nn.Module, nn.Module, nn.Module | None],
    x: Tensor,
    sizes: list[int] | None,
    state: State,
    y: Tensor | None,
    *,
    backwards: bool,
) -> tuple[Tensor, State]:
    """All outputs of a direction and its last state.

    Args:
        cell: the equations.
        matrices: of the input, of the state and of the projection.
        x: the inputs (times, rows, inputs), or (all rows, inputs) if packed.
        sizes: how many rows each time has, not increasing, if packed; else None.
        state: before, (rows, size) each.
        y: where the outputs are written, (times, rows, state size), where nothing records them; or None.
        backwards: whether the last time is read first.

    Returns:
        (times, rows, state size), or (all rows, state size) if packed, which is ``y`` if that is given; and the
        state, each row's after its own last time.
    """
    inputs, recurrent, projection = matrices
    if y is not None:
        return y, _written(cell, matrices, x, state, y, backwards)
    gates = inputs(x)
    if sizes is not None:
        found = None if projection is not None else _packed_at_once(cell, recurrent, gates, sizes, state, backwards)
        return found or _packed(cell, recurrent, projection, gates, sizes, state, backwards)
    if projection is None:
        recorded = recordedly(cell, recurrent, gates, state, backwards=backwards)
        if recorded is not None:
            return recorded
    outputs = []
    for now in reversed(gates.unbind(0)) if backwards else gates.unbind(0):
        state = _stepped(cell, recurrent, projection, now, state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _written(
    cell: Cell,
    matrices: tuple[nn.Module, nn.Module, nn.Module | None],
    x: Tensor,
    state: State,
    y: Tensor,
    backwards: bool,
) -> State:
    """The state after all times, whose outputs are written."""
    inputs, recurrent, projection = matrices
    for times, gates in in_parts(inputs, x, backwards=backwards):
        made = y[times]
        end = None if projection is not None else natively(cell, recurrent, gates, state, made, backwards=backwards)
        if end is None:
            order = (gates.flip(0), made.unbind(0)[::-1]) if backwards else (gates, made.unbind(0))
            product = for_many_calls(recurrent, state[0], len(gates))
            second = None if projection is None else for_many_calls(projection, state[-1], len(gates))
            end = cell.loop(order[0], product, second, state, order[1])
        state = end
    return state


def _stepped(cell: Cell, recurrent: nn.Module, projection: nn.Module | None, x: Tensor, state: State) -> State:
    after = cell.step(x, recurrent(state[0]), state)
    return after if projection is None else (projection(after[0]), *after[1:])


def _packed_at_once(
    cell: Cell, recurrent: nn.Module, gates: Tensor, sizes: list[int], state: State, backwards: bool
) -> tuple[Tensor, State] | None:
    """Sequences of several lengths in one native call, filled up to one; None where there is none for them."""
    if is_followed() or not gates.is_cpu:
        return None
    form = packing(sizes, backwards)
    if form is None or _product(recurrent, cell, state[0]) is None:
        return None
    filled = form.spread(gates, cell)
    if may_write(gates, state):
        y = filled.new_empty(form.times, form.rows, state[0].shape[-1])
        end = natively(cell, recurrent, filled, state, y, backwards=False)
        found = None if end is None else (y, end)
    else:
        found = recordedly(cell, recurrent, filled, state, backwards=False)
    if found is None:
        return None
    y, end = found
    return form.packed(y), (form.ends(y), *end[1:])


def _packed(
    cell: Cell,
    recurrent: nn.Module,
    projection: nn.Module | None,
    gates: Tensor,
    sizes: list[int],
    start: State,
    backwards: bool,
) -> tuple[Tensor, State]:
    """Sequences of several lengths, the longest first: at each time the first so many of them are there."""
    outputs: list[Tensor] = []
    parts = gates.split(sizes)
    if backwards:  # sequences join in as their last times come
        state = tuple(part[: sizes[-1]] for part in start)
        for now, size in zip(reversed(parts), reversed(sizes), strict=True):
            here = state[0].shape[0]
            if size > here:
                joining = (part[here:size] for part in start)
                state = tuple(torch.cat([old, new]) for old, new in zip(state, joining, strict=True))
            state = _stepped(cell, recurrent, projection, now, state)
            outputs.append(state[0])
        return torch.cat(outputs[::-1]), state
    ended: list[State] = []  # and leave after them
    state = start
    for now, size in zip(parts, sizes, strict=True):
        here = state[0].shape[0]
        if size < here:
            ended.append(tuple(part[size:] for part in state))
            state = tuple(part[:size] for part in state)
        state = _stepped(cell, recurrent, projection, now, state)
        outputs.append(state[0])
    ended.append(state)
    return torch.cat(outputs), tuple(torch.cat(parts[::-1]) for parts in zip(*ended, strict=True))


def may_write(x: Tensor, state: State) -> bool:
    """Whether outputs may be written into memory: nothing records, traces or casts what is done."""
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and not is_followed()
        and (x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type))
        and all(type(part) is Tensor for part in state)
    )


def natively(
    cell: Cell, recurrent: nn.Module, gates: Tensor, state: State, y: Tensor, *, backwards: bool
) -> State | None:
    """All times in one call of the native backend, see :func:`structmat.kernels.recurrence.recur`; None where the
    matrix of the state must be called as a module, or is no program."""
    if is_hooked(recurrent):
        return None
    found = _product(recurrent, cell, state[0])
    return None if found is None else recur(cell.native, *found, gates, state, y, backwards=backwards)


def recordedly(
    cell: Cell, recurrent: nn.Module, gates: Tensor, state: State, *, backwards: bool
) -> tuple[Tensor, State] | None:
    """All times in one call of the native backend in each direction, with gradients; None as of :func:`natively`, or
    where somebody follows what is called."""
    if is_hooked(recurrent) or is_followed() or not gates.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    found = _product(recurrent, cell, state[0])
    way = None if found is None else recordable(cell.native, *found, gates, state, backwards=backwards)
    return None if way is None else run_recorded(cell, *way, gates, state)


def state_name(cell: Cell, program: Program, dtype: torch.dtype) -> str:
    """What measurements of a matrix of the state are found by: it is multiplied in one call for all times, which is
    another thing than a call a time."""
    return f"{tuning.name_of(program, dtype)} in {cell.native.name}"


def _product(layer: nn.Module, cell: Cell, like: Tensor) -> Source | None:
    """What a layer multiplies rows like these by."""
    return source(layer, like.shape[0], partial(state_name, cell), (tuning.Way.NATIVE, tuning.Way.DENSE))


_FEW_CALLS = 4
"""For fewer, deciding beforehand takes longer than it saves."""


def for_many_calls(layer: nn.Module, like: Tensor, calls: int) -> Callable[[Tensor], Tensor]:
    """A layer as a function of rows, for many calls without gradients; the layer itself where that is to be called.

    Args:
        layer: a linear layer of any kind.
        like: rows of the number, dtype and device of those to come.
        calls: how many there will be.
    """
    if calls < _FEW_CALLS or is_hooked(layer):
        return layer
    if type(layer) is nn.Linear:
        return partial(F.linear, weight=layer.weight, bias=layer.bias)
    if isinstance(layer, StructuredLinear | FrozenLinear | GateLinear):
        program = layer.program
        is_dense = isinstance(layer, FrozenLinear) and layer.dense is not None
        if program is not None and not is_dense:
            product: Product = repeated(program, layer.tensors(), like, layer.bias)
            return product
    return layer
