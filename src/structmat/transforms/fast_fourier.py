"""The fast Fourier transform as a chain of any radices.

The discrete Fourier transform is ``F[k, j] = exp(-2 pi i j k / n)``, not normalised. It is a chain only up to a fixed
order of its inputs: ``F @ x == S @ x[order]``.
Source: Cooley and Tukey 1965; as Monarch matrices, Dao et al., "Monarch" (ICML 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.errors import ShapeError
from structmat.matrix import StructuredMatrix
from structmat.projection.orders import digit_reversal
from structmat.sizes import divisors
from structmat.structures.chain import Chain
from structmat.structures.monarch import Monarch


def fourier(
    size: int, *, radices: Sequence[int] | None = None, dtype: torch.dtype = torch.complex128
) -> tuple[StructuredMatrix, Tensor]:
    """The discrete Fourier transform as a chain, one factor a radix: the fast Fourier transform of any size.

    Args:
        size: at least 2.
        radices: in order of application, their product is ``size``; None for its prime factors in ascending order.
        dtype: complex.

    Returns:
        ``S`` and ``order`` with ``F @ x == S @ x[order]``; the order is that of reversed digits.

    Raises:
        ShapeError: the radices do not multiply to ``size``, or one is below 2, or ``dtype`` is real.
    """
    _check_complex(dtype)
    radices = tuple(prime_factors(size) if radices is None else radices)
    if not radices or min(radices) < 2 or math.prod(radices) != size:
        raise ShapeError(
            f"The radices {radices} of a Fourier transform of size {size} must be at least 2 and multiply to it."
        )
    patterns, tensors, span = [], {}, 1
    for level, radix in enumerate(radices):
        groups = size // (span * radix)
        row, column, offset = torch.arange(radix), torch.arange(radix), torch.arange(span)
        exponent = column[None, :, None] * (row[:, None, None] * span + offset[None, None, :])
        factor = roots(exponent, span * radix, dtype)
        patterns.append((groups, radix, radix, span))
        tensors[f"factor{level}"] = factor.expand(groups, radix, radix, span).contiguous()
        span *= radix
    return StructuredMatrix(Chain(tuple(patterns)), (size, size), tensors), digit_reversal(size, radices)


def fourier_monarch(
    size: int, blocks: int, *, dtype: torch.dtype = torch.complex128
) -> tuple[StructuredMatrix, Tensor]:
    """The discrete Fourier transform of a composite size as a Monarch matrix of rank 1.

    Args:
        size: a multiple of ``blocks``.
        blocks: column blocks; the row groups are ``size // blocks``.
        dtype: complex.

    Returns:
        ``S`` and ``order`` with ``F @ x == S @ x[order]``.

    Raises:
        ShapeError: ``blocks`` does not divide ``size``, or ``dtype`` is real.
    """
    _check_complex(dtype)
    if size < 1 or blocks < 1 or size % blocks:
        raise ShapeError(
            f"{blocks} blocks do not divide a Fourier transform of size {size}. Use one of {divisors(size)}."
        )
    width = size // blocks
    block, column = torch.arange(blocks), torch.arange(width)
    right = roots(column[:, None] * column, width, dtype).expand(blocks, width, width).contiguous()
    # left[l, k, j] = exp(-2 pi i (j k / n + l k / blocks))
    exponent = block[None, :, None] * column[None, None, :] + width * block[:, None, None] * block[None, :, None]
    matrix = StructuredMatrix(
        Monarch((blocks, width), 1), (size, size), {"left": roots(exponent, size, dtype), "right": right}
    )
    return matrix, torch.arange(size).reshape(width, blocks).T.flatten()


def _check_complex(dtype: torch.dtype) -> None:
    if not dtype.is_complex:
        raise ShapeError(f"A Fourier transform is complex; got {dtype}. Use hartley(size) for a real transform.")


def roots(exponent: Tensor, order: int, dtype: torch.dtype) -> Tensor:
    """``exp(-2 pi i exponent / order)``, exact in the exponent however large it is."""
    angle = (exponent % order).to(torch.float64) * (-2 * math.pi / order)
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def prime_factors(size: int) -> list[int]:
    """In ascending order."""
    factors = []
    while size > 1:
        prime = divisors(size)[1]
        factors.append(prime)
        size //= prime
    return factors
