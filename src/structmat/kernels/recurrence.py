"""All times of a recurrent net in one call of the native backend."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import torch
from torch import Tensor

from structmat.kernels.choice import possible_text
from structmat.kernels.library import native
from structmat.kernels.operator import arguments, recurrence
from structmat.kernels.plainly import plainly
from structmat.kernels.text import Text, running_text
from structmat.program import Program

STATE_DTYPES = (torch.float32, torch.float64)
"""Of states that the library makes."""


class NativeCell(enum.IntEnum):
    """The cells that the library knows, by its own numbers."""

    LSTM = 0
    GRU = 1
    TANH = 2
    RELU = 3


BACKWARDS = 4
"""Added to the number of a cell if the last time is read first."""


def makes_states(*tensors: Tensor) -> bool:
    """Whether the library makes states of these: plain tensors on the CPU, of one dtype that it knows."""
    dtype = tensors[0].dtype
    return dtype in STATE_DTYPES and all(type(t) is Tensor and t.is_cpu and t.dtype is dtype for t in tensors)


def is_native(program: Program, dtype: torch.dtype) -> bool:
    """Whether :func:`recur` takes a state's matrix, if nothing else speaks against it."""
    return (
        isinstance(running_text(program), Text)
        and dtype in STATE_DTYPES
        and native().available
        and recurrence() is not None
    )


def recur(
    cell: NativeCell,
    program: Program,
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
    gates: Tensor,
    state: tuple[Tensor, ...],
    y: Tensor,
    *,
    backwards: bool,
) -> tuple[Tensor, ...] | None:
    """Write the outputs of all times and return the last state; no gradient is recorded.

    Args:
        cell: the equations, without a projection.
        program, tensors: what multiplies the state.
        bias: added to that product, or None.
        gates: what the input's matrix puts out, (times, rows, gates * size), in the order of the sequence.
        state: before, (rows, size) each; not changed.
        y: where the outputs are written, (times, rows, size), its last axis contiguous.
        backwards: whether the last time is read first.

    Returns:
        None where the backend has no kernel for it; nothing is written then. Where it has one it is taken, also for
        products that PyTorch does faster one by one: weights are packed once for all times.

    Raises:
        StructureError: the native backend is forced, and can't multiply by the program.
    """
    hidden = state[0]
    if not makes_states(*state, gates, y):
        return None
    program, tensors = plainly(program, tensors, hidden, bias)
    text = possible_text(program, tensors, hidden, bias)
    call = None if text is None else recurrence()
    if text is None or call is None:
        return None
    if gates.stride(-1) != 1:
        gates = gates.contiguous()
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    memory = state[1].clone(memory_format=torch.contiguous_format) if cell is NativeCell.LSTM else hidden.new_empty(0)
    words = text.plain if bias is None else text.biased
    call(gates, hidden, memory, y, arguments(text, tensors, bias), words, cell + BACKWARDS * backwards)
    last = y[0 if backwards else -1]
    return (last, memory) if cell is NativeCell.LSTM else (last,)
