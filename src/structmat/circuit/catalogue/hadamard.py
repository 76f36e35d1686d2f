"""The Hadamard transform and orthogonal wavelets, of power-of-two sizes."""

from __future__ import annotations

import math

import numpy as np

from structmat.circuit.arrays import Ints
from structmat.circuit.builder import Builder
from structmat.circuit.catalogue.fourier import log2, require_power_of_two, scaled
from structmat.circuit.catalogue.published import Published
from structmat.circuit.circuit import Circuit
from structmat.errors import CircuitError


def hadamard(size: int) -> Circuit:
    """The Sylvester-Hadamard matrix (entries 1 and -1) by ``n log2 n`` additions in ``log2 n`` levels.

    Raises:
        CircuitError: the size is no power of two.
    """
    require_power_of_two(size, "A Hadamard transform")
    builder = Builder(size)
    x = builder.inputs
    for level in range(log2(size)):
        pairs = x.reshape(-1, 2, 1 << level)
        both = np.stack([pairs[:, 0], pairs[:, 1]], axis=-1)
        x = np.stack([builder.sums(both), builder.sums(both, [1, -1])], axis=1).ravel()
    return builder.build(x)


def published_hadamard(size: int) -> Published:
    """The usual algorithm; with free multiplications by 2 and shared sums, Alman and Rao (2023) need fewer."""
    return Published(size * log2(size), "Good 1958; Fino and Algazi 1976")


def haar(size: int, *, levels: int | None = None) -> Circuit:
    """The orthonormal Haar wavelet transform: the means of the coarsest level first, then details from coarse to fine.

    Sums and differences are not scaled on the way: ``2 (n - 1)`` additions, and one multiplication for each output
    whose factor ``2^(-level / 2)`` is not 1.

    Args:
        size: a power of two.
        levels: how often the means are split again, by default until one is left.

    Raises:
        CircuitError: the size is no power of two, or has fewer levels.
    """
    depth = _levels(size, levels, 1)
    builder = Builder(size)
    means, details = builder.inputs, []
    for level in range(1, depth + 1):
        pairs = means.reshape(-1, 2)
        difference = builder.sums(pairs, [1, -1])
        details.append(scaled(builder, difference, np.array(_half_power(level))))
        means = builder.sums(pairs)
    means = scaled(builder, means, np.array(_half_power(depth)))
    return builder.build(np.concatenate([means, *reversed(details)]))


def _half_power(level: int) -> float:
    """``2^(-level / 2)``, exact where it is a power of two."""
    return 2.0 ** -(level // 2) * (math.sqrt(0.5) if level % 2 else 1.0)


def published_haar(size: int) -> Published:
    """Additions ``2 (n - 1)`` of the cascade and a multiplication for each output that is scaled."""
    return Published(2 * (size - 1) + size * (size > 1), "Mallat 1989, pyramid algorithm")


def daubechies(size: int, moments: int = 2, *, levels: int | None = None) -> Circuit:
    """The periodic orthonormal wavelet transform of Daubechies: coarse means first, then details from coarse to fine.

    Each level is a filter bank of ``2 * moments`` taps: ``y[k] = sum over t of h[t] x[2 k + t]`` for means and ``g[t] =
    (-1)^t h[2 moments - 1 - t]`` for details. Source: Daubechies 1988; Mallat 1989.

    Args:
        size: a power of two.
        moments: vanishing moments, 1 to 10; 1 is the Haar wavelet.
        levels: by default as many as leave at least as many values as there are taps.

    Raises:
        CircuitError: the size is no power of two, or has fewer levels, or there are no such moments.
    """
    if not 1 <= moments <= 10:
        raise CircuitError(f"Daubechies wavelets have 1 to 10 vanishing moments here; got {moments}.")
    low = scaling_filter(moments)
    taps = len(low)
    depth = _levels(size, levels, taps)
    high = low[::-1] * (-1.0) ** np.arange(taps)
    builder = Builder(size)
    means, details = builder.inputs, []
    for _ in range(depth):
        read = (2 * np.arange(len(means) // 2)[:, None] + np.arange(taps)) % len(means)
        details.append(builder.sums(means[read], high))
        means = builder.sums(means[read], low)
    return builder.build(np.concatenate([means, *reversed(details)]))


def published_daubechies(size: int) -> Published:
    """For 2 vanishing moments: the filter bank takes 14 operations for each pair of values, lifting steps 9."""
    pairs = sum(size >> level for level in range(1, _levels(size, None, 4) + 1))
    return Published(14 * pairs, "Mallat 1989, filter bank", False, 9 * pairs, "Daubechies and Sweldens 1998, lifting")


def scaling_filter(moments: int) -> np.ndarray:
    """The filter of least phase, ``2 * moments`` taps of sum ``sqrt 2``, by spectral factorisation."""
    # P(y) = sum over k < moments of binomial(moments - 1 + k, k) y^k, with y = (2 - z - 1 / z) / 4.
    polynomial = [math.comb(moments - 1 + k, k) for k in range(moments)]
    factor = np.ones(1)
    for y in np.roots(polynomial[::-1]):
        # z + 1 / z = 2 - 4 y: of the two roots the one inside the unit circle.
        pair = np.roots([1, 4 * y - 2, 1])
        factor = np.convolve(factor, [1, -pair[np.argmin(np.abs(pair))]])
    for _ in range(moments):
        factor = np.convolve(factor, [1, 1])
    result = np.real(factor)
    return np.asarray(result * (math.sqrt(2) / result.sum()))


def _levels(size: int, levels: int | None, taps: int) -> int:
    require_power_of_two(size, "A wavelet transform")
    most = log2(size)
    if levels is None:
        # Each level halves the means; the filter must not wrap around more than once.
        return max(0, min(most, log2(size) - (taps - 1).bit_length() + 1)) if taps > 2 else most
    if not 0 <= levels <= most:
        raise CircuitError(f"A wavelet transform of size {size} has 0 to {most} levels; got {levels}.")
    return levels


def outputs_of_level(size: int, level: int) -> Ints:
    """The outputs that hold the details of a level, the finest being level 1."""
    return np.arange(size >> level, size >> (level - 1))
