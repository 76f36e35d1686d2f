"""The binary form: gates of at most two operands, in trees of least depth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from structmat.circuit.arrays import Ints, Numbers, joined, owners, starts
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.measure import binary_depths


def binary(circuit: Circuit) -> Circuit:
    """A circuit of the same function whose gates have one or two operands.

    The two shallowest operands of a node are merged first, again and again (a Huffman tree by depth), which gives the
    least depth. Products of one operand become sums of one term. Multiplications, additions, ``gates`` and ``depth``
    are those that the circuit reported before.

    Cost: linear in the edges, plus some 100 microseconds for each level of the result.
    """
    fan_in = np.diff(circuit.start)
    kind = np.where((circuit.kind == Kind.PRODUCT) & (fan_in == 1), Kind.SUM, circuit.kind).astype(np.uint8)
    circuit = replace(circuit, kind=kind)
    wide = fan_in > 2
    if not wide.any():
        return circuit
    trees = _Trees(circuit, wide)
    for depth in range(int(trees.depth.max())):
        trees.merge(depth)
    return trees.result()


class _Trees:
    """The growing trees of all nodes with more than two operands, merged depth by depth at the same time.

    An item is an operand or a tree of some, waiting to be merged. At each depth the items of a node that have arrived
    are merged in pairs; an odd one waits in the node's slot until another arrives.
    """

    def __init__(self, circuit: Circuit, wide: np.ndarray) -> None:
        self.circuit = circuit
        self.wide = wide
        self.depth = binary_depths(circuit)
        self.left = np.where(wide, np.diff(circuit.start), 0)
        target = owners(circuit.start)
        edges = np.flatnonzero(wide[target])
        reads = self.depth[circuit.operand[edges]]
        by_depth = np.argsort(reads, kind="stable")
        self.items = (target[edges][by_depth], *(a[edges][by_depth] for a in _columns(circuit)))
        self.begin = np.searchsorted(reads[by_depth], np.arange(int(self.depth.max()) + 2))
        self.merged = tuple(a[:0] for a in self.items)
        self.slot = tuple(np.zeros(circuit.nodes, dtype=a.dtype) for a in self.items)
        self.waiting = np.zeros(circuit.nodes, dtype=bool)
        self.nodes = circuit.nodes
        self.inner_depths: list[Ints] = []
        self.inner_kinds: list[np.ndarray] = []
        self.edges: list[tuple[Numbers, ...]] = []

    def merge(self, depth: int) -> None:
        """Merge what has arrived at this depth."""
        span = slice(self.begin[depth], self.begin[depth + 1])
        arrived = tuple(np.concatenate([a[span], b]) for a, b in zip(self.items, self.merged, strict=True))
        nodes = np.unique(arrived[0])
        held = nodes[self.waiting[nodes]]
        arrived = tuple(np.concatenate([a, s[held]]) for a, s in zip(arrived, self.slot, strict=True))
        self.waiting[held] = False
        order = np.argsort(arrived[0], kind="stable")
        arrived = tuple(a[order] for a in arrived)
        count = np.bincount(np.searchsorted(nodes, arrived[0]), minlength=len(nodes))
        begin = starts(count)[:-1]
        odd = count % 2 == 1
        last = (begin + count - 1)[odd]
        for store, column in zip(self.slot, arrived, strict=True):
            store[nodes[odd]] = column[last]
        self.waiting[nodes[odd]] = True
        paired = np.ones(len(arrived[0]), dtype=bool)
        paired[last] = False
        owner = arrived[0][paired][0::2]
        self.left[nodes] -= count // 2
        # The last merge of a node is the node itself.
        final = self.left[owner] == 1
        inner = np.where(final, owner, self.nodes + np.cumsum(~final) - 1)
        fresh = int(np.count_nonzero(~final))
        self.nodes += fresh
        self.inner_depths.append(np.full(fresh, depth + 1))
        self.inner_kinds.append(self.circuit.kind[owner[~final]])
        self.edges.append((np.repeat(inner, 2), *(a[paired] for a in arrived[1:])))
        up = owner[~final]
        self.merged = (up, inner[~final], np.ones(fresh, self.items[2].dtype), np.full(fresh, -1))

    def result(self) -> Circuit:
        """The circuit, its nodes ordered by depth."""
        narrow = ~self.wide[owners(self.circuit.start)]
        own = (owners(self.circuit.start), *_columns(self.circuit))
        parts = [tuple(a[narrow] for a in own), *self.edges]
        target, operand, weight, parameter = (joined(list(column)) for column in zip(*parts, strict=True))
        kind = np.concatenate([self.circuit.kind, *self.inner_kinds])
        depth = np.concatenate([self.depth, *self.inner_depths])
        # A gate is deeper than what it reads, so this order is topological; inputs are first already.
        order = np.argsort(depth, kind="stable")
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        by_place = np.argsort(place[target], kind="stable")
        read = operand[by_place]
        return replace(
            self.circuit,
            kind=kind[order],
            start=starts(np.bincount(place[target], minlength=len(order))),
            operand=np.where(read >= 0, place[read], -1),
            weight=weight[by_place],
            parameter=parameter[by_place],
            outputs=place[self.circuit.outputs],
        )


def _columns(circuit: Circuit) -> tuple[Ints, Numbers, Ints]:
    return circuit.operand, circuit.weight, circuit.parameter
