"""A market of small members that the tests draw from: every family there is, and some cases of special interest.

A new family appears by itself: its members are what it proposes for a shape. Nothing is listed here but what no family
would propose.
"""

from __future__ import annotations

import structmat as sm
from structmat.errors import ShapeError
from structmat.structure import Shape, Structure, count_stored, resolve

SMALL_SHAPES: tuple[Shape, ...] = (
    (1, 1), (1, 7), (5, 1), (2, 3), (8, 8), (12, 10), (13, 17), (16, 16), (33, 64), (100, 30),
)  # fmt: skip
"""Scalars, one row, one column, squares, primes, powers of two, tall and wide."""

EXTREMES: tuple[Structure, ...] = (
    sm.LowRank(1),
    sm.LowRank(0.5),
    sm.BlockDiagonal(1),
    sm.BlockDiagonal(5),
    sm.PivotedLowRank(8),
)
"""Sizes that no family proposes: full, smallest and fractional ones, blocks that divide nothing."""


def proposals(family: type[Structure], shape: Shape) -> list[Structure]:
    """The smallest and the largest that a family proposes for a shape, up to twice the size of a dense matrix."""
    dense = shape[0] * shape[1]
    found = {
        candidate: count_stored(candidate, shape)
        for budget in (dense // 8, dense // 4, dense // 2, dense, 2 * dense + 4 * sum(shape))
        for candidate in family.configurations(shape, budget)
    }
    ordered = sorted(found, key=lambda candidate: found[candidate])
    return list(dict.fromkeys([*ordered[:1], *ordered[-1:]]))


def members(shape: Shape) -> list[Structure]:
    """Every family's proposals and the extremes that the shape admits, without repetition."""
    found = [candidate for family in sm.families().values() for candidate in proposals(family, shape)]
    for structure in EXTREMES:
        try:
            resolve(structure, shape)
        except ShapeError:
            continue
        found.append(structure)
    return list(dict.fromkeys(found))


FEW_SHAPES: tuple[Shape, ...] = ((1, 1), (4, 4), (5, 3))
"""Where families that are not tried by default are checked each time: chains of many stages take long. The slow tests
check them at more."""


def cases(shapes: tuple[Shape, ...] = SMALL_SHAPES) -> list[tuple[Structure, Shape]]:
    """All members of the default families, and those of the others at a few shapes."""
    return [
        (structure, shape)
        for shape in dict.fromkeys((*shapes, *FEW_SHAPES))
        for structure in members(shape)
        if shape in (shapes if type(structure).by_default else FEW_SHAPES)
    ]


OTHER_SHAPES: tuple[Shape, ...] = ((1, 7), (5, 1), (8, 8), (13, 17), (33, 64))


def other_cases() -> list[tuple[Structure, Shape]]:
    """Members of the families that are not tried by default where :func:`cases` leaves them out."""
    return [(s, shape) for shape in OTHER_SHAPES for s in members(shape) if not type(s).by_default]


def one_a_family(*shapes: Shape, others: bool = True) -> list[tuple[Structure, Shape]]:
    """The smallest proposal of each family at each shape: for checks that take a second or more.

    Families that are not tried by default are checked at two small shapes at most, or not if ``others`` is False.
    """
    found = [
        (candidate, shape)
        for shape in shapes
        for family in sm.families().values()
        if family.by_default
        for candidate in proposals(family, shape)[:1]
    ]
    if not others:
        return found
    small = ((4, 4), (5, 3)) if len(shapes) > 1 else ((4, 4),)
    return found + [
        (candidate, shape)
        for shape in small
        for family in sm.families().values()
        if not family.by_default
        for candidate in proposals(family, shape)[:1]
    ]
