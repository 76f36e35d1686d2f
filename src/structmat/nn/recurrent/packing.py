"""Packed sequences of several lengths as one array, so that all times are one call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from structmat.nn.recurrent.cells import Cell

_MOST = 2.0
"""Times as many places as there are rows, filled up: with more, a call for each time multiplies less."""

_CLOSED = 1e4
"""What opens or closes a gate for good, whatever the state adds to it."""


@dataclass(frozen=True)
class Packing:
    """Where the rows of packed sequences lie in an array (times, sequences), each sequence from its first row that is
    read on.

    Args:
        times, rows: of the array.
        source: for each place of the array the packed row, or 0 where the sequence has ended.
        has_ended: which places these are, (times, rows, 1).
        places: for each packed row its place in the array.
        last: the place of each sequence's last row that is read.
    """

    times: int
    rows: int
    source: Tensor
    has_ended: Tensor
    places: Tensor
    last: Tensor

    def spread(self, gates: Tensor, cell: Cell) -> Tensor:
        """Packed gates (all rows, width) as (times, rows, width). After the end of a sequence they are such that an
        LSTM's memory stays what it is."""
        filled = gates.index_select(0, self.source).unflatten(0, (self.times, self.rows))
        rest = gates.new_zeros(gates.shape[-1])
        if cell.has_memory:
            i, f, _, o = rest.chunk(4)
            i.fill_(-_CLOSED)
            f.fill_(_CLOSED)
            o.fill_(-_CLOSED)
        return torch.where(self.has_ended, rest, filled)

    def packed(self, y: Tensor) -> Tensor:
        """What is wanted of (times, rows, size), as packed rows."""
        return y.flatten(0, 1).index_select(0, self.places)

    def ends(self, y: Tensor) -> Tensor:
        """The last row of each sequence, (rows, size)."""
        return y.flatten(0, 1).index_select(0, self.last)


def packing(sizes: list[int], backwards: bool) -> Packing | None:
    """How sequences are filled up, or None where that would more than double the work.

    Args:
        sizes: how many sequences have a row at each time, not increasing.
        backwards: whether each sequence is read from its end.
    """
    return _packing(tuple(sizes), backwards) if len(sizes) * sizes[0] <= _MOST * sum(sizes) else None


@lru_cache(maxsize=64)
def _packing(sizes: tuple[int, ...], backwards: bool) -> Packing:
    times, rows = len(sizes), sizes[0]
    each = torch.tensor(sizes)
    offsets = each.cumsum(0) - each
    lengths = (each > torch.arange(rows)[:, None]).sum(1)
    here = torch.arange(times)[:, None]
    has_ended = here >= lengths  # (times, rows)
    read = lengths - 1 - here if backwards else here.expand(-1, rows)
    source = (offsets[read.clamp(min=0)] + torch.arange(rows)).masked_fill(has_ended, 0)
    time = torch.repeat_interleave(torch.arange(times), each)
    row = torch.arange(int(each.sum())) - offsets[time]
    places = (lengths[row] - 1 - time if backwards else time) * rows + row
    last = (lengths - 1) * rows + torch.arange(rows)
    return Packing(times, rows, source.flatten(), has_ended.unsqueeze(-1), places, last)
