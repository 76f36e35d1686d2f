"""Batch normalisation after compression: means and variances estimated again where that brings the outputs nearer.

The statistics that a model was trained with are those of its old activations. Running the calibration data through the
compressed model gives those of the new ones; whether these serve better is measured on batches that were left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.objectives import distance
from structmat.compression.running import Forward, call, device_of, evaluating, input_of, outcome, to_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """What estimating again did.

    Args:
        layers: how many normalisations there are.
        before: distance from the original's outputs on the batches that were left out.
        after: the same with statistics of the other batches.
        kept: whether the new statistics (of all batches) stay.
    """

    layers: int
    before: float
    after: float
    kept: bool


def reestimate(
    model: nn.Module,
    original: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    temperature: float = 1.0,
) -> Statistics | None:
    """Estimate the statistics of batch normalisations anew, in place, if that brings the outputs nearer.

    Args:
        model: compressed.
        original: whose outputs count.
        loader, forward: as for :func:`structmat.compression.calibrate.calibrate`. Every other batch judges.
        temperature: at which logits are compared.

    Returns:
        What was measured; None if the model has no batch normalisation with statistics.
    """
    layers = normalisations(model)
    if not layers:
        return None
    held = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    half = 1 if sum(1 for _ in islice(iter(loader), 2)) < 2 else 2
    before = _distance(model, original, islice(iter(loader), 0, None, half), forward, temperature)
    _estimate(model, islice(iter(loader), half - 1, None, half), forward)
    after = _distance(model, original, islice(iter(loader), 0, None, half), forward, temperature)
    kept = after < before
    if kept and half > 1:
        _estimate(model, loader, forward)
    elif not kept:
        write_(model, held)
    logger.info("batch statistics: distance %.4g, estimated again %.4g", before, after)
    return Statistics(len(layers), before, after, kept)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The statistics by their names."""
    return {
        f"{name}.{key}": buffer
        for name, module in normalisations(model).items()
        for key, buffer in module.named_buffers(recurse=False)
    }


@torch.no_grad()
def write_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model the statistics that :func:`tensors_of` read."""
    for name, buffer in tensors_of(model).items():
        buffer.copy_(tensors[name])


def normalisations(model: nn.Module) -> dict[str, nn.Module]:
    """The batch normalisations that have statistics, by name."""
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m.running_mean is not None}


@torch.no_grad()
def _distance(
    model: nn.Module, original: nn.Module, batches: Iterator[Any], forward: Forward | None, temperature: float
) -> float:
    total, count = 0.0, 0
    with evaluating(model), evaluating(original):
        for batch in batches:
            wanted = outcome(call(original, to_device(batch, device_of(original)), forward), batch)
            reached = outcome(call(model, to_device(batch, device_of(model)), forward), batch)
            total, count = total + float(distance(reached, wanted, temperature, None)), count + 1
    return total / max(1, count)


@torch.no_grad()
def _estimate(model: nn.Module, batches: Iterable[Any], forward: Forward | None) -> None:
    """Means over batches, each batch normalised by its own statistics as in training."""
    with evaluating(model), _collecting(model):
        for batch in batches:
            call(model, to_device(batch, device_of(model)), forward)


@contextmanager
def _collecting(model: nn.Module) -> Iterator[None]:
    layers = [m for m in normalisations(model).values() if isinstance(m, nn.modules.batchnorm._NormBase)]
    rates = [layer.momentum for layer in layers]
    begun: set[nn.Module] = set()

    def begin(layer: nn.modules.batchnorm._NormBase, _: Any) -> None:
        # Only now: a layer that is never called, or never for more than one value a channel, keeps what it had.
        if layer.training and layer not in begun:
            begun.add(layer)
            layer.reset_running_stats()

    with by_batches(layers):
        handles = [layer.register_forward_pre_hook(begin) for layer in layers]
        for layer in layers:
            layer.momentum = None  # the mean over all batches
        try:
            yield
        finally:
            for layer, rate, handle in zip(layers, rates, handles, strict=True):
                layer.momentum = rate
                handle.remove()


@contextmanager
def by_batches(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Batch normalisations with the statistics of the batches, as in training; by the running ones where a channel has
    one value, which has no variance (the last batch of an epoch may be one sample). Afterwards they are in evaluation
    mode."""
    layers = list(layers)

    def choose(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = input_of(given, named)
        layer.training = x.numel() > x.shape[1]

    handles = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for layer, handle in zip(layers, handles, strict=True):
            handle.remove()
            layer.training = False
