"""Discrete Fourier transforms ``y[k] = sum over j of x[j] * exp(-2 pi i j k / n)``, as complex circuits.

With ``prime`` the same circuits have a root of unity modulo a prime for ``exp(-2 pi i / n)``: number-theoretic
transforms, exact in :class:`~structmat.circuit.fields.PrimeField`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from structmat.circuit.arrays import Ints, Numbers
from structmat.circuit.builder import Builder
from structmat.circuit.catalogue.published import Published
from structmat.circuit.circuit import Circuit
from structmat.circuit.fields import is_prime
from structmat.errors import CircuitError
from structmat.sizes import is_power_of_two


def fourier(
    size: int,
    *,
    radices: Sequence[int] | None = None,
    folded: bool = True,
    inverse: bool = False,
    prime: int | None = None,
) -> Circuit:
    """The transform of any size by mixed radices (Cooley and Tukey 1965); by default of the prime factors.

    Args:
        size: at least 1.
        radices: in order of application, their product is ``size``.
        folded: twiddle factors are weights of the sums that follow: ``size`` sums of ``r`` terms for each radix ``r``,
            so ``size * log2(size)`` gates for a power of two. Otherwise they are gates of their own, which saves
            multiplications: each is used ``r`` times.
        inverse: the inverse transform, with its factor ``1 / size`` in the last sums.
        prime: a root of unity modulo this prime takes the place of ``exp(-2 pi i / size)``.

    Raises:
        CircuitError: the radices do not multiply to the size, or the prime has no root of this order.
    """
    factors = tuple(prime_factors(operator.index(size)) if radices is None else radices)
    if size < 1 or math.prod(factors) != size or min(factors, default=2) < 2:
        raise CircuitError(
            f"Radices of a Fourier transform of size {size} multiply to it and are at least 2; got {factors}."
        )
    root = Root(size, inverse=inverse, prime=prime)
    builder = Builder(size)
    x = builder.inputs[digit_reversal(size, factors)]
    scale = root.inverse_of(size) if inverse else 1
    span = 1
    for level, radix in enumerate(factors):
        # Blocks of radix * span entries: y[b, d] = sum over c of w^(c (b span + d)) x[c, d], w of order radix * span.
        blocks = x.reshape(-1, radix, span).swapaxes(1, 2)
        column, row, place = np.arange(radix), np.arange(radix)[:, None, None], np.arange(span)[:, None]
        step = size // (radix * span)
        factor = scale if level == len(factors) - 1 else 1
        if folded:
            weights = root.powers(step * column * (row * span + place), factor)
        else:
            twiddles = root.powers(step * column * place)
            blocks = scaled(builder, blocks, np.broadcast_to(twiddles, blocks.shape))
            weights = np.broadcast_to(root.powers(step * column * row * span, factor), (radix, span, radix))
        operands = np.broadcast_to(blocks[:, None], (len(blocks), radix, span, radix))
        x = builder.sums(operands, np.broadcast_to(weights, operands.shape)).ravel()
        span *= radix
    return builder.build(x)


def split_radix(size: int) -> Circuit:
    """The transform of a power of two by the split-radix algorithm, twiddle factors as gates of their own.

    It splits into one transform of half and two of a quarter of the size: ``4 n log2 n - 6 n + 8`` real operations for
    ``n >= 2``, the fewest known from 1968 until 2004. Source: Yavne 1968; Duhamel and Hollmann 1984.

    Raises:
        CircuitError: the size is no power of two.
    """
    require_power_of_two(size, "A split-radix transform")
    builder = Builder(size)
    return builder.build(_split(builder, builder.inputs[None])[0])


def _split(builder: Builder, x: Ints) -> Ints:
    """The transforms of the rows of x (copies, n)."""
    n = x.shape[1]
    if n == 1:
        return x
    if n == 2:
        return np.stack([builder.sums(x), builder.sums(x, [1, -1])], axis=1)
    even = _split(builder, x[:, 0::2])
    odd = _split(builder, np.concatenate([x[:, 1::4], x[:, 3::4]])).reshape(2, len(x), n // 4)
    root = Root(n)
    k = np.arange(n // 4)
    twiddles = np.stack([root.powers(k), root.powers(3 * k)])[:, None]
    first, third = scaled(builder, odd, np.broadcast_to(twiddles, odd.shape))
    both = np.stack([first, third], axis=-1)
    plus, minus = builder.sums(both), builder.sums(both, [1, -1])
    low, high = even[:, : n // 4], even[:, n // 4 :]
    parts = [
        builder.sums(np.stack([half, odd_part], axis=-1), weights)
        for half, odd_part, weights in (
            (low, plus, [1, 1]), (high, minus, [1, -1j]), (low, plus, [1, -1]), (high, minus, [1, 1j])
        )
    ]  # fmt: skip
    return np.concatenate(parts, axis=1)


def published_fourier(size: int) -> Published:
    """The split-radix count, and that of Johnson and Frigo, about 6 % fewer for large sizes (``n >= 2``)."""
    level = log2(size)
    sign = (-1) ** level
    record = Fraction(34 * size * level, 9) - Fraction(124 * size, 27) - 2 * level - Fraction(2 * sign * level, 9)
    record += Fraction(16 * sign, 27) + 8
    operations = 4 * size * level - 6 * size + 8
    return Published(operations, "Yavne 1968, split radix", True, int(record), "Johnson and Frigo 2007")


def published_convolution(size: int, transforms: int) -> Published:
    """Split-radix transforms and a complex product for each frequency."""
    one = published_fourier(size)
    record = None if one.record is None else transforms * one.record + 6 * size
    source = f"{transforms} transforms, {one.source}"
    return Published(transforms * one.operations + 6 * size, source, True, record, one.record_source)


def published_mixed_radix(size: int) -> Published:
    """``n`` times the sum of the radices, each a complex multiplication and addition: 8 real operations."""
    return Published(8 * size * sum(prime_factors(size)), "Cooley and Tukey 1965", real=True)


class Root:
    """Powers of ``exp(-2 pi i / order)`` or of a root of unity modulo a prime, exact on the axes."""

    def __init__(self, order: int, *, inverse: bool = False, prime: int | None = None) -> None:
        self.order = order
        self.sign = -1 if inverse else 1
        self.prime = prime
        if prime is not None:
            if not is_prime(prime) or (prime - 1) % order:
                raise CircuitError(
                    f"There is no root of unity of order {order} modulo {prime}: that takes a prime of the form "
                    f"{order} k + 1."
                )
            generator = root_of_unity(order, prime)
            table = [1]
            for _ in range(order - 1):
                table.append(table[-1] * generator % prime)
            self.table: Numbers = np.array(table, dtype=np.int64)
            return
        self.table = np.exp(-2j * np.pi * np.arange(order) / order)
        for eighth, value in enumerate((1, -1j, -1, 1j)):
            if order * eighth % 4 == 0:
                self.table[order * eighth // 4] = value

    def powers(self, exponent: Ints, factor: object = 1) -> Numbers:
        """The root to these powers, times a factor."""
        values = self.table[(self.sign * np.asarray(exponent)) % self.order] * factor
        return np.asarray(values if self.prime is None else values % self.prime)

    def inverse_of(self, number: int) -> object:
        """``1 / number`` in the same arithmetic."""
        return 1 / number if self.prime is None else pow(number, -1, self.prime)


def root_of_unity(order: int, prime: int) -> int:
    """An element of exactly this order modulo a prime; ``order`` divides ``prime - 1``."""
    for base in range(2, prime):
        root = pow(base, (prime - 1) // order, prime)
        if all(pow(root, order // factor, prime) != 1 for factor in set(prime_factors(order))):
            return root
    return 1


def scaled(builder: Builder, nodes: Ints, weights: Numbers) -> Ints:
    """Nodes times weights, in their shape; no gate where the weight is 1."""
    result = np.array(nodes)
    gate = np.asarray(np.broadcast_to(weights, nodes.shape) != 1, dtype=bool)
    result[gate] = builder.sums(nodes[gate][:, None], np.broadcast_to(weights, nodes.shape)[gate][:, None])
    return result


def digit_reversal(size: int, radices: Sequence[int]) -> Ints:
    """The order of inputs in which a decimation in time with these radices, first applied first, reads them."""
    # Digits of the position, first radix fastest, are digits of the index, first radix most significant.
    position = np.arange(size)
    index, weight = np.zeros(size, dtype=np.int64), size
    for radix in radices:
        weight //= radix
        index += position % radix * weight
        position //= radix
    return index


def prime_factors(number: int) -> list[int]:
    """Ascending, with repetitions."""
    factors, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return [*factors, number] if number > 1 else factors


def log2(size: int) -> int:
    """Of a power of two."""
    return size.bit_length() - 1


def require_power_of_two(size: int, what: str, least: int = 1) -> None:
    """Refuse other sizes.

    Raises:
        CircuitError: the size is no power of two, or too small.
    """
    if size < least or not is_power_of_two(size):
        raise CircuitError(f"{what} has a size of {least}, {2 * least}, {4 * least}, ...; got {size}. Pad with zeros.")
