"""Linear circuits with fixed constants: evaluation and interpolation of polynomials at many points, Toeplitz matrices.

Both go up a tree of the fixed polynomials ``(x - a_0), (x - a_0)(x - a_1), ...``, and evaluation is the transpose of a
circuit that does so. Points may be integers or fractions (exact in :class:`~structmat.circuit.fields.Rationals`), or
integers modulo a prime (exact in :class:`~structmat.circuit.fields.PrimeField`), or floats, which lose all digits
beyond some thirty points: powers are a bad basis.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Ints, Numbers, numbers
from structmat.circuit.builder import Builder
from structmat.circuit.catalogue.fourier import fourier, require_power_of_two
from structmat.circuit.catalogue.products import recombined
from structmat.circuit.catalogue.published import Published
from structmat.circuit.circuit import Circuit
from structmat.errors import CircuitError
from structmat.sizes import power_of_two

_DIRECT = 8
"""Products of this size and below are written out; Karatsuba's three halves cost more there."""


def evaluation(points: ArrayLike, *, prime: int | None = None) -> Circuit:
    """The values at ``n`` points of a polynomial of ``n`` coefficients, lowest first: the Vandermonde matrix.

    The transposed product ``c -> sum over i of c[i] a[i]^k`` is the power series of ``sum over i of c[i] / (1 - a[i]
    x)``: a numerator, built up a tree of sums of fractions, times the inverse of a fixed denominator. The circuit is
    the transpose of that one (transposition principle). Size ``O(n^1.59)`` with Karatsuba's products.

    Args:
        points: ``n`` numbers, a power of two of them, which may repeat.
        prime: calculate the constants modulo this prime.

    Source: Bostan, Lecerf, Schost, "Tellegen's principle into practice" (ISSAC 2003).

    Raises:
        CircuitError: the number of points is no power of two.
    """
    ring = _Ring(points, prime)
    a = ring.values
    require_power_of_two(len(a), "Evaluation at many points")
    builder = Builder(len(a))
    numerator, denominator = _fractions(builder, ring, builder.inputs)
    # Reversed coefficients turn (x - a) into (1 - a x).
    series = ring.series_inverse(denominator[::-1])
    product = _fixed_product(builder, numerator[None, ::-1], series[None])[0, : len(a)]
    return builder.build(product).simplify().transpose()


def interpolation(points: ArrayLike, *, prime: int | None = None) -> Circuit:
    """The ``n`` coefficients, lowest first, of the polynomial with given values at ``n`` different points.

    Lagrange's formula ``sum over i of y[i] / P'(a[i]) * P(x) / (x - a[i])``, its sum of fractions built up a tree.

    Args:
        points: ``n`` different numbers, a power of two of them.
        prime: calculate the constants modulo this prime.

    Raises:
        CircuitError: the number of points is no power of two, or two points are equal.
    """
    ring = _Ring(points, prime)
    a = ring.values
    require_power_of_two(len(a), "Interpolation at many points")
    slopes = ring.one * np.ones(len(a), dtype=a.dtype)
    for other in range(len(a)):
        differences = a - a[other]
        differences[other] = ring.one
        slopes = ring.reduced(slopes * differences)
    if np.any(slopes == 0):
        raise CircuitError("Interpolation needs different points; at least two of the given ones are equal.")
    builder = Builder(len(a))
    weights = np.array([ring.inverse(s) for s in slopes.tolist()], dtype=a.dtype)
    scaled = builder.sums(builder.inputs[:, None], weights[:, None])
    return builder.build(_fractions(builder, ring, scaled)[0]).simplify()


def published_evaluation(size: int) -> Published:
    """Horner's rule at each point: what a fast method must beat. Borodin and Moenck (1974) need O(n log^2 n)."""
    return Published(2 * size * (size - 1), "Horner's rule at every point")


def published_interpolation(size: int) -> Published:
    """Divided differences, then powers: what a fast method must beat. Borodin and Moenck (1974): O(n log^2 n)."""
    return Published(2 * size * (size - 1), "Bjorck and Pereyra 1970")


def toeplitz(
    column: ArrayLike,
    row: ArrayLike,
    method: Literal["fourier", "karatsuba"] = "fourier",
    *,
    folded: bool = True,
    prime: int | None = None,
) -> Circuit:
    """A Toeplitz matrix with this first column and first row, as a part of a polynomial product.

    Args:
        column: (outputs,) the first column.
        row: (inputs,) the first row; its first entry is not read, the column's is.
        method: ``fourier`` embeds the matrix in a circulant and takes two transforms, complex (or modulo ``prime``,
            which must have roots of unity of that order); ``karatsuba`` stays with the numbers given.
        folded: for ``fourier``: fewer gates, or fewer multiplications, as in
            :func:`~structmat.circuit.catalogue.fourier.fourier`.
        prime: for ``fourier``.

    Raises:
        CircuitError: column or row are empty, or there is no such method.
    """
    first, across = numbers(column).ravel(), numbers(row).ravel()
    m, n = len(first), len(across)
    if not m or not n:
        raise CircuitError(f"A Toeplitz matrix has rows and columns; got {m} and {n}.")
    # Entry (i, j) is t[n - 1 + i - j]: y[i] is coefficient n - 1 + i of the product of t and x.
    dtype = object if object in (first.dtype, across.dtype) else np.result_type(first, across)
    t = np.concatenate([across[:0:-1].astype(dtype), first.astype(dtype)])
    size = power_of_two(len(t))
    builder = Builder(n)
    if method == "karatsuba":
        zero = builder.sum([])
        x = np.concatenate([builder.inputs, np.full(size - n, zero)])
        t = np.concatenate([t, np.zeros(size - len(t), dtype=np.int64).astype(dtype)])
        return builder.build(_fixed_product(builder, x[None], t[None])[0, n - 1 : n - 1 + m]).simplify()
    if method != "fourier":
        raise CircuitError(f"There is no method {method!r}. There are: fourier, karatsuba.")
    # A circulant of this size holds the matrix: what wraps around falls on coefficients that are not read.
    forward, back = (fourier(size, folded=folded, inverse=inverse, prime=prime) for inverse in (False, True))
    x = np.concatenate([builder.inputs, np.full(size - n, builder.sum([]))])
    padded = np.concatenate([t, np.zeros(size - len(t), dtype=t.dtype)])
    if prime is None:
        spectrum = np.fft.fft(padded)
    else:
        from structmat.circuit.fields import PrimeField

        spectrum = forward.evaluate(padded % prime, PrimeField(prime))
    values = builder.sums(builder.apply(forward, x)[:, None], spectrum[:, None])
    return builder.build(builder.apply(back, values)[n - 1 : n - 1 + m]).simplify()


