"""Layers of a circuit that are one butterfly factor as they stand, or after a permutation.

A layer is such a factor where its rows fall into groups that share at most two columns, and at most two rows are in a
group: fast transforms, prefix sums by a tree, wavelets, scalings and permutations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from structmat.circuit.arrays import Bools, Ints, Numbers
from structmat.circuit.kaleidoscope.stage import Stage


@dataclass(frozen=True, eq=False)
class Placed:
    """A layer as one butterfly factor.

    Attributes:
        order: the permutation ``y[i] = x[order[i]]`` that comes before the factor, or None for none.
        stage: the factor, or None where the layer only moves values.
        where: (rows,) the coordinate that each row of the layer is in afterwards.
    """

    order: Ints | None
    stage: Stage | None
    where: Ints


def placed(size: int, where: Ints, start: Ints, column: Ints, values: Numbers) -> Placed | None:
    """A layer as a butterfly factor of a size, or None where it is none.

    Args:
        size: a power of two, at least 2.
        where: (columns,) the coordinate of each value that the layer reads.
        start: (rows + 1,) the segments of each row's entries.
        column: (entries,) of the layer.
        values: (entries,) of the layer.
    """
    terms = np.diff(start)
    if np.any((terms < 1) | (terms > 2)):
        return None
    first, second = where[column[start[:-1]]], where[column[start[1:] - 1]]
    if np.any((first == second) & (terms == 2)):
        return None
    groups = _groups(size, first, second)
    if groups is None:
        return None
    group, members = groups
    live = np.zeros(size, dtype=np.bool_)
    live[where[column]] = True
    order = None
    stride = _common_stride(size, group, members, live)
    if stride is None:
        stride = size // 2
        order = _paired(size, group, members)
        if order is None:
            return None
        moved = np.empty(size, dtype=np.int64)
        moved[order] = np.arange(size)
        first, second = moved[first], moved[second]
    after = _rows_in_place(first, second, stride, size)
    if np.array_equal(after, first) and np.array_equal(first, second) and np.all(values == 1):
        return Placed(order, None, after)
    weight = np.zeros((size // (2 * stride), 2, 2, stride), dtype=values.dtype)
    row = np.repeat(after, terms)
    read = np.empty(len(column), dtype=np.int64)
    read[start[1:] - 1] = second
    read[start[:-1]] = first
    weight[row // (2 * stride), row // stride % 2, read // stride % 2, row % stride] = values
    return Placed(order, Stage.of(weight), after)


def _groups(size: int, first: Ints, second: Ints) -> tuple[Ints, Ints] | None:
    """The coordinates of each group of rows, (groups, 2), equal ones where it is one, and its number of rows."""
    partner = np.full(size, -1)
    two = first != second
    partner[first[two]] = second[two]
    partner[second[two]] = first[two]
    if np.any(partner[first[two]] != second[two]) or np.any(partner[second[two]] != first[two]):
        return None
    other = np.where(partner[first] < 0, first, partner[first])
    low, high = np.minimum(first, other), np.maximum(first, other)
    lead, members = np.unique(low, return_counts=True)
    if members.max(initial=0) > 2:
        return None
    partners = np.empty(size, dtype=np.int64)
    partners[low] = high
    return np.stack([lead, partners[lead]], axis=1), members


def _common_stride(size: int, group: Ints, members: Ints, live: Bools) -> int | None:
    """The stride at which all groups are pairs of coordinates, or None."""
    pair = group[:, 0] != group[:, 1]
    copied = group[~pair & (members == 2), 0]
    distances = np.unique(group[pair, 0] ^ group[pair, 1])
    if len(distances) > 1:
        return None
    if len(distances) == 1:
        candidates = [int(distances[0])] if int(distances[0]).bit_count() == 1 else []
    else:
        candidates = [1 << level for level in range(size.bit_length() - 1)]
    # A value that two rows read alone needs a free place beside its own.
    return next((s for s in candidates if not live[copied ^ s].any()), None)


def _paired(size: int, group: Ints, members: Ints) -> Ints | None:
    """An order in which every group is a pair at the stride ``size / 2``; the values of no group fill the rest."""
    half = size // 2
    pair = group[:, 0] != group[:, 1]
    spacious = pair | (members == 2)
    wide, narrow = group[spacious], group[~spacious, 0]
    if len(wide) > half or 2 * len(wide) + len(narrow) > size:
        return None
    order = np.full(size, -1)
    slot = np.arange(len(wide))
    order[slot] = wide[:, 0]
    two = wide[:, 0] != wide[:, 1]
    order[half + slot[two]] = wide[two, 1]
    taken = np.zeros(size, dtype=np.bool_)
    taken[slot] = taken[half + slot] = True
    order[np.flatnonzero(~taken)[: len(narrow)]] = narrow
    unused = np.ones(size, dtype=np.bool_)
    unused[order[order >= 0]] = False
    order[order < 0] = np.flatnonzero(unused)
    return order


def _rows_in_place(first: Ints, second: Ints, stride: int, size: int) -> Ints:
    """A coordinate for each row within its pair: a row of one value stays there if it can, others go up in order."""
    lower = first & ~stride
    rows = len(first)
    # Rows by pair; within a pair those of one value first, so that the others take what is left.
    priority = np.lexsort((np.arange(rows), first != second, lower))
    sorted_lower = lower[priority]
    leads = np.ones(rows, dtype=np.bool_)
    leads[1:] = sorted_lower[1:] != sorted_lower[:-1]
    after = np.empty(rows, dtype=np.int64)
    lead = priority[leads]
    after[lead] = np.where(first[lead] == second[lead], first[lead], lower[lead])
    by_pair = np.full(size, -1)
    by_pair[lower[lead]] = after[lead]
    rest = priority[~leads]
    after[rest] = by_pair[lower[rest]] ^ stride
    return after
