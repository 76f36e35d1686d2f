"""What compression bought: time, size and memory, measured before and after in one process."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from structmat.compression.running import Forward, call, device_of, evaluating, first_samples, samples_in, to_device
from structmat.errors import DataError
from structmat.io import save, size_on_disk

T = TypeVar("T")

FEWEST_RUNS = 7
"""Medians of fewer runs say little."""

_WARM_UP = 2


@dataclass(frozen=True)
class Timing:
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
) -> tuple[Timing, ...]:
    """Time two models on batches of several sizes, in turns and in alternating order, without gradients.

    Args:
        original, compressed: run in evaluation mode; modes are restored.
        batches: by the number of samples; see :func:`sized`.
        forward: ``forward(model, batch)``.
        seconds: to spend on each size; at least ``fewest`` turns are made, after two that warm up.
    """
    models = (original, compressed)
    timings = []
    with evaluating(original), evaluating(compressed), torch.inference_mode():
        for size, batch in batches.items():
            inputs = [to_device(batch, device_of(model)) for model in models]
            calls = [
                lambda model=model, given=given: call(model, given, forward)
                for model, given in zip(models, inputs, strict=True)
            ]
            first, second = interleaved(calls[0], calls[1], seconds=seconds, fewest=fewest, finish=_finish(original))
            ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
            timings.append(
                Timing(size, 1e3 * statistics.median(first), 1e3 * statistics.median(second), ratio, len(first))
            )
    return tuple(timings)


def interleaved(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    seconds: float,
    fewest: int = FEWEST_RUNS,
    finish: Callable[[], object] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Seconds of each call of two functions that run in turns; ``finish`` waits for what they started."""
    for function in (first, second) * _WARM_UP:
        function()
    finish()
    times: tuple[list[float], list[float]] = ([], [])
    collects = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(times[0]) < fewest or time.perf_counter() < end:
            # Whoever runs second finds warmer or colder caches: alternate.
            order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
            for which in order:
                start = time.perf_counter()
                (first, second)[which]()
                finish()
                times[which].append(time.perf_counter() - start)
    finally:
        if collects:
            gc.enable()
    return times


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


def bytes_on_disk(model: nn.Module) -> int:
    """What :func:`structmat.save` writes for a model: tensors and header."""
    with tempfile.TemporaryDirectory() as folder:
        return size_on_disk(save(model, folder))


def peak_memory(function: Callable[[], T]) -> tuple[T, int | None]:
    """Run a function; its result, and how far the memory of the process rose above where it stood before, in bytes.

    Read from the kernel's high-water mark of resident memory, which is reset before (Linux); elsewhere None. Memory
    that the process held and reuses does not count.
    """
    gc.collect()
    if not _reset_high_water():
        return function(), None
    before = _resident("VmRSS")
    result = function()
    return result, max(0, _resident("VmHWM") - before)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def evaluated(evaluate: Callable[[nn.Module], float] | None, model: nn.Module) -> float | None:
    """The user's figure of quality, without gradients and in evaluation mode.

    Raises:
        DataError: it is not a number.
    """
    if evaluate is None:
        return None
    with evaluating(model), torch.no_grad():
        value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"evaluate(model) returns one number; got {value!r}.") from error


def first_batch(loader: Iterable[Any]) -> Any:
    """The first batch of a loader.

    Raises:
        DataError: it has none.
    """
    for batch in loader:
        return batch
    raise DataError("The loader has no batches.")
