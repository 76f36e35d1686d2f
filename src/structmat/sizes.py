"""Integer factorizations: how a size splits into factors, and to which size it is padded where it doesn't."""

from __future__ import annotations

import math
from functools import cache, lru_cache

_EVEN_RATIO = 4
"""Factors count as even where the largest is at most this many times the smallest."""


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least ``size``."""
    return -(-size // multiple) * multiple


def is_power_of_two(number: int) -> bool:
    """Whether it is 1, 2, 4, ..."""
    return number > 0 and number & (number - 1) == 0


def power_of_two(number: int) -> int:
    """The least power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """All divisors in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


@lru_cache(maxsize=4096)
def even_factors(size: int, count: int) -> tuple[int, ...]:
    """``count`` factors in ascending order, as even as possible, whose product is ``size`` or slightly above.

    The product is the smallest one, from ``size`` on, that splits into factors of which the largest is at most 4 times
    the smallest: primes are padded, ``even_factors(257, 2) == (13, 20)``, while ``even_factors(688, 2) == (16, 43)``.
    """
    padded = size
    while True:
        best = min(_splits(padded, count, 1), key=lambda factors: factors[-1] / factors[0])
        if best[-1] <= _EVEN_RATIO * best[0]:
            return best
        padded += 1


def _splits(number: int, count: int, smallest: int) -> list[tuple[int, ...]]:
    """Every way to write a number as ascending factors of at least ``smallest``; with 1 there always is one."""
    if count == 1:
        return [(number,)] if number >= smallest else []
    return [
        (first, *rest)
        for first in divisors(number)
        if first >= smallest and first**count <= number
        for rest in _splits(number // first, count - 1, first)
    ]


@lru_cache(maxsize=4096)
def smooth_size(size: int) -> int:
    """The smallest number of the form 2^i 3^j 5^k that is at least ``size``: at most 12.5 % more from 8 on.

    Fourier transforms are fast there.
    """
    best = power_of_two(size)
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three * power_of_two(-(-size // three)))
            three *= 3
        five *= 5
    return best


Pattern = tuple[int, int, int, int]
"""``(a, b, c, d)`` of a contraction."""


@lru_cache(maxsize=1024)
def smallest_chain(shape: tuple[int, int], most: int | None = None, rank: int = 1) -> tuple[Pattern, ...]:
    """The chain of contractions with the fewest parameters whose product is (out, in), in order of application.

    ``out`` and ``in`` are written as ordered products of divisors ``b_i`` and ``c_i``, all at least 2; factor ``i``,
    counted from the output, has the pattern ``(c_0 .. c_(i-1), b_i, c_i, b_(i+1) .. b_last)``, and the sizes between
    the factors lie, in order, between ``in`` and ``out``. Among chains of the same size the longest is taken: a square
    power of two gives ``log2 n`` butterfly factors, in order of increasing stride.

    Args:
        shape: (out, in), both factored exactly.
        most: factors at most; None for no limit.
        rank: of every interface: the inner axes b and c are ``rank`` times wider. The choice is made for rank 1.

    Source: dynamic programming over divisors, "smallest monotone chain" of the deformable butterfly (Lin et al.,
    NeurIPS 2021; Zheng et al., "Butterfly factorization with error guarantees", SIMAX 2025).
    """
    out_features, in_features = shape
    low, high = min(shape), max(shape)
    limit = most if most is not None else max(1, high.bit_length())
    falling = out_features >= in_features  # from the output to the input

    @cache
    def best(prefix: int, suffix: int, left: int) -> tuple[int, int, tuple[tuple[int, int], ...]] | None:
        """Fewest (parameters, minus the number of factors, radices) still to come; ``prefix`` is the product of the
        ``c`` taken and ``suffix`` that of the ``b`` that are left."""
        if left == 0:
            return None
        rest = in_features // prefix
        found: tuple[int, int, tuple[tuple[int, int], ...]] | None = None
        if (rest > 1 and suffix > 1) or (prefix == 1 and suffix == out_features):
            found = (in_features * suffix, -1, ((suffix, rest),))
        for c in divisors(rest)[1:-1]:
            for b in divisors(suffix)[1:-1]:
                size = prefix * c * (suffix // b)
                if not low <= size <= high or (size > prefix * suffix if falling else size < prefix * suffix):
                    continue
                after = best(prefix * c, suffix // b, left - 1)
                if after is None:
                    continue
                candidate = (prefix * c * suffix + after[0], after[1] - 1, ((b, c), *after[2]))
                if found is None or candidate[:2] < found[:2]:
                    found = candidate
        return found

    chosen = best(1, out_features, limit)
    assert chosen is not None, f"no chain for {shape}"
    radices = chosen[2]
    patterns = []
    for i, (b, c) in enumerate(radices):
        before = math.prod(radix[1] for radix in radices[:i])
        after = math.prod(radix[0] for radix in radices[i + 1 :])
        inner_left, inner_right = rank if i > 0 else 1, rank if i < len(radices) - 1 else 1
        patterns.append((before, inner_left * b, inner_right * c, after))
    return tuple(reversed(patterns))
