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

from structmat.compression.running import Forward, call, device_of, evaluating, to_device

logger = logging.getLogger(__name__)

ROWS_PER_INPUT, FEWEST_ROWS = 24, 4096
"""Rows of calibration data to read: so many for each input feature, and at least so many in all."""

DAMPING = 1e-3
"""Of the second moment before it is inverted, as a share of its mean eigenvalue."""


@dataclass(frozen=True)
class Prefix:
    """What a layer reads behind a compressed prefix.

    Args:
        second_moment: (in, in), ``E[x x^T]`` of its inputs in the compressed model.
        cross_moment: (in, in), ``E[z x^T]`` with the inputs ``z`` of the same layer in the original model.
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
        name: of the layer.
        loader, forward: as for :func:`structmat.compression.calibrate.calibrate`; the beginning of the data is read.
        calls: how often the layer is called for one batch.

    Returns:
        The moments; None if the two models do not call the layer alike (as where inputs are routed by their values).
    """
    second: Tensor | None = None
    cross: Tensor | None = None
    rows = 0
    for batch in loader:
        before = _inputs(original, name, batch, forward, calls)
        after = _inputs(model, name, batch, forward, calls)
        if [x.shape for x in before] != [x.shape for x in after]:
            logger.info("%s: the compressed model calls it otherwise; its weight is not corrected", name)
            return None
        for z, x in zip(before, after, strict=True):
            z, x = (t.reshape(-1, t.shape[-1]).double() for t in (z, x))
            if second is None or cross is None:
                second = cross = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
            second, cross = second + (x.T @ x).cpu(), cross + (z.T @ x).cpu()
            rows += x.shape[0]
        if second is not None and rows >= max(FEWEST_ROWS, ROWS_PER_INPUT * second.shape[0]):
            break
    if second is None or cross is None or rows == 0:
        return None
    return Prefix(second / rows, cross / rows)


def corrected(weight: Tensor, prefix: Prefix) -> Tensor:
    """The weight (out, in) that puts out what ``weight`` did, as well as a linear map of the new inputs can.

    ``W (I + (E[z x^T] - E[x x^T]) (E[x x^T] + d I)^(-1))``: equal to ``W`` where the prefix changed nothing.
    """
    size = prefix.second_moment.shape[0]
    damping = DAMPING * float(prefix.second_moment.diagonal().mean())
    if damping <= 0:
        return weight
    regular = prefix.second_moment + damping * torch.eye(size, dtype=torch.float64)
    change: Tensor = torch.linalg.solve(regular, prefix.cross_moment - prefix.second_moment, left=False)
    wide = weight.detach().cpu().double()
    return torch.addmm(wide, wide, change)


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """The layer has been reached: what follows it need not run."""


@torch.no_grad()
def _inputs(model: nn.Module, name: str, batch: Any, forward: Forward | None, calls: int) -> list[Tensor]:
    """The inputs of a layer for one batch, in the order of its calls."""
    found: list[Tensor] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments[0].detach())
        if len(found) >= calls:
            raise _Stop

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        with evaluating(model):
            call(model, to_device(batch, device_of(model)), forward)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found
