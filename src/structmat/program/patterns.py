"""What a sparse layer of a circuit is: blocks of one size, up to the order of what it reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from structmat.circuit.arrays import Ints, owners
from structmat.sizes import divisors


@dataclass(frozen=True, eq=False)
class Blocks:
    """A layer as a contraction of pattern (a, b, c, d), all of whose entries are there.

    Attributes:
        pattern: (a, b, c, d).
        order: the permutation ``y[i] = x[order[i]]`` that comes before it, or None.
        where: (rows,) the place of each row of the layer afterwards.
        entry: (a, b, c, d) the layer's entry at each place of the weight.
    """

    pattern: tuple[int, int, int, int]
    order: Ints | None
    where: Ints
    entry: Ints


def blocks(where: Ints, start: Ints, column: Ints) -> Blocks | None:
    """The blocks of a layer, or None where it is something else.

    Args:
        where: (columns,) the place of each value that the layer reads, a permutation.
        start: (rows + 1,) segments of the entries of each row.
        column: (entries,) of the layer.
    """
    rows, columns, entries = len(start) - 1, len(where), len(column)
    if not rows or not columns or entries % rows or entries % columns:
        return None
    b, c = entries // columns, entries // rows
    row, place = owners(start), where[column]
    if b * c == 0 or rows % b or np.any(np.diff(start) != c) or np.any(np.bincount(place, minlength=columns) != b):
        return None
    groups = rows // b
    if len(np.unique(row * columns + place)) < entries:
        return None
    graph = sparse.csr_array((np.ones(entries), place, start), shape=(rows, columns))
    both = sparse.block_array([[None, graph], [graph.T, None]])
    found, label = csgraph.connected_components(both, directed=False)
    # With b entries in each column and c in each row, b rows a group leave no room for a missing entry.
    if found != groups or np.any(np.bincount(label[:rows], minlength=found) != b):
        return None
    of_row, of_place = label[:rows].astype(np.int64), label[rows:].astype(np.int64)
    order, d = None, _interleaving(of_place, c)
    if d is None:
        order, d = np.argsort(of_place, kind="stable"), 1
        moved = np.empty(columns, dtype=np.int64)
        moved[order] = np.arange(columns)
        place, of_place = moved[place], of_place[order]
    a = groups // d
    # The places of each group's rows, in the rows' order.
    outer = np.empty(groups, dtype=np.int64)
    outer[of_place.reshape(a, c, d)[:, 0].ravel()] = (np.arange(a)[:, None] * b * d + np.arange(d)).ravel()
    by_group = np.argsort(of_row, kind="stable")
    after = np.empty(rows, dtype=np.int64)
    after[by_group] = np.repeat(outer[of_row[by_group[::b]]], b) + np.tile(np.arange(b) * d, groups)
    target = after[row]
    entry = np.empty((a, b, c, d), dtype=np.int64)
    entry[target // (b * d), target // d % b, place // d % c, target % d] = np.arange(entries)
    return Blocks((a, b, c, d), order, after, entry)


def _interleaving(group: Ints, size: int) -> int | None:
    """The d with which the places (a, size, d) of each group differ in the middle digit only; the least one."""
    groups = len(group) // size
    for d in divisors(groups):
        digits = group.reshape(groups // d, size, d)
        if np.array_equal(digits, np.broadcast_to(digits[:, :1], digits.shape)):
            return d
    return None
