"""One direction of a recurrent net with gradients, all times at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat.kernels.recorded_recurrence import Recorded
from structmat.modes import is_usual_backward
from structmat.nn.recurrent.cells import Cell, State
from structmat.program import reference


def run_recorded(cell: Cell, way: Recorded, given: list[Tensor], gates: Tensor, state: State) -> tuple[Tensor, State]:
    """All outputs (times, rows, size) and the last state.

    Time: of one product by the state's matrix, and one by its transpose on the way back, for each time; the gradients
    of its tensors are those of one product of all times. Memory for the way back: 10 numbers for each output of an
    LSTM, 8 for a GRU, 2 for a plain net, ``gates`` included and the outputs themselves not.

    Args:
        cell: the equations.
        way: the native calls.
        given: the tensors of the state's matrix, in the order of its text, and the bias.
        gates: what the input's matrix puts out, (times, rows, gates * size).
        state: before.
    """
    outcome = _Recurrence.apply(cell, way, len(state), gates, *state, *given)  # type: ignore[no-untyped-call]
    y: Tensor = outcome[0]
    return y, (y[0 if way.backwards else -1], *outcome[1:])


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Cell, way: Recorded, parts: int, gates: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        state, given = more[:parts], more[parts:]
        y, memory, states, kept = way.forward(gates, state, list(given))
        ctx.save_for_backward(gates, *more, states, kept)
        ctx.cell, ctx.way, ctx.parts = cell, way, parts
        return (y,) if memory is None else (y, memory)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gates, *more, states, kept = ctx.saved_tensors
        way, parts = ctx.way, ctx.parts
        wanted = ctx.needs_input_grad[3:]
        if all(is_usual_backward(grad) for grad in grads):
            memory = more[1] if way.has_memory else None
            found = way.backward(states, kept, memory, more[parts:], grads, wanted[1 + parts :])
        else:
            found = _by_reference(ctx.cell, way, gates, more, parts, grads, wanted)
        return None, None, None, *(g if w else None for g, w in zip(found, wanted, strict=True))


def _by_reference(
    cell: Cell,
    way: Recorded,
    gates: Tensor,
    more: list[Tensor],
    parts: int,
    grads: tuple[Tensor, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The same from PyTorch's operations: to differentiate once more, and for many gradients at a time."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Views, so that each gradient is that of one argument alone, even where arguments were computed from another.
        inputs = [t.view_as(t) for t in (gates, *more)]
        state: State = tuple(inputs[1 : 1 + parts])
        given = inputs[1 + parts :]
        tensors = dict(zip(way.text.names, given, strict=False))
        bias = given[-1] if way.biased else None
        outputs = []
        for now in reversed(inputs[0].unbind(0)) if way.backwards else inputs[0].unbind(0):
            product = reference.apply(way.program, tensors, state[0])
            state = cell.step(now, product if bias is None else product + bias, state)
            outputs.append(state[0])
        y = torch.stack(outputs[::-1] if way.backwards else outputs)
        asked = [t for t, w in zip(inputs, wanted, strict=True) if w]
        made = torch.autograd.grad((y, *state[1:]), asked, grads, create_graph=differentiated, allow_unused=True)
        found = iter(made)
    return tuple(next(found) if w else None for w in wanted)
