"""Medians of times on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from structmat.compression.running import Forward, call, device_of, evaluating, first_samples, samples_in, to_device
from structmat.matrix import StructuredMatrix
from structmat.nn.linear import StructuredLinear
from structmat.structure import Shape, Structure
from structmat.structures.dense import Dense

_FEWEST = 7


def median_seconds(work: Callable[[], object], seconds: float) -> float:
    """The median of at least 7 runs after 2 that warm up, going on until ``seconds`` have passed."""
    times: list[float] = []
    for _ in range(2):
        work()
    end = time.perf_counter() + seconds
    while len(times) < _FEWEST or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@lru_cache(maxsize=65536)
def layer_microseconds(structure: Structure, shape: Shape, rows: int) -> float:
    """The median time of one float32 layer on the CPU for ``rows`` input rows; measured once a process.

    "Keep dense" is timed as the ``nn.Linear`` that stays.
    """
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    layer: nn.Module
    if isinstance(structure, Dense):
        layer = nn.Linear(in_features, out_features, bias=False, device="cpu", dtype=torch.float32)
    else:
        layer = StructuredLinear.from_matrix(
            StructuredMatrix.random(structure, shape, generator=generator, dtype=torch.float32, device="cpu")
        )
    x = torch.randn(rows, in_features, generator=generator, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        return 1e6 * median_seconds(lambda: layer(x), 0.02)


def model_milliseconds(
    model: nn.Module, batch: Any, sizes: Sequence[int], *, forward: Forward | None = None, seconds: float = 0.1
) -> dict[int, float]:
    """Median times of a whole model, by the number of samples of ``batch`` that are run at once.

    Sizes that the batch does not reach are left out; a batch that can't be cut is timed whole.
    """
    batch = to_device(batch, device_of(model))
    found: dict[int, float] = {}
    with evaluating(model, fast=True), torch.inference_mode():
        for size in sizes:
            part = first_samples(batch, size)
            actual = samples_in(part)
            if actual not in found:
                found[actual] = 1e3 * median_seconds(partial(call, model, part, forward), seconds)
    return found
