"""Ways of running layers, timed as a model runs them: one layer after the other, not one layer many times.

A layer that is called again and again finds its weights in a cache, where a model of many layers leaves none of them,
and reading memory is what the ways of running a layer for few rows differ in.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.kernels import native, tuning
from structmat.kernels.choice import NATIVE_DTYPES
from structmat.kernels.text import Text, running_text
from structmat.nn.linear import FrozenLinear, StructuredLinear
from structmat.nn.recurrent.cells import Cell
from structmat.nn.recurrent.directions import natively

FEWEST_TURNS = 3
"""Of the ways; in each a way makes one pass over the layers to warm up, and then ``PASSES``."""

PASSES = 3

MOST_OTHERS = 1 << 24
"""Numbers read before a pass in place of what else a model holds, at most: more than any cache keeps."""

_TIMES = 16
"""Of the sequences that the matrices of a state are timed on."""

Run = Callable[[], object]
Times = dict[tuning.Way, list[list[float]]]


@dataclass(frozen=True)
class Swept:
    """A layer that takes part.

    Args:
        key: of its program among all measurements.
        layer: whose dense matrix is held, if it is to be timed too.
        dtype: of its input.
        cell: of a recurrent layer whose state it multiplies, natively and for all times in one call; else None.
    """

    key: str
    layer: StructuredLinear | FrozenLinear
    dtype: torch.dtype
    cell: Cell | None = None

    @property
    def ways(self) -> tuple[tuning.Way, ...]:
        """In which it can run."""
        ways = [tuning.Way.REFERENCE]
        text = running_text(self.layer.program)
        if native().available and isinstance(text, Text) and self.dtype in NATIVE_DTYPES:
            ways.append(tuning.Way.NATIVE)
        if isinstance(self.layer, FrozenLinear) and self.layer.dense is not None:
            ways.append(tuning.Way.DENSE)
        return tuple(way for way in ways if self.cell is None or way is not tuning.Way.REFERENCE)

    def call(self, x: Tensor) -> Run:
        """What is timed, on rows (rows, in_features)."""
        if self.cell is None:
            return lambda: self.layer(x)
        cell, layer = self.cell, self.layer
        gates = x.new_zeros(_TIMES, len(x), layer.out_features)
        state, y = (x,) * (1 + cell.has_memory), x.new_empty(_TIMES, *x.shape)
        return lambda: natively(cell, layer, gates, state, y, backwards=False)


def microseconds(
    layers: Sequence[Swept], rows: int, seconds: float, others: int = 0
) -> dict[str, dict[tuning.Way, float]]:
    """The time of each way of each program: the median over passes and over the layers that share the program.

    Args:
        layers: in the order in which the model has them.
        rows: of the input.
        seconds: to spend in all; at least ``FEWEST_TURNS`` turns are made.
        others: numbers that the model holds beside these layers. So many are read before each pass.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = {(swept.layer.in_features, swept.dtype) for swept in layers}
    inputs = {
        kind: torch.randn(rows, kind[0], generator=generator).to(kind[1]) for kind in sorted(kinds, key=str)
    }  # the same for all of a kind
    rest = torch.zeros(min(others, MOST_OTHERS))
    members: dict[tuning.Way, list[Swept]] = {}
    for swept in layers:
        for way in swept.ways:
            members.setdefault(way, []).append(swept)
    runs = {way: [s.call(inputs[s.layer.in_features, s.dtype]) for s in own] for way, own in members.items()}
    with torch.inference_mode(), ExitStack() as stack:
        choosers = {key: stack.enter_context(tuning.trying(key, rows)) for key in dict.fromkeys(s.key for s in layers)}

        def prepare(way: tuning.Way) -> None:
            for swept in members[way]:
                choosers[swept.key](way)

        times = timed(runs, seconds, prepare, rest)
    found: dict[str, dict[tuning.Way, list[float]]] = {}
    for way, own in members.items():
        for swept, each in zip(own, times[way], strict=True):
            found.setdefault(swept.key, {}).setdefault(way, []).extend(each)
    return {key: {way: 1e6 * statistics.median(own) for way, own in ways.items()} for key, ways in found.items()}


def timed(
    runs: Mapping[tuning.Way, Sequence[Run]], seconds: float, prepare: Callable[[tuning.Way], None], rest: Tensor
) -> Times:
    """Seconds of every call: the calls of a way one after the other, pass by pass, and the ways in turns.

    Args:
        runs: the calls of each way.
        seconds: to spend.
        prepare: is called when the turn of a way begins.
        rest: read before each pass.
    """
    times: Times = {way: [[] for _ in own] for way, own in runs.items()}
    order, turns = list(runs), 0
    collects = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while turns < FEWEST_TURNS or time.perf_counter() < end:
            for way in order:
                prepare(way)
                for run in runs[way]:
                    run()  # what a layer keeps of the choice is made at the first call
                for _ in range(PASSES):
                    rest.sum()
                    for run, own in zip(runs[way], times[way], strict=True):
                        start = time.perf_counter()
                        run()
                        own.append(time.perf_counter() - start)
            order.reverse()
            turns += 1
    finally:
        if collects:
            gc.enable()
    return times
