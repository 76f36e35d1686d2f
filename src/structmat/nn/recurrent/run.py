"""All layers and directions of a recurrent net, whatever its matrices are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from structmat.errors import DataError
from structmat.nn.recurrent.cells import Cell, State
from structmat.nn.recurrent.directions import may_write, run_direction
from structmat.nn.recurrent.options import Options
from structmat.nn.recurrent.sequences import Given, Sequences, sequences, stack_states
from structmat.nn.recurrent.tokens import run_token


def run_layers(
    owner: nn.Module, cell: Cell, options: Options, given: Tensor | PackedSequence, hx: Given
) -> tuple[Tensor | PackedSequence, State]:
    """The outputs of the last layer and the last states of all.

    Args:
        owner: whose children are the matrices, by the names of :meth:`Options.shapes`.
        cell: the equations.
        options: the sizes.
        given: (time, batch, inputs), in another order if ``batch_first``, (time, inputs), or packed sequences.
        hx: initial states, zero if None.

    Raises:
        ShapeError: an axis of the input or of a state has another size.
        DataError: a state has another dtype than the input.
    """
    found = run_token(owner, cell, options, given, hx)
    if found is not None:
        return found
    read = sequences(given, options)
    start = read.states(options, hx, cell.has_memory)
    if any(part.dtype != read.x.dtype for part in start):
        raise DataError(
            f"The input is {read.x.dtype} and the initial state {' and '.join(str(p.dtype) for p in start)}. "
            "Give both in one dtype."
        )
    states = list(zip(*(part.unbind(0) for part in start), strict=True))
    writes = read.sizes is None and may_write(read.x, start)
    x, ends = read.x, list[State]()
    for layer, suffixes in enumerate(options.suffixes):
        if layer and options.dropout and owner.training:
            x = F.dropout(x, options.dropout, True)
        x = _layer(owner, cell, options, suffixes, read, x, states, ends, writes)
    return read.outputs(x), read.last_states(stack_states(ends))


def _layer(
    owner: nn.Module,
    cell: Cell,
    options: Options,
    suffixes: tuple[str, ...],
    read: Sequences,
    x: Tensor,
    states: list[State],
    ends: list[State],
    writes: bool,
) -> Tensor:
    """One layer in its directions; its last states are appended to ``ends``."""
    size = options.state_size
    written = x.new_empty(*x.shape[:-1], size * len(suffixes)) if writes else None
    outputs = []
    for number, suffix in enumerate(suffixes):
        own = owner._modules
        inputs, recurrent = own["ih" + suffix], own["hh" + suffix]
        assert inputs is not None, suffix
        assert recurrent is not None, suffix
        matrices = (inputs, recurrent, own.get("hr" + suffix))
        y = None if written is None else written[..., number * size : (number + 1) * size]
        out, end = run_direction(cell, matrices, x, read.sizes, states[len(ends)], y, backwards=number == 1)
        outputs.append(out)
        ends.append(end)
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs, -1) if written is None else written
