"""Products whose factors repeat a cycle of kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

Kind = TypeVar("Kind")
Factor = TypeVar("Factor")


def in_cycle(
    factors: Iterable[Factor], kind: Callable[[Factor], Kind], cycle: Sequence[Kind], rest: Mapping[Kind, Factor]
) -> tuple[Factor, ...]:
    """The factors in their order, with the fewest others between them that make their kinds repeat a cycle.

    Args:
        factors: each of a kind in the cycle.
        kind: of a factor.
        cycle: of kinds; it is repeated a whole number of times.
        rest: what fills the gaps, by kind.
    """
    filled: list[Factor] = []
    for factor in factors:
        while cycle[len(filled) % len(cycle)] != kind(factor):
            filled.append(rest[cycle[len(filled) % len(cycle)]])
        filled.append(factor)
    while len(filled) % len(cycle):
        filled.append(rest[cycle[len(filled) % len(cycle)]])
    return tuple(filled)
