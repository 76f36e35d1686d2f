"""Which backend is faster for which layer and batch, by measurement on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.layers.convolution import ConvolutionLayer
from structmat.compression.progress import Progress
from structmat.compression.reached import Reached, State, reached
from structmat.compression.running import Forward
from structmat.compression.sweeps import Swept, microseconds
from structmat.compression.timing import interleaved
from structmat.errors import ModelError
from structmat.kernels import tuning
from structmat.kernels.recurrence import is_native
from structmat.nn.convolution import FrozenConvolution
from structmat.nn.linear import FrozenLinear, StructuredLinear
from structmat.nn.recurrent.directions import state_name


@dataclass(frozen=True)
class TunedLayer:
    """What was measured of one layer for one number of rows.

    Args:
        name: of the layer in the model.
        rows: of its input.
        microseconds: medians of each way that was tried.
        chosen: the fastest.
    """

    name: str
    rows: int
    microseconds: Mapping[tuning.Way, float]
    chosen: tuning.Way


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` measured and decided.

    Args:
        layers: one entry for each layer and number of rows.
        dense_bytes: memory that dense matrices take, which are held beside the structured ones.
    """

    layers: tuple[TunedLayer, ...]
    dense_bytes: int

    def __str__(self) -> str:
        lines = [f"{'layer':<32} {'rows':>6}  " + "  ".join(f"{way.value:>10}" for way in tuning.Way) + "  chosen"]
        for layer in self.layers:
            times = "  ".join(
                f"{layer.microseconds[way]:>7.1f} us" if way in layer.microseconds else f"{'-':>10}"
                for way in tuning.Way
            )
            lines.append(f"{layer.name:<32} {layer.rows:>6}  {times}  {layer.chosen.value}")
        lines.append(f"dense matrices held beside: {self.dense_bytes / 2**20:.1f} MB")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    batch_sizes: Iterable[int],
    *,
    allow_dense: bool = False,
    seconds: float = 0.1,
    again: bool = False,
    example: Any = None,
    forward: Forward | None = None,
    progress: bool = False,
) -> Tuning:
    """Measure, for every structured layer on the CPU, which backend is faster, and use that from now on.

    Layers run one after the other, as in the model, whose other tensors are read between; layers of equal programs
    share one measurement. While dense matrices are timed, those of all layers are held. What is found holds for
    products without gradients, for numbers of rows within a factor of 2 of those measured and for as many threads as
    PyTorch has now, in this process and, through a small file (``structmat info`` says where), in later ones with the
    same processor and versions. Which way is taken changes rounding, and nothing else.

    Args:
        model: with :class:`StructuredLinear` layers, or frozen ones (:func:`structmat.freeze`).
        batch_sizes: numbers of rows that reach a layer, all leading axes together. The state of a recurrent layer is
            multiplied time by time: with an ``example`` its matrices are timed for the sequences in that instead.
        allow_dense: let frozen layers hold their dense matrix too, where it is the fastest for one of the numbers.
        seconds: to spend on each program and number of rows.
        again: measure anew what is known.
        example: a batch, as of :func:`structmat.compress`. The model is run on it once, so that frozen convolutions
            and the states of recurrent layers are timed at the sizes that reach them. Convolutions are timed as they
            are and with their dense kernel, the faster of which they hold from then on (if ``allow_dense``; in this
            process only); without an example they stay as they are.
        forward: ``forward(model, batch)``, if the example is none of the usual.
        progress: show a bar.

    Raises:
        ModelError: the model has no structured layer on the CPU, a number of rows is below 1, or ``allow_dense`` is
            asked of a model without frozen layers.
    """
    if isinstance(batch_sizes, Tensor) or not isinstance(batch_sizes, Iterable):
        raise ModelError(
            f"batch_sizes holds numbers of rows, such as [1, 64]; got a {type(batch_sizes).__name__}. "
            "A batch to run convolutions on goes in example=."
        )
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1:
        raise ModelError(f"batch_sizes={sizes} must be one or more numbers of rows, each at least 1.")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear | FrozenLinear) and _is_here(module)
    }
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, FrozenConvolution) and _is_here(m)}
    if not layers and not (convolutions and example is not None):
        hint = " Convolutions are tuned when frozen, on an example=... batch." if _has_convolutions(model) else ""
        raise ModelError(f"The model has no structured layer on the CPU, so there is nothing to tune.{hint}")
    frozen = (*layers.values(), *convolutions.values())
    if allow_dense and not any(isinstance(layer, FrozenLinear | FrozenConvolution) for layer in frozen):
        raise ModelError("allow_dense=True needs frozen layers: tune structmat.freeze(model).")
    found: list[TunedLayer] = []
    dense_bytes = 0
    others = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    others -= sum(t.numel() for layer in layers.values() for t in (*layer.parameters(), *layer.buffers()))
    seen = Reached() if example is None else reached(model, convolutions, example, forward)
    asked = {name: [seen.states[name].sequences] if name in seen.states else sizes for name in layers}
    swept = {name: _swept(layer, seen.states.get(name)) for name, layer in layers.items()}
    programs = {name: own.key for name, own in swept.items()}
    every = sorted({rows for own in asked.values() for rows in own})
    with Progress(progress) as bar:
        for rows in bar.track(every, "tune", total=len(every)):
            todo = [
                swept[name]
                for name, layer in layers.items()
                if rows in asked[name]
                and (again or _is_new(programs[name], rows, allow_dense and isinstance(layer, FrozenLinear)))
            ]
            if todo:
                _measure(todo, rows, allow_dense, seconds * len({own.key for own in todo}), others)
    for name, layer in layers.items():
        with_dense = allow_dense and isinstance(layer, FrozenLinear)
        own = [_tuned(name, programs[name], rows, with_dense) for rows in asked[name]]
        if isinstance(layer, FrozenLinear):
            layer.hold_dense(any(entry.chosen is tuning.Way.DENSE for entry in own))
            if layer.dense is not None:
                dense_bytes += layer.dense.numel() * layer.dense.element_size()
        found += own
    if example is not None and convolutions:
        found += _tuned_convolutions(convolutions, seen.inputs, allow_dense, seconds)
        dense_bytes += sum(
            t.numel() * t.element_size()
            for c in convolutions.values()
            if c.dense is not None
            for t in _tensors(c.dense)
        )
    return Tuning(tuple(found), dense_bytes)


