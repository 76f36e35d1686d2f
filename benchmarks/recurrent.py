"""Recurrent layers beside PyTorch's: whole sequences, one token after the other, and steps of training.

    python -m benchmarks.recurrent                        all cells
    python -m benchmarks.recurrent run --only LSTM
    python -m benchmarks.recurrent table                  the table again, from what is there

A cell is one kind of layer, hidden size and number of sequences. PyTorch's layer and the frozen structured ones of the
same sizes run in turns in one process, float32, without gradients, on one thread: sequences of 128 times, and single
times with a given state. Layers in training run forwards and back through sequences of 128 times, to the gradients of
their input and of all parameters.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import structmat as sm
from benchmarks.study import NOT_RUN, Cell, Study, markdown
from structmat.benchmark import in_turns
from structmat.structure import Structure

KINDS: Mapping[str, tuple[type[nn.RNNBase], type[Any]]] = {
    "LSTM": (nn.LSTM, sm.nn.StructuredLSTM),
    "GRU": (nn.GRU, sm.nn.StructuredGRU),
}
SIZES = (128, 256, 512, 1024)
BATCHES = (1, 16, 64)
TIMES = 128
SECONDS = 1.5
"""To spend on a way of calling."""

STRUCTURES: Mapping[str, Structure] = {
    "Monarch, 1/4": sm.Monarch(4, 0.25),
    "low rank, 1/4": sm.LowRank(0.25),
    "sparse, 1/4": sm.Sparse(0.25),
    "dense": sm.Dense(),
}


def cell(kind: str, size: int, batch: int, seed: int) -> dict[str, Any]:
    """Microseconds of every layer, for a sequence and for a token."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    plain, structured = KINDS[kind]
    layers: dict[str, nn.Module] = {"PyTorch": plain(size, size).eval()}
    for name, structure in STRUCTURES.items():
        layers[name] = structured(size, size, structure=structure).eval().freeze(rows=batch)
    start = torch.zeros(1, batch, size)
    state = (start, start) if kind == "LSTM" else start
    given = {
        "sequence": (torch.randn(TIMES, batch, size),),
        "token": (torch.randn(1, batch, size), state),
    }
    found = {}
    with torch.inference_mode():
        for way, arguments in given.items():
            runs = {name: partial(layer, *arguments) for name, layer in layers.items()}
            times = in_turns(runs, SECONDS)[1]
            found[way] = {name: 1e6 * statistics.median(own) for name, own in times.items()}
    return found


def training_cell(kind: str, size: int, batch: int, seed: int) -> dict[str, Any]:
    """Microseconds of every layer, forwards and back."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    plain, structured = KINDS[kind]
    layers: dict[str, nn.Module] = {"PyTorch": plain(size, size)}
    layers |= {name: structured(size, size, structure=structure) for name, structure in STRUCTURES.items()}
    x = torch.randn(TIMES, batch, size, requires_grad=True)
    weight = torch.randn(TIMES, batch, size)

    def step(layer: nn.Module) -> None:
        torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], weight)

    times = in_turns({name: partial(step, layer) for name, layer in layers.items()}, SECONDS)[1]
    return {"training": {name: 1e6 * statistics.median(own) for name, own in times.items()}}


def name_of(kind: str, size: int, batch: int, way: str) -> str:
    return f"{kind} {size} batch {batch}" + (" training" if way == "training" else "")


CELLS = [
    Cell(name_of(kind, size, batch, way), partial(run, kind, size, batch))
    for way, run in (("deployed", cell), ("training", training_cell))
    for kind, size, batch in itertools.product(KINDS, SIZES, BATCHES)
]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    head = ("layer", "hidden size", "sequences", "PyTorch", *STRUCTURES)
    lines = []
    titles = {
        "sequence": f"Sequences of {TIMES} times",
        "token": "One token",
        "training": f"Training, sequences of {TIMES} times forwards and back",
    }
    for way, title in titles.items():
        lines += [f"## {title}", "", *markdown(head, _rows(done, way)), ""]
    return [
        "How many times faster than PyTorch's layer the structured one is, whose input and state have as many "
        "features; for PyTorch's the time itself. Float32, one thread. Layers are frozen for the number of sequences, "
        "but for those in training.",
        "",
        *lines,
    ]


def _rows(done: Mapping[str, dict[str, Any]], way: str) -> Iterator[tuple[str, ...]]:
    by_name = {own.name: done.get(own.key) for own in CELLS}
    for kind, size, batch in itertools.product(KINDS, SIZES, BATCHES):
        found = by_name[name_of(kind, size, batch, way)]
        if found is None:
            yield kind, str(size), str(batch), NOT_RUN, *[NOT_RUN] * len(STRUCTURES)
            continue
        times = found[way]
        plain = times["PyTorch"]
        own = f"{plain / 1000:.2f} ms" if plain >= 1000 else f"{plain:.0f} us"
        yield kind, str(size), str(batch), own, *(f"{plain / times[name]:.2f}" for name in STRUCTURES)


STUDY = Study("recurrent", "Recurrent layers beside PyTorch's", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
