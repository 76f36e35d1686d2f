"""Integer factorizations: how a size splits into factors, and to which size it is padded where it doesn't."""

from __future__ import annotations

import math
from functools import lru_cache

_EVEN_RATIO = 4
"""Factors count as even where the largest is at most this many times the smallest."""


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least ``size``."""
    return -(-size // multiple) * multiple


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
    """Every way to write a number as ascending factors of at least ``smallest``; (1, .., 1, number) if none."""
    if count == 1:
        return [(number,)]
    found = [
        (first, *rest)
        for first in divisors(number)
        if first >= smallest and first**count <= number
        for rest in _splits(number // first, count - 1, first)
    ]
    return found or [(*(1 for _ in range(count - 1)), number)]


@lru_cache(maxsize=4096)
def smooth_size(size: int) -> int:
    """The smallest number of the form 2^i 3^j 5^k that is at least ``size``: at most 12.5 % more from 8 on."""
    best = 1 << (size - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            quotient = -(-size // three)
            best = min(best, three << (quotient - 1).bit_length())
            three *= 3
        five *= 5
    return best
