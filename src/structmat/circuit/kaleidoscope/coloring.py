"""Edge colorings of regular bipartite graphs, by which permutations are routed through blocks of any size.

Sources: Koenig's theorem; Gabow, "Using Euler partitions to edge color bipartite multigraphs" (1976).
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from structmat.circuit.arrays import Ints
from structmat.circuit.kaleidoscope.benes import alternating


def edge_colors(left: Ints, right: Ints, degree: int) -> Ints:
    """Colors 0 .. degree - 1 of the edges of a bipartite multigraph, all of whose vertices have that degree.

    No two edges of one vertex have one color. Even degrees are halved along closed walks; of odd ones a perfect
    matching is taken off first.

    Cost: O(edges log degree) where the degree is a power of two.
    """
    colors = np.zeros(len(left), dtype=np.int64)
    pending = [(np.arange(len(left)), degree, 0)]
    while pending:
        edges, now, begin = pending.pop()
        if now <= 1:
            colors[edges] = begin
        elif now % 2:
            matched = _perfect_matching(left[edges], right[edges])
            colors[edges[matched]] = begin
            rest = np.ones(len(edges), dtype=np.bool_)
            rest[matched] = False
            pending.append((edges[rest], now - 1, begin + 1))
        else:
            partner, other = _pairs(left[edges]), _pairs(right[edges])
            side = alternating(partner, other[partner])
            pending.append((edges[~side], now // 2, begin))
            pending.append((edges[side], now // 2, begin + now // 2))
    return colors


def _pairs(vertex: Ints) -> Ints:
    """For vertices that all occur an even number of times: each occurrence's partner at its vertex."""
    order = np.argsort(vertex, kind="stable")
    partner = np.empty(len(vertex), dtype=np.int64)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    return partner


def _perfect_matching(left: Ints, right: Ints) -> Ints:
    """One edge for each vertex of a regular bipartite multigraph; it exists by Hall's theorem."""
    names, row = np.unique(left, return_inverse=True)
    others, column = np.unique(right, return_inverse=True)
    # Of parallel edges the matrix keeps the number of one.
    key, number = np.unique(row * len(others) + column, return_index=True)
    shape = (len(names), len(others))
    graph = sparse.csr_array((np.ones(len(key)), (key // len(others), key % len(others))), shape=shape)
    chosen = csgraph.maximum_bipartite_matching(graph, perm_type="column").astype(np.int64)
    return np.asarray(number[np.searchsorted(key, np.arange(len(names)) * len(others) + chosen)])
