"""Permutations, reflections and convolutions as members of families that can be trained from there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.errors import DataError, ShapeError
from structmat.matrix import StructuredMatrix
from structmat.projection.kaleidoscope import identity_factor, kaleidoscope_patterns
from structmat.sizes import power_of_two
from structmat.structures.kaleidoscope import Kaleidoscope
from structmat.structures.permutation import Permutation
from structmat.structures.real_part import RealPart
from structmat.transforms.fast_fourier import fourier


def permutation(order: Tensor | Sequence[int], *, dtype: torch.dtype = torch.float64) -> StructuredMatrix:
    """``y[i] = x[order[i]]`` as a :class:`~structmat.structures.permutation.Permutation`, which moves data only.

    Raises:
        ShapeError: ``order`` is no permutation of 0, 1, 2, ...
        DataError: it holds numbers that are no integers.
    """
    given = torch.as_tensor(order)
    if given.is_floating_point() or given.is_complex():
        raise DataError(f"The places of a permutation are integers; got {given.dtype}. Give int64.")
    index = given.to(torch.int64)
    if index.dim() != 1 or not len(index) or not torch.equal(index.sort().values, torch.arange(len(index))):
        raise ShapeError(f"A permutation of n places holds 0, 1, ..., n - 1 once each; got shape {tuple(index.shape)}.")
    return StructuredMatrix(Permutation(), (len(index), len(index)), {"order": index}, dtype=dtype)


def householder(vector: Tensor) -> StructuredMatrix:
    """The reflection ``I - 2 v v^H / ||v||^2`` as a real or complex kaleidoscope of width 1, of any size.

    The transposed butterfly turns v into a multiple of the first unit vector, a plane rotation for each pair, which
    halves the support at each stage; there the sign is changed, and the butterfly turns back.

    Args:
        vector: (n,), real or complex, not zero.

    Raises:
        ShapeError: it has another number of axes.
        DataError: it is zero, or holds integers, or entries that are NaN or infinite.
    """
    if vector.dim() != 1 or not len(vector):
        raise ShapeError(f"A reflection has a vector (n,); got shape {tuple(vector.shape)}.")
    _check_numbers("vector of a reflection", vector)
    if not bool(vector.any()):
        raise DataError("A reflection in the zero vector is not defined. Give a vector that is not zero.")
    size = len(vector)
    native = power_of_two(size)
    wide = torch.complex128 if vector.is_complex() else torch.float64
    held = torch.zeros(native, dtype=wide)
    held[:size] = vector.detach().to(wide)
    held /= held.abs().max()  # squares neither overflow nor vanish
    patterns = kaleidoscope_patterns(native, 1)
    if native == 1:
        factor = -torch.ones(1, 1, 1, 1, dtype=vector.dtype)
        return StructuredMatrix(Kaleidoscope(), (1, 1), {"factor0": factor})
    factors = [identity_factor(pattern, wide) for pattern in patterns]
    middle = len(patterns) // 2
    for place in range(middle + 1):  # strides n / 2, .., 1; what is left of v lies in the first places
        stride = patterns[place][3]
        first, second = held[:stride], held[stride : 2 * stride]
        length = (first.abs().square() + second.abs().square()).sqrt()
        even = torch.where(length > 0, length, torch.ones_like(length))
        c = torch.where(length > 0, first / even, torch.ones_like(first))
        s = torch.where(length > 0, second / even, torch.zeros_like(second))
        turn = torch.stack([torch.stack([c.conj(), s.conj()]), torch.stack([-s, c])])  # (2, 2, stride), unitary
        factors[place][0] = turn
        back = turn.conj().transpose(0, 1)
        if place < middle:
            factors[len(patterns) - 1 - place][0] = back
        else:
            flip = torch.tensor([-1.0, 1.0], dtype=wide)
            factors[place][0] = torch.einsum("abd,b,bcd->acd", back, flip, turn)
        held = torch.cat([length.to(wide), torch.zeros(native - stride, dtype=wide)])
    tensors = {f"factor{i}": factor.to(vector.dtype).resolve_conj().contiguous() for i, factor in enumerate(factors)}
    return StructuredMatrix(Kaleidoscope(), (size, size), tensors)


def convolution(kernel: Tensor) -> StructuredMatrix:
    """The circular convolution ``y[i] = sum over j of kernel[(i - j) mod n] x[j]``, diagonalised by Fourier transforms.

    A complex kaleidoscope of width 1: a transform by the transposed butterfly, the kernel's spectrum, and a transform
    back, without a permutation between them; its real part for a real kernel. A size that is no power of two is the
    corner of a larger convolution, of expansion 2.
    Source: Dao et al. (ICLR 2020).

    Args:
        kernel: (n,), the first column of the matrix; real or complex.

    Raises:
        ShapeError: it has another number of axes.
        DataError: it holds integers, or entries that are NaN or infinite.
    """
    if kernel.dim() != 1 or not len(kernel):
        raise ShapeError(f"A convolution has a kernel (n,); got shape {tuple(kernel.shape)}.")
    _check_numbers("kernel of a convolution", kernel)
    size = len(kernel)
    native = power_of_two(size)
    expansion = 1 if native == size else 2
    inner = expansion * native
    column = torch.zeros(inner, dtype=torch.complex128)
    column[:size] = kernel.detach().to(torch.complex128)
    if inner > size:  # the corner reads the kernel at i - j from 1 - n to n - 1
        column[inner - size + 1 :] = kernel[1:].detach().to(torch.complex128)
    patterns = kaleidoscope_patterns(inner, 1)
    if inner == 1:
        factors = [column.reshape(1, 1, 1, 1)]
    else:
        chain, order = fourier(inner)
        rising = [chain.tensors[f"factor{i}"] for i in range(len(chain.tensors))]
        spectrum = torch.fft.fft(column)[order] / inner
        # F = B R, so the convolution is conj(B) diag(spectrum in the order of R) B^T.
        factors = [factor.transpose(1, 2) for factor in rising[:0:-1]]
        centre = rising[0].conj() * spectrum.reshape(inner // 2, 1, 2, 1)
        factors.append(torch.einsum("abcd,aced->abed", centre, rising[0].transpose(1, 2)))
        factors += [factor.conj() for factor in rising[1:]]
    tensors = {f"factor{i}": factor.resolve_conj().contiguous() for i, factor in enumerate(factors)}
    assert [tuple(t.shape) for t in tensors.values()] == list(patterns)
    structure = Kaleidoscope(1, expansion)
    if kernel.is_complex():
        return StructuredMatrix(structure, (size, size), {n: t.to(kernel.dtype) for n, t in tensors.items()})
    real = {name: torch.view_as_real(tensor).to(kernel.dtype) for name, tensor in tensors.items()}
    return StructuredMatrix(RealPart(structure), (size, size), real)


def _check_numbers(what: str, given: Tensor) -> None:
    if not (given.is_floating_point() or given.is_complex()):
        raise DataError(f"The {what} has the dtype {given.dtype}; its factors are no integers. Give a floating dtype.")
    bad = int((~torch.isfinite(given)).sum())
    if bad:
        raise DataError(f"The {what} has {bad} entries that are NaN or infinite. Give finite ones.")
