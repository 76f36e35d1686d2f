"""Classical fast transforms as structured matrices: exact members of the chain families.

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
from structmat.sizes import divisors
from structmat.structures.butterfly import Butterfly
from structmat.structures.chain import Chain
from structmat.structures.monarch import Monarch


def hadamard(size: int, *, dtype: torch.dtype = torch.float64) -> StructuredMatrix:
    """The Sylvester-Hadamard matrix (entries 1 and -1) as a butterfly: ``log2 size`` factors of ``[[1, 1], [1, -1]]``.

    Raises:
        ShapeError: ``size`` is no power of two of at least 2.
    """
    if size < 2 or size & (size - 1):
        raise ShapeError(f"A Hadamard butterfly has a size of 2, 4, 8, ...; got {size}. Pad to the next power of two.")
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype)[None, :, :, None]
    tensors = {}
    for level in range(size.bit_length() - 1):
        stride = 2**level
        tensors[f"factor{level}"] = block.expand(size // (2 * stride), 2, 2, stride).contiguous()
    return StructuredMatrix(Butterfly(), (size, size), tensors)


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
        ShapeError: the radices do not multiply to ``size``, or one is below 2.
    """
    radices = tuple(_prime_factors(size) if radices is None else radices)
    if not radices or min(radices) < 2 or math.prod(radices) != size:
        raise ShapeError(
            f"The radices {radices} of a Fourier transform of size {size} must be at least 2 and multiply to it."
        )
    patterns, tensors, span = [], {}, 1
    for level, radix in enumerate(radices):
        groups = size // (span * radix)
        row, column, offset = torch.arange(radix), torch.arange(radix), torch.arange(span)
        exponent = column[None, :, None] * (row[:, None, None] * span + offset[None, None, :])
        factor = _roots(exponent, span * radix, dtype)
        patterns.append((groups, radix, radix, span))
        tensors[f"factor{level}"] = factor.expand(groups, radix, radix, span).contiguous()
        span *= radix
    return StructuredMatrix(Chain(tuple(patterns)), (size, size), tensors), _digit_reversal(size, radices)


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
        ShapeError: ``blocks`` does not divide ``size``.
    """
    if size < 1 or blocks < 1 or size % blocks:
        raise ShapeError(
            f"{blocks} blocks do not divide a Fourier transform of size {size}. Use one of {divisors(size)}."
        )
    width = size // blocks
    block, column = torch.arange(blocks), torch.arange(width)
    right = _roots(column[:, None] * column, width, dtype).expand(blocks, width, width).contiguous()
    # left[l, k, j] = exp(-2 pi i (j k / n + l k / blocks))
    exponent = block[None, :, None] * column[None, None, :] + width * block[:, None, None] * block[None, :, None]
    matrix = StructuredMatrix(
        Monarch((blocks, width), 1), (size, size), {"left": _roots(exponent, size, dtype), "right": right}
    )
    return matrix, torch.arange(size).reshape(width, blocks).T.flatten()


def _roots(exponent: Tensor, order: int, dtype: torch.dtype) -> Tensor:
    """``exp(-2 pi i exponent / order)``, exact in the exponent however large it is."""
    angle = (exponent % order).to(torch.float64) * (-2 * math.pi / order)
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def _prime_factors(size: int) -> list[int]:
    factors = []
    while size > 1:
        prime = divisors(size)[1]
        factors.append(prime)
        size //= prime
    return factors


def _digit_reversal(size: int, radices: tuple[int, ...]) -> Tensor:
    def reorder(index: Tensor, radices: tuple[int, ...]) -> Tensor:
        if len(radices) <= 1:
            return index
        last = radices[-1]
        return torch.cat([reorder(index[c::last], radices[:-1]) for c in range(last)])

    return reorder(torch.arange(size), radices)
