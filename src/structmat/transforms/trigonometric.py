"""Fourier, cosine, sine and Hartley transforms of every size, as butterflies between permutations.

All are one Fourier transform with a factor before and one after it, which its first and its last stage absorb:
``y[out[k]] = Re(after[k] * sum over j of F[k, j] before[j] x[into[j]])``. Values are those of SciPy, for all types and
both normalisations.
Source: Makhoul 1980 for types II and III; Wang 1984 for type IV; Dao et al. (ICML 2019), appendix, for butterflies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.errors import ShapeError
from structmat.matrix import StructuredMatrix
from structmat.sizes import smallest_chain, smooth_size
from structmat.structures.permuted_butterfly import PermutedButterfly
from structmat.structures.real_part import RealPart
from structmat.transforms.fast_fourier import fourier, prime_factors, roots


def dft(
    size: int, *, inverse: bool = False, orthonormal: bool = False, dtype: torch.dtype = torch.complex128
) -> StructuredMatrix:
    """The discrete Fourier transform, ``exp(-2 pi i j k / n)``, of any size, as ``scipy.fft.fft``.

    One factor for each prime factor of the size: ``size * (sum of the prime factors)`` complex products.

    Args:
        size: at least 1.
        inverse: ``exp(2 pi i j k / n) / n``.
        orthonormal: divided by ``sqrt(n)`` in both directions.
        dtype: complex.

    Raises:
        ShapeError: the size is below 1, or ``dtype`` is real.
    """
    if not dtype.is_complex:
        raise ShapeError(f"A Fourier transform is complex; got {dtype}. Use hartley(size) for a real one.")
    scale = 1.0 if not inverse else 1.0 / size
    scale = size**-0.5 if orthonormal else scale
    after = torch.full((max(1, size),), scale, dtype=torch.complex128)
    structure, tensors = _fourier_between(size, torch.ones(max(1, size), dtype=torch.complex128), after)
    made = {name: t.conj().resolve_conj() if inverse and t.is_complex() else t for name, t in tensors.items()}
    made = {name: t.to(dtype) if t.is_complex() else t for name, t in made.items()}
    return StructuredMatrix(structure, (size, size), made)


def hartley(size: int, *, dtype: torch.dtype = torch.float64) -> StructuredMatrix:
    """The Hartley transform ``cos(2 pi j k / n) + sin(2 pi j k / n)`` of any size: the real part of ``(1 + i) F``.

    Source: Bracewell 1983.

    Raises:
        ShapeError: the size is below 1, or ``dtype`` is not floating.
    """
    ones = torch.ones(max(1, size), dtype=torch.complex128)
    return _real(size, size, ones, (1 + 1j) * ones, dtype)


def dct(size: int, kind: int = 2, *, orthonormal: bool = False, dtype: torch.dtype = torch.float64) -> StructuredMatrix:
    """The cosine transform of a type from 1 to 4 and any size, as ``scipy.fft.dct``.

    Args:
        size: at least 1; at least 2 for type 1, which is a Fourier transform of size ``2 * (size - 1)``, cropped.
        kind: 1, 2, 3 or 4.
        orthonormal: SciPy's ``norm="ortho"``.
        dtype: real.

    Raises:
        ShapeError: there is no such type, or none of this size, or ``dtype`` is not floating.
    """
    _check(size, kind, 2 if kind == 1 else 1, "cosine")
    n = size
    folded, t = _folded(n)
    sign = torch.where(t < (n + 1) // 2, 1.0, -1.0).to(torch.complex128)
    ones = torch.ones(n, dtype=torch.complex128)
    if kind == 1:
        big = 2 * (n - 1)
        before, after = torch.zeros(big, dtype=torch.complex128), torch.ones(big, dtype=torch.complex128)
        before[:n] = 2.0
        before[0], before[n - 1] = 1.0, 1.0
        if orthonormal:
            before[0] = before[n - 1] = 2.0**0.5
            after *= (0.5 / (n - 1)) ** 0.5
            after[0] /= 2.0**0.5
            after[n - 1] /= 2.0**0.5
        return _real(n, big, before, after, dtype)
    if kind == 2:
        after = 2 * roots(t, 4 * n, torch.complex128)
        if orthonormal:
            after = after * (0.5 / n) ** 0.5
            after[0] /= 2.0**0.5
        return _real(n, n, ones, after, dtype, into=folded)
    if kind == 3:
        before = 2 * roots(t, 4 * n, torch.complex128)
        before[0] = 1.0
        if orthonormal:
            before = before * (0.5 / n) ** 0.5
            before[0] *= 2.0**0.5
        return _real(n, n, before, ones, dtype, out=torch.argsort(folded))
    after = 2 * roots(2 * t + 1, 8 * n, torch.complex128)
    before = sign * roots(t, 2 * n, torch.complex128)
    if orthonormal:
        after = after * (0.5 / n) ** 0.5
    return _real(n, n, before, after, dtype, into=folded)


def dst(size: int, kind: int = 2, *, orthonormal: bool = False, dtype: torch.dtype = torch.float64) -> StructuredMatrix:
    """The sine transform of a type from 1 to 4 and any size, as ``scipy.fft.dst``.

    Args:
        size: at least 1; type 1 is a Fourier transform of size ``2 * (size + 1)``, cropped.
        kind: 1, 2, 3 or 4.
        orthonormal: SciPy's ``norm="ortho"``.
        dtype: real.

    Raises:
        ShapeError: there is no such type, or the size is below 1, or ``dtype`` is not floating.
    """
    _check(size, kind, 1, "sine")
    n = size
    folded, t = _folded(n)
    sign = torch.where(t < (n + 1) // 2, 1.0, -1.0).to(torch.complex128)
    scale = (0.5 / n) ** 0.5 if orthonormal else 1.0
    if kind == 1:
        big = 2 * (n + 1)
        place = torch.arange(big)
        before = roots(place, big, torch.complex128)
        # exp(-2 pi i (k + 1)(j + 1) / N) is F[k, j] with the roots of k + 1 and of j before and after.
        after = 2j * roots(place + 1, big, torch.complex128)
        if orthonormal:
            after = after * (0.5 / (n + 1)) ** 0.5
        return _real(n, big, before, after, dtype)
    if kind == 2:
        after = 2j * roots(t + 1, 4 * n, torch.complex128) * scale
        if orthonormal:
            after[n - 1] /= 2.0**0.5
        return _real(n, n, sign * roots(t, n, torch.complex128), after, dtype, into=folded)
    if kind == 3:
        before = 2 * roots(t + 1, 4 * n, torch.complex128) * scale
        before[n - 1] /= 2.0**0.5 if orthonormal else 2.0
        return _real(n, n, before, 1j * sign * roots(t, n, torch.complex128), dtype, out=torch.argsort(folded))
    # Type 4: the cosine transform of the inputs backwards, every second output negative.
    after = 2 * roots(2 * t + 1, 8 * n, torch.complex128) * torch.where(t % 2 == 0, 1.0, -1.0) * scale
    before = sign * roots(t, 2 * n, torch.complex128)
    return _real(n, n, before, after, dtype, into=n - 1 - folded)


def _check(size: int, kind: int, least: int, name: str) -> None:
    if kind not in (1, 2, 3, 4):
        raise ShapeError(f"There are {name} transforms of types 1 to 4; got {kind}.")
    if size < least:
        raise ShapeError(f"A {name} transform of type {kind} has a size of at least {least}; got {size}.")


def _folded(size: int) -> tuple[Tensor, Tensor]:
    """The evens ascending, then the odds descending; and 0, 1, 2, ..."""
    t = torch.arange(size)
    return torch.cat([t[::2], t[1::2].flip(0)]), t


def _real(
    size: int,
    transform: int,
    before: Tensor,
    after: Tensor,
    dtype: torch.dtype,
    *,
    into: Tensor | None = None,
    out: Tensor | None = None,
) -> StructuredMatrix:
    """The upper left corner of the real part of a Fourier transform between factors and permutations."""
    if not dtype.is_floating_point:
        raise ShapeError(f"This transform is real; got {dtype}. Use a floating dtype, or dft(size) for a complex one.")
    structure, tensors = _fourier_between(transform, before, after, into=into, out=out)
    if transform != size and structure.patterns is None:
        structure = PermutedButterfly(smallest_chain((transform, transform)))
    made = {name: torch.view_as_real(t).to(dtype) if t.is_complex() else t for name, t in tensors.items()}
    return StructuredMatrix(RealPart(structure), (size, size), made)


def _fourier_between(
    size: int, before: Tensor, after: Tensor, *, into: Tensor | None = None, out: Tensor | None = None
) -> tuple[PermutedButterfly, dict[str, Tensor]]:
    """``y[k] = z[out[k]]``, ``z[k] = after[k] * sum of F[k, j] before[j] x[into[j]]``."""
    if size < 1:
        raise ShapeError(f"A transform has a size of at least 1; got {size}.")
    natural = torch.arange(size)
    if size == 1:
        patterns: tuple[tuple[int, int, int, int], ...] = ((1, 1, 1, 1),)
        factors, order = [torch.ones(1, 1, 1, 1, dtype=torch.complex128)], natural
    else:
        chain, order = fourier(size, radices=prime_factors(size))
        factors = [chain.tensors[f"factor{i}"].clone() for i in range(len(chain.tensors))]
        patterns = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in (f.shape for f in factors))
    first, last = patterns[0], patterns[-1]
    factors[0] = factors[0] * before[order].reshape(first[0], 1, first[2], first[3])
    factors[-1] = factors[-1] * after.reshape(last[0], last[1], 1, last[3])
    tensors = {f"factor{i}": factor for i, factor in enumerate(factors)}
    tensors["rows"] = natural if out is None else out
    tensors["columns"] = order if into is None else into[order]
    usual = smooth_size(size) == size and smallest_chain((size, size)) == patterns
    return PermutedButterfly(None if usual else patterns), tensors
