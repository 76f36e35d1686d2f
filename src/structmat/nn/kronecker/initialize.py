"""How Kronecker blocks start: a variance that survives factors and activations, the published way, and on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structmat.errors import DataError, StructureError
from structmat.nn.kronecker.activation import gain
from structmat.structures.kronecker import Orthogonal, stored_axes

if TYPE_CHECKING:
    from structmat.nn.kronecker.block import KroneckerBlock
    from structmat.nn.kronecker.chain import KroneckerChain

Initialize = Callable[["KroneckerBlock", torch.Generator | None], None]
"""Draws all tensors of a block."""

SMALL = 16
"""Factors with fewer columns scatter so much that a block is calibrated on white noise at once."""

_TRIES = 5
_NOISE_ROWS = 256


def balanced_(block: KroneckerBlock, generator: torch.Generator | None = None) -> None:
    """Scaled orthogonal factors that keep the second moment of every stage at 1; biases 0.

    A stage that contracts an axis of length c gets entries of variance ``g / c``, g the :func:`gain` of the activation
    before it; the last ones share a factor 1 / terms. In the mean over draws this is exact for any input: the fan-in of
    a factor is its own number of columns, not that of the layer. Single draws scatter more than dense ones, as few
    numbers carry the map; blocks with short factors are therefore calibrated on white noise too.
    """
    shape = block.shape
    inside = gain(block.inner)
    padded = math.prod(shape.inputs) / shape.in_features
    for chain in block.chains:
        layout = chain.layout
        active = {gap.place for gap in layout.active}
        for place, axis in enumerate(layout.order):
            before = block.input_gain * padded if place == 0 else inside if place - 1 in active else 1.0
            share = 1 / shape.terms if place == len(layout.order) - 1 else 1.0
            _draw(chain, axis, before * share, generator)
    _zero_biases(block)
    if block.inner is not None and min(shape.inputs) < SMALL:
        noise = torch.randn(_NOISE_ROWS, shape.in_features, generator=generator)
        own = block.factors()[0]
        calibrate_([block], noise.to(own) / block.input_gain**0.5, generator=generator)


def source_(block: KroneckerBlock, generator: torch.Generator | None = None) -> None:
    """The published start: every factor uniform in ``+-sqrt(6 / (rows + columns))`` (Glorot), biases 0.

    Fine for shallow networks; many terms grow and rectifiers fade with the depth (no gains, no 1 / terms).
    """
    with torch.no_grad():
        for chain in block.chains:
            for factor in chain.factors():
                bound = math.sqrt(6 / (factor.shape[1] + factor.shape[2]))
                drawn = torch.empty(factor.shape, dtype=torch.promote_types(factor.dtype, torch.float32))
                factor.copy_(drawn.uniform_(-bound, bound, generator=generator))
    _zero_biases(block)


@torch.no_grad()
def calibrate_(blocks: Sequence[KroneckerBlock], batch: Tensor, *, generator: torch.Generator | None = None) -> None:
    """Scale the factors of a sequence of blocks so that on ``batch`` every pre-activation has a mean square of 1.

    Stage by stage, in order, weights are divided by the root mean square of what they make (layer-sequential unit
    variance: Mishkin and Matas, "All you need is a good init", 2016). Cost: one forward pass.

    Args:
        blocks: one after the other, as in a network; the biases should be 0, as they are at the start.
        batch: rows (..., in_features) of the first block.
        generator: for stages that are drawn again because nothing passes them.

    Raises:
        StructureError: nothing passes a stage in five draws, as activations between short factors make likely.
        DataError: the batch is 0 or not finite.
    """
    if not bool(batch.isfinite().all()) or not bool(batch.any()):
        raise DataError("Blocks can't be calibrated on a batch that is 0 or not finite. Give a batch of real inputs.")
    x = batch
    for block in blocks:
        for chain in block.chains:
            for number, gap in enumerate(chain.layout.active):
                _revive(chain, gap.place, number, x, generator)
        ends = [chain.layout.order[-1] for chain in block.chains]
        size = _rms(block.linear(x))
        for _ in range(_TRIES):
            if size > 0:
                break
            for chain, axis in zip(block.chains, ends, strict=True):
                _draw(chain, axis, 1.0, generator)
            size = _rms(block.linear(x))
        _check(size)
        for chain, axis in zip(block.chains, ends, strict=True):
            getattr(chain, f"factor{axis}").div_(size)
        x = block(x)


def _revive(chain: KroneckerChain, place: int, number: int, x: Tensor, generator: torch.Generator | None) -> None:
    """Draw the factor before an activation anew until something passes, and let its outputs have size 1."""
    axis = chain.layout.order[place]
    size = _rms(chain.hidden(x)[number][1])
    for _ in range(_TRIES):
        if size > 0:
            break
        _draw(chain, axis, 1.0, generator)
        size = _rms(chain.hidden(x)[number][1])
    _check(size)
    getattr(chain, f"factor{axis}").div_(size)


def _check(size: float) -> None:
    if not 0 < size < math.inf:
        raise StructureError(
            f"A stage of the Kronecker block has outputs of size {size} in {_TRIES} draws: nothing passes. Use fewer "
            "or larger factors, leave out activations after short ones (activated=), or add a residual path."
        )


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _draw(chain: KroneckerChain, axis: int, scale: float, generator: torch.Generator | None) -> None:
    parameter = getattr(chain, f"factor{axis}")
    where = stored_axes(chain.layout.terms, chain.layout.order, axis)
    with torch.no_grad():
        parameter.copy_(
            Orthogonal(scale**0.5, where).draw(
                tuple(parameter.shape), generator=generator, dtype=parameter.dtype, device=parameter.device
            )
        )


def _zero_biases(block: KroneckerBlock) -> None:
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.rpartition(".")[2].startswith("bias"):
                parameter.zero_()
