"""Times on this machine: always of two things that run in turns."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.running import Forward, call, device_of, evaluating, first_samples, samples_in, to_device
from structmat.errors import DataError
from structmat.matrix import StructuredMatrix
from structmat.nn.kronecker.rectified import block_of
from structmat.nn.linear import StructuredLinear
from structmat.structure import Shape, Structure
from structmat.structures.dense import Dense
from structmat.structures.nonlinear.rectified_kronecker import RectifiedKronecker

FEWEST_RUNS = 7
"""Medians of fewer runs say little."""

LAYER_SECONDS = 0.04
"""To spend on one layer and the dense one beside it."""

_WARM_UP = 2


@dataclass(frozen=True)
class ModelTiming:
    """Two models on one batch, run in turns.

    Args:
        batch: samples in it.
        before, after: medians of the original's and the compressed model's milliseconds.
        ratio: the median over turns of ``after / before``: what changes the machine's speed for a while changes both.
        runs: how many turns.
    """

    batch: int
    before: float
    after: float
    ratio: float
    runs: int


def time_models(
    original: nn.Module,
    compressed: nn.Module,
    batches: Mapping[int, Any],
    *,
    forward: Forward | None = None,
    seconds: float = 1.0,
    fewest: int = FEWEST_RUNS,
) -> tuple[ModelTiming, ...]:
    """Time two models on batches of several sizes, in turns and in alternating order, without gradients.

    Args:
        original, compressed: run in evaluation mode, as fast as PyTorch can; modes are restored.
        batches: by the number of samples; see :func:`sized`.
        forward: ``forward(model, batch)``.
        seconds: to spend on each size; at least ``fewest`` turns are made, after two that warm up.
    """
    models = (original, compressed)
    timings = []
    with evaluating(original, fast=True), evaluating(compressed, fast=True), torch.inference_mode():
        for size, batch in batches.items():
            inputs = [to_device(batch, device_of(model)) for model in models]
            calls = [
                lambda model=model, given=given: call(model, given, forward)
                for model, given in zip(models, inputs, strict=True)
            ]
            first, second = interleaved(calls[0], calls[1], seconds=seconds, fewest=fewest, finish=_finish(original))
            before, after = 1e3 * statistics.median(first), 1e3 * statistics.median(second)
            timings.append(ModelTiming(size, before, after, _ratio(first, second), len(first)))
    return tuple(timings)


@lru_cache(maxsize=65536)
def layer_microseconds(structure: Structure, shape: Shape, rows: int) -> float:
    """The time of one float32 layer, frozen, on the CPU for ``rows`` input rows; measured once a process.

    It is the median time of an ``nn.Linear`` of this shape, times the median ratio of the two when they run in turns:
    layers that are timed at different moments can be compared.
    """
    out_features, in_features = shape
    dense = nn.Linear(in_features, out_features, bias=False, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, in_features, generator=generator, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        if isinstance(structure, Dense):
            first, second = interleaved(lambda: dense(x), lambda: dense(x), seconds=LAYER_SECONDS)
            return 1e6 * statistics.median(first + second)
        matrix = StructuredMatrix.random(structure, shape, generator=generator, dtype=torch.float32, device="cpu")
        layer = block_of(matrix, None) if isinstance(structure, RectifiedKronecker) else _frozen(matrix, rows)
        ratio = _ratio(*interleaved(lambda: dense(x), lambda: layer(x), seconds=LAYER_SECONDS))
    return ratio * layer_microseconds(Dense(), shape, rows)


def _frozen(matrix: StructuredMatrix, rows: int) -> nn.Module:
    return StructuredLinear.from_matrix(matrix).freeze(rows)


def interleaved(
    *functions: Callable[[], object],
    seconds: float,
    fewest: int = FEWEST_RUNS,
    finish: Callable[[], object] = lambda: None,
) -> tuple[list[float], ...]:
    """Seconds of each call of functions that run in turns; ``finish`` waits for what they started."""
    for function in functions * _WARM_UP:
        function()
    finish()
    times: tuple[list[float], ...] = tuple([] for _ in functions)
    collects = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        order = list(range(len(functions)))
        while len(times[0]) < fewest or time.perf_counter() < end:
            for which in order:
                start = time.perf_counter()
                functions[which]()
                finish()
                times[which].append(time.perf_counter() - start)
            order.reverse()  # whoever runs later finds warmer or colder caches
    finally:
        if collects:
            gc.enable()
    return times


def _ratio(first: Sequence[float], second: Sequence[float]) -> float:
    return statistics.median(b / a for a, b in zip(first, second, strict=True))


def _finish(model: nn.Module) -> Callable[[], object]:
    return torch.cuda.synchronize if device_of(model).type == "cuda" else lambda: None


def sized(batch: Any, sizes: Sequence[int]) -> dict[int, Any]:
    """The batch cut, or repeated, to each number of samples.

    A batch whose tensors do not agree on the number of samples can't be cut: it stays as it is, under its own size.

    Raises:
        DataError: the batch is empty.
    """
    whole = samples_in(batch)
    if whole < 1:
        raise DataError("A batch without samples can't be timed.")
    found: dict[int, Any] = {}
    for size in sizes:
        larger = batch if whole >= size else _repeated(batch, whole, math.ceil(size / whole))
        smaller = first_samples(larger, size)
        found[samples_in(smaller)] = smaller
    return found


def _repeated(batch: Any, whole: int, times: int) -> Any:
    def grow(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == whole:
            return torch.cat([value] * times)
        raise _Fixed

    try:
        if isinstance(batch, Tensor):
            return grow(batch)
        if isinstance(batch, Mapping):
            return {key: grow(value) for key, value in batch.items()}
        if type(batch) in (tuple, list):
            return type(batch)([grow(value) for value in batch])
    except _Fixed:
        return batch
    return batch


class _Fixed(Exception):  # noqa: N818 - control flow, not an error
    """The batch holds something that is not one value a sample."""
