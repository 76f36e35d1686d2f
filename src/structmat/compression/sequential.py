"""Fitting a layer behind layers that are already compressed: on the inputs that it will get, for the outputs of before.

A layer behind compressed ones reads ``x`` where it used to read ``z``. What it should put out is still ``W z``, and the
best linear guess of that from ``x`` is ``W E[z x^T] E[x x^T]^(-1) x``: a corrected weight, whose structured fit in the
norm of ``E[x x^T]`` also makes up for what the layers before it lost. Recomputing the moment of the inputs alone does
not. Source: the closed-form updates of Wang et al., "SVD-LLM" (2025), for any structure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.running import Forward, evaluating, inputs_at
from structmat.compression.scan import adapter_of

logger = logging.getLogger(__name__)

ROWS_PER_INPUT, FEWEST_ROWS = 24, 4096
"""Rows of calibration data to read: so many for each input feature, and at least so many in all; of patches that
overlap only those that are new count."""

DAMPING = 1e-3
"""Of the second moment before it is inverted, as a share of its mean eigenvalue."""


@dataclass(frozen=True)
class Prefix:
    """What a layer reads behind a compressed prefix.

    Args:
        second_moment: (copies, in, in), ``E[x x^T]`` of what its matrices multiply in the compressed model.
        cross_moment: (copies, in, in), ``E[z x^T]`` with what they multiply in the original model, ``z``.
    """

    second_moment: Tensor
    cross_moment: Tensor


def prefix_moments(
    original: nn.Module,
    model: nn.Module,
    name: str,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    calls: int = 1,
) -> Prefix | None:
    """Run both models up to a layer, batch by batch, and compare what it reads.

    Args:
        original: the model before compression.
        model: the same with the layers before ``name`` replaced.
        name: of the layer, which is still dense in both.
        loader, forward: as for :func:`structmat.compression.calibrate.calibrate`; the beginning of the data is read.
        calls: how often the layer is called for one batch.

    Returns:
        The moments; None if the two models do not call the layer alike (as where inputs are routed by their values).
    """
    second: Tensor | None = None
    cross: Tensor | None = None
    rows = 0
    layer = model.get_submodule(name)
    adapter = adapter_of(layer)
    for batch in loader:
        before, after = (_inputs(each, name, calls, batch, forward) for each in (original, model))
        if [x.shape for x in before] != [x.shape for x in after]:
            logger.info("%s: the compressed model calls it otherwise; its weight is not corrected", name)
            return None
        for old, new in zip(before, after, strict=True):
            for z, x in zip(adapter.rows(layer, old), adapter.rows(layer, new), strict=True):
                z, x = z.double(), x.double()
                own, both = (x.mT @ x).cpu(), (z.mT @ x).cpu()
                second, cross = (own, both) if second is None or cross is None else (second + own, cross + both)
                rows += x.shape[1]
        if second is not None:
            fewest = max(FEWEST_ROWS, ROWS_PER_INPUT * second.shape[-1])
            if rows >= fewest * adapter.overlap(layer):
                break
    if second is None or cross is None or rows == 0:
        return None
    return Prefix(second / rows, cross / rows)


def corrected(weights: Tensor, prefix: Prefix) -> Tensor:
    """The weights (copies, out, in) that put out what ``weights`` did, as well as linear maps of the new inputs can.

    ``W (I + (E[z x^T] - E[x x^T]) (E[x x^T] + d I)^(-1))``: equal to ``W`` where the prefix changed nothing.
    """
    size = prefix.second_moment.shape[-1]
    damping = DAMPING * prefix.second_moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    wide = weights.detach().cpu().double()
    if bool((damping <= 0).any()):
        return weights
    regular = prefix.second_moment + damping[:, None, None] * torch.eye(size, dtype=torch.float64)
    change: Tensor = torch.linalg.solve(regular, prefix.cross_moment - prefix.second_moment, left=False)
    return torch.baddbmm(wide, wide, change)


@torch.no_grad()
def _inputs(model: nn.Module, name: str, calls: int, batch: Any, forward: Forward | None) -> list[Tensor]:
    with evaluating(model):
        return inputs_at(model, name, calls, batch, forward)