def _is_new(program: str, rows: int, with_dense: bool) -> bool:
    times = tuning.known().get((program, torch.get_num_threads()), {}).get(rows)
    return times is None or (with_dense and tuning.Way.DENSE not in times)


def _measure(swept: Sequence[Swept], rows: int, with_dense: bool, seconds: float, others: int) -> None:
    """Time all layers together, and note what was found."""
    for own in swept:
        if isinstance(own.layer, FrozenLinear):
            own.layer.hold_dense(with_dense)
    for program, times in microseconds(swept, rows, seconds, others).items():
        tuning.note(program, {rows: times})


def _tuned(name: str, program: str, rows: int, with_dense: bool) -> TunedLayer:
    """What is known of a layer."""
    times = tuning.known()[program, torch.get_num_threads()][rows]
    ways = {way: t for way, t in times.items() if with_dense or way is not tuning.Way.DENSE}
    return TunedLayer(name, rows, ways, tuning.fastest(ways))


def _has_convolutions(model: nn.Module) -> bool:
    return any(isinstance(m, FrozenConvolution) or ConvolutionLayer().is_structured(m) for m in model.modules())


def _swept(layer: StructuredLinear | FrozenLinear, state: State | None) -> Swept:
    """A layer as it is timed."""
    dtype = _dtype(layer)
    if state is None or state.cell is None or not is_native(layer.program, dtype):
        return Swept(tuning.name_of(layer.program, dtype), layer, dtype)
    return Swept(state_name(state.cell, layer.program, dtype), layer, dtype, state.cell)


def _tuned_convolutions(
    layers: Mapping[str, FrozenConvolution], inputs: Mapping[str, Tensor], allow_dense: bool, seconds: float
) -> list[TunedLayer]:
    """Frozen convolutions, timed on what they get."""
    found = []
    for name, x in inputs.items():
        layer = layers[name]
        held = layer.dense is not None
        structured = tuning.Way.NATIVE if layer.is_native else tuning.Way.REFERENCE
        ways = [structured, tuning.Way.DENSE] if allow_dense or held else [structured]
        with torch.inference_mode():
            if tuning.Way.DENSE in ways and not held:
                layer.hold_dense()
            dense = layer.dense
            runs = [partial(layer.structured, x)] + ([partial(dense, x)] if dense is not None else [])
            times = interleaved(*runs, seconds=seconds)
        medians = {way: 1e6 * statistics.median(own) for way, own in zip(ways, times, strict=True)}
        chosen = tuning.fastest(medians)
        layer.hold_dense(chosen is tuning.Way.DENSE)
        rows = next(iter(ConvolutionLayer().rows(layer.layer, x[:1]))).shape[1] * (len(x) if x.dim() > 2 else 1)
        found.append(TunedLayer(name, rows, medians, chosen))
    return found


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point() or t.is_complex()]


def _dtype(layer: nn.Module) -> torch.dtype:
    tensors = _tensors(layer)
    return tensors[0].dtype if tensors else torch.get_default_dtype()


def _is_here(layer: nn.Module) -> bool:
    return all(t.device.type == "cpu" and not t.is_complex() for t in _tensors(layer))
