"""Everything that a compression found, as plain values."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from structmat.compression.workfolder import write_json
from structmat.processor import processor_name

if TYPE_CHECKING:
    from structmat.kernels import Native

VERSION = 1
"""Of the report's format."""


@dataclass(frozen=True)
class Totals:
    """A figure before and after compression; of the compressible layers, or of the whole model."""

    before: float
    after: float


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run before and after, for a number of samples at once; after: frozen, as for deployment.

    ``layers`` are sums over single layers; ``model`` are medians of runs of the whole model, where data was given: both
    models run in turns, and ``model_ratio`` is the median over turns of after by before.
    """

    batch: int
    layers_before: float
    layers_after: float
    model_before: float | None = None
    model_after: float | None = None
    model_ratio: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """One compressible layer.

    Args:
        name, shape, kind: of the layer.
        structure: chosen, as text, and as JSON in ``structure_json``; "Dense()" is kept.
        reason: why it is kept, if it is: ``"chosen"`` by allocation, or why it could not take part.
        parameters, flops: of the chosen structure; ``dense_parameters`` and ``dense_flops`` of the layer before.
        error, lower_bound, certificate, method, norm: of the final fit.
        predicted_loss: of the chosen candidate.
        microseconds, dense_microseconds: medians on this machine at the first batch size; ``slower`` compares them.
        candidates: all of them: structure, parameters, flops, error, loss, cost, and so on.
        measured: effects of replacing this layer alone: structure, predicted, measured.
        refused: how many candidates were refused, by reason.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    structure: str
    structure_json: Mapping[str, Any]
    reason: str
    parameters: int
    dense_parameters: int
    flops: int
    dense_flops: int
    error: float
    lower_bound: float
    certificate: str
    method: str
    norm: str
    predicted_loss: float
    microseconds: float
    dense_microseconds: float
    slower: bool
    candidates: tuple[Mapping[str, Any], ...]
    measured: tuple[Mapping[str, Any], ...]
    refused: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`structmat.compress`, every figure of it.

    Args:
        model: the class of the model.
        budget: as JSON, with ``unit``, ``limit``, ``spent`` and ``dense`` in that unit.
        parameters: stored numbers of the compressible weights; ``model_parameters`` of the whole model.
        model_bytes: of all tensors of the whole model, as they are saved.
        flops: of the compressible layers for one sample.
        quality: what ``evaluate`` returned, by moment: ``before``, ``after``, and ``recovered`` if there was recovery.
        timings: milliseconds at several batch sizes.
        layers: the compressible layers.
        skipped: layers that are kept: name, kind, shape, parameters, reason.
        predicted_loss: the sum over layers; ``loss_bound`` is what no choice within the budget is below, and
            ``exact`` says whether the solver proved the choice optimal.
        calibration: batches, samples, terms, kind of loss, mean loss; None without data.
        recovery: what the recovery reported, or None.
        seconds: of each step.
        environment: versions, processor, threads.
        seed: of every random choice.
        frontier: sizes that the model could have, by rising cost: cost, share, predicted_loss, and quality where it was
            measured.
        tried: models that were built in search of a quality: cost, predicted_loss, quality, value, worse, accepted.
        again: choices that were made again: distance, better.
        statistics: what estimating the statistics of batch normalisations again did: layers, distances from the
            original's outputs before and after, and whether it was kept; None if there are none.
        version: of this format.
    """

    model: str
    budget: Mapping[str, Any]
    parameters: Totals
    model_parameters: Totals
    model_bytes: Totals
    flops: Totals
    quality: Mapping[str, Mapping[str, float]]
    timings: tuple[Timing, ...]
    layers: tuple[LayerReport, ...]
    skipped: tuple[Mapping[str, Any], ...]
    predicted_loss: float
    loss_bound: float
    exact: bool
    calibration: Mapping[str, Any] | None
    recovery: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    environment: Mapping[str, Any]
    seed: int
    frontier: tuple[Mapping[str, Any], ...] = ()
    tried: tuple[Mapping[str, Any], ...] = ()
    again: tuple[Mapping[str, Any], ...] = ()
    statistics: Mapping[str, Any] | None = None
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the format's version first; numbers that are not finite, as of a perplexity, as text."""
        data = _plain(asdict(self))
        return {"structmat_report": data.pop("version"), **data}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write ``report.json``; the file appears whole or not at all."""
        write_json(path, self.to_json())


def _plain(value: Any) -> Any:
    """Without NaN and infinities, which JSON does not have: ``float`` reads what is in their place."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _backend(kernels: Native) -> str:
    if not kernels.available:
        return f"no: {kernels.reason}"
    return f"{kernels.instruction_set}, by address ({kernels.reason})" if kernels.reason else kernels.instruction_set


def environment() -> dict[str, Any]:
    """Versions and the machine: figures without them mean little."""
    from structmat import __version__
    from structmat.kernels import native

    kernels = native()
    return {
        "structmat": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "native": _backend(kernels),
    }
