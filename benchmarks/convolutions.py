"""Frozen structured convolutions beside PyTorch's.

    python -m benchmarks.convolutions                       all cells
    python -m benchmarks.convolutions run --only "64 x 8"
    python -m benchmarks.convolutions table                 the table again, from what is there

A cell is a convolution 3 x 3 with as many channels in as out, the size of its images and their number. PyTorch's layer
and frozen structured ones run in turns in one process, float32, without gradients, on one thread. PyTorch's runs once
more with channels last in memory, where it is faster; structured ones read and write images plane by plane.
"""

from __future__ import annotations

import copy
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
from structmat.nn.convolution.forms import KernelForm
from structmat.structure import Structure

LAYERS = ((16, 32), (32, 16), (64, 8), (64, 56), (128, 28), (256, 14), (512, 7))
"""Channels and places along each axis: those of residual networks for images of 32 x 32 and of 224 x 224 pixels."""

CHANNELS_LAST = "PyTorch, channels last"
BATCHES = (1, 8, 64)
SECONDS = 1.0


def structures(channels: int) -> dict[str, Structure | KernelForm]:
    """With a quarter of the numbers of the dense kernel, but for those that say another share."""
    return {
        "low rank": sm.LowRank(0.25),
        "separable": sm.nn.Separable(3 * channels // 8),
        "Tucker-2": sm.nn.Tucker((2 * channels // 5, 2 * channels // 5)),
        "sparse": sm.Sparse(0.25),
        "sparse, 1/8": sm.Sparse(0.125),
        "sparse, 1/2": sm.Sparse(0.5),
        "dense": sm.Dense(),
    }


def cell(channels: int, size: int, batch: int, seed: int) -> dict[str, Any]:
    """Microseconds of every layer."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    plain = nn.Conv2d(channels, channels, 3, padding=1, bias=False).eval()
    layers: dict[str, nn.Module] = {"PyTorch": plain}
    for name, structure in structures(channels).items():
        made = sm.nn.StructuredConv2d(channels, channels, 3, padding=1, bias=False, structure=structure).freeze()
        made.hold_dense(name == "dense")
        layers[name] = made
    x = torch.randn(batch, channels, size, size)
    calls = {name: partial(layer, x) for name, layer in layers.items()}
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    calls[CHANNELS_LAST] = partial(last, x.contiguous(memory_format=torch.channels_last))
    with torch.inference_mode():
        times = in_turns(calls, SECONDS)[1]
    return {"microseconds": {name: 1e6 * statistics.median(own) for name, own in times.items()}}


def name_of(channels: int, size: int, batch: int) -> str:
    return f"{channels} x {size} batch {batch}"


NAMES = (CHANNELS_LAST, *structures(16))
CASES = list(itertools.product(LAYERS, BATCHES))
CELLS = [Cell(name_of(*layer, batch), partial(cell, *layer, batch)) for layer, batch in CASES]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    return [
        "How many times faster than PyTorch's convolution 3 x 3 the frozen structured one is, with a quarter of its "
        "numbers where nothing else is said; for PyTorch's the time itself. Float32, one thread.",
        "",
        *markdown(("channels", "images", "how many", "PyTorch", *NAMES), _rows(done)),
    ]


def _rows(done: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for ((channels, size), batch), own in zip(CASES, CELLS, strict=True):
        first = str(channels), f"{size} x {size}", str(batch)
        found = done.get(own.key)
        if found is None:
            yield *first, *[NOT_RUN] * (1 + len(NAMES))
            continue
        times = found["microseconds"]
        plain = times["PyTorch"]
        shown = f"{plain / 1000:.2f} ms" if plain >= 1000 else f"{plain:.0f} us"
        yield *first, shown, *(f"{plain / times[name]:.2f}" for name in NAMES)


STUDY = Study("convolutions", "Convolutions beside PyTorch's", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