# ---------------------------------------------------------------------------------------------------------- the tree


class _Ring:
    """Arithmetic of the constants: fractions, floats, or integers modulo a prime."""

    def __init__(self, points: ArrayLike, prime: int | None) -> None:
        values = numbers(points).ravel()
        self.prime = prime
        if values.dtype.kind == "i" or prime is not None:
            values = values.astype(object)
        self.values: Numbers = self.reduced(values)
        self.one: Any = 1

    def reduced(self, value: Any) -> Any:
        return value if self.prime is None else value % self.prime

    def inverse(self, value: Any) -> Any:
        if self.prime is not None:
            return pow(int(value), -1, self.prime)
        return Fraction(1) / value if isinstance(value, int | Fraction) else 1 / value

    def product(self, first: Numbers, second: Numbers) -> Numbers:
        """Of two polynomials."""
        return np.asarray(self.reduced(np.convolve(first, second)))

    def series_inverse(self, polynomial: Numbers) -> Numbers:
        """The first coefficients, one fewer than those of ``polynomial``, of its inverse; it begins with 1."""
        count = len(polynomial) - 1
        result = polynomial[:1].copy()
        while len(result) < count:
            length = min(2 * len(result), count)
            # Newton: s (2 - p s).
            correction = -self.product(polynomial[:length], result)[:length]
            correction[0] += 2
            result = self.product(result, self.reduced(correction))[:length]
        return result


def _fractions(builder: Builder, ring: _Ring, numerators: Ints) -> tuple[Ints, Numbers]:
    """``sum over i of c[i] / (x - a[i])`` as numerator nodes and denominator numbers, lowest coefficients first."""
    tops = numerators[:, None]
    # Without their leading coefficient, which is 1.
    bottoms = -ring.values[:, None] if ring.prime is None else ring.reduced(-ring.values)[:, None]
    while len(tops) > 1:
        size = tops.shape[1]
        left, right = tops[0::2], tops[1::2]
        low, high = bottoms[0::2], bottoms[1::2]
        crossed = _fixed_product(builder, np.concatenate([left, right]), np.concatenate([high, low]))
        first, second = crossed[: len(left)], crossed[len(left) :]
        merged = np.empty((len(left), 2 * size), dtype=np.int64)
        merged[:, :size] = builder.sums(np.stack([first[:, :size], second[:, :size]], axis=-1))
        # The leading coefficients shift the other numerator by `size`.
        inner = [first[:, size:], second[:, size:], left[:, : size - 1], right[:, : size - 1]]
        merged[:, size:-1] = builder.sums(np.stack(inner, axis=-1))
        merged[:, -1] = builder.sums(np.stack([left[:, -1], right[:, -1]], axis=-1))
        tops = merged
        leading = np.ones((len(low), 1), dtype=low.dtype)
        full = [np.concatenate([b, leading], axis=1) for b in (low, high)]
        bottoms = np.stack([ring.product(a, b)[:-1] for a, b in zip(*full, strict=True)])
    return tops[0], np.append(bottoms[0], np.ones(1, dtype=bottoms.dtype))


def _fixed_product(builder: Builder, x: Ints, constants: Numbers) -> Ints:
    """Products of polynomials x (copies, n) of nodes with constant ones (copies, n): (copies, 2 n - 1) nodes."""
    copies, n = x.shape
    if n <= _DIRECT:
        place = np.arange(2 * n - 1)[:, None] - np.arange(n)
        inside = (place >= 0) & (place < n)
        weights = constants[:, np.where(inside, place, 0)][:, inside]
        operands = np.broadcast_to(x[:, None, :], (copies, 2 * n - 1, n))[:, inside]
        counts = np.tile(inside.sum(axis=1), copies)
        return builder.ragged_sums(counts, operands.ravel(), weights.ravel()).reshape(copies, 2 * n - 1)
    half = n // 2
    mixed = builder.sums(np.stack([x[:, :half], x[:, half:]], axis=-1))
    fixed = [constants[:, :half], constants[:, half:], constants[:, :half] + constants[:, half:]]
    products = _fixed_product(builder, np.concatenate([x[:, :half], x[:, half:], mixed]), np.concatenate(fixed))
    return recombined(builder, products.reshape(3, copies, n - 1))
