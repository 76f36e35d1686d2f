"""The short way through a recurrent net for a single time, as when a text is written token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from structmat.nn.recurrent.cells import Cell, State
from structmat.nn.recurrent.directions import may_write, natively
from structmat.nn.recurrent.options import Options
from structmat.nn.recurrent.sequences import Given


def run_token(
    owner: nn.Module, cell: Cell, options: Options, x: Tensor | PackedSequence, hx: Given
) -> tuple[Tensor, State] | None:
    """What :func:`structmat.nn.recurrent.run.run_layers` returns, for one time and given states in one direction.

    A call takes a few dozen microseconds, and so do the questions that sequences of all kinds ask. None where one of
    those here has an unusual answer; the long way also knows the errors.
    """
    if type(x) is not Tensor or hx is None or x.dim() != 3 or options.bidirectional:
        return None
    first, second, width = x.shape
    is_first = options.batch_first
    rows = first if is_first else second
    parts = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if (second if is_first else first) != 1 or width != options.input_size or len(parts) != 1 + cell.has_memory:
        return None
    count = options.num_layers
    for part, size in zip(parts, (options.state_size, options.hidden_size), strict=False):
        if part.shape != (count, rows, size) or part.dtype is not x.dtype:
            return None
    if not may_write(x, parts) or (options.dropout and owner.training):
        return None
    own, y, ends = owner._modules, x.reshape(rows, width), list[State]()
    for (suffix,), state in zip(options.suffixes, zip(*(part.unbind(0) for part in parts), strict=True), strict=True):
        inputs, recurrent, projection = own["ih" + suffix], own["hh" + suffix], own.get("hr" + suffix)
        assert inputs is not None, suffix
        assert recurrent is not None, suffix
        gates, after = inputs(y), None
        if projection is None:
            out = y.new_empty(1, rows, options.state_size)
            after = natively(cell, recurrent, gates.unsqueeze(0), state, out, backwards=False)
        if after is None:
            after = cell.step(gates, recurrent(state[0]), state)
        if projection is not None:
            after = (projection(after[0]), *after[1:])
        ends.append(after)
        y = after[0]
    end = tuple(p.unsqueeze(0) for p in ends[0]) if count == 1 else tuple(map(torch.stack, zip(*ends, strict=True)))
    y = y.unsqueeze(1 if is_first else 0)
    return (y.clone() if count == 1 else y), end  # states share no memory with outputs
