"""Transforms whose algorithm is sums and differences: Hadamard, Walsh and Haar."""

from __future__ import annotations

import torch

from structmat.errors import ShapeError
from structmat.matrix import StructuredMatrix
from structmat.projection.orders import sequency
from structmat.sizes import is_power_of_two
from structmat.structures.butterfly import Butterfly
from structmat.structures.permuted_butterfly import PermutedButterfly


def hadamard(size: int, *, dtype: torch.dtype = torch.float64) -> StructuredMatrix:
    """The Sylvester-Hadamard matrix (entries 1 and -1) as a butterfly: ``log2 size`` factors of ``[[1, 1], [1, -1]]``.

    Raises:
        ShapeError: ``size`` is no power of two of at least 2.
    """
    if size < 2 or not is_power_of_two(size):
        raise ShapeError(f"A Hadamard butterfly has a size of 2, 4, 8, ...; got {size}. Pad to the next power of two.")
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype)[None, :, :, None]
    tensors = {}
    for level in range(size.bit_length() - 1):
        stride = 2**level
        tensors[f"factor{level}"] = block.expand(size // (2 * stride), 2, 2, stride).contiguous()
    return StructuredMatrix(Butterfly(), (size, size), tensors)


def walsh(size: int, *, dtype: torch.dtype = torch.float64) -> StructuredMatrix:
    """The Hadamard matrix with its rows by number of changes of sign (sequency): row k has k of them.

    Raises:
        ShapeError: ``size`` is no power of two of at least 2.
    """
    inner = hadamard(size, dtype=dtype)
    natural = torch.arange(size)
    tensors = {**inner.tensors, "rows": sequency(size), "columns": natural}
    return StructuredMatrix(PermutedButterfly(), (size, size), tensors)


def haar(size: int, *, dtype: torch.dtype = torch.float64) -> StructuredMatrix:
    """The orthonormal Haar wavelet transform: the mean first, then the details from coarse to fine.

    In place it is a butterfly: at stride s the pairs whose places are multiples of s give their sum and their
    difference, the others pass. The order of the outputs is a permutation after it.
    Source: Haar 1910; Mallat 1989.

    Raises:
        ShapeError: ``size`` is no power of two of at least 2, or ``dtype`` is one of integers.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        raise ShapeError(f"The factors of a Haar transform are no integers; got {dtype}. Use a floating dtype.")
    if size < 2 or not is_power_of_two(size):
        raise ShapeError(f"A Haar transform has a size of 2, 4, 8, ...; got {size}. Pad to the next power of two.")
    tensors = {}
    for level in range(size.bit_length() - 1):
        stride = 1 << level
        factor = torch.eye(2, dtype=dtype)[None, :, :, None].repeat(size // (2 * stride), 1, 1, stride)
        factor[:, :, :, 0] = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype) * 0.5**0.5
        tensors[f"factor{level}"] = factor
    details = [
        torch.arange(stride, size, 2 * stride) for stride in (size >> level for level in range(1, size.bit_length()))
    ]
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), *details])
    tensors |= {"rows": rows, "columns": torch.arange(size)}
    return StructuredMatrix(PermutedButterfly(), (size, size), tensors)
