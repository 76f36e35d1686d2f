"""Counts, levels, depth and degree of a circuit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from structmat.circuit.arrays import Ints, Numbers, common_type, consumers, is_unit, owners, reachable, spread, starts
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.sort import level_of_nodes

if TYPE_CHECKING:
    from structmat.circuit.fields import Field

_EXACT_SPREAD = 20
"""Up to this difference of depths among the operands of a node, its depth is computed in floating point exactly."""


@dataclass(frozen=True)
class Counts:
    """What a circuit holds, in one of the two forms: binary, or with unbounded fan-in.

    Attributes:
        gates: sums, products and quotients.
        size: gates and inputs.
        depth: the longest path from a source to an output, in gates.
        multiplications: weights of sums other than 1 and -1, and binary products: the same in both forms.
        additions: terms less one of every sum: the same in both forms.
        divisions: quotients.
        parameters: each once.
    """

    gates: int
    size: int
    depth: int
    multiplications: int
    additions: int
    divisions: int
    parameters: int

    @property
    def operations(self) -> int:
        """Multiplications, additions and divisions."""
        return self.multiplications + self.additions + self.divisions


@dataclass(frozen=True, eq=False)
class Levels:
    """The nodes of a circuit by level.

    Attributes:
        of_node: (nodes,) the level of each node.
        start: (levels + 1,) where the nodes of each level begin in ``order``.
        order: (nodes,) all nodes by level, ascending within each.
    """

    of_node: Ints
    start: Ints
    order: Ints

    @property
    def count(self) -> int:
        """Number of levels, that of the sources included."""
        return len(self.start) - 1

    @property
    def widths(self) -> Ints:
        """Number of nodes of each level."""
        return np.diff(self.start)

    def __iter__(self) -> Iterator[Ints]:
        """The nodes of each level, from the sources on."""
        return (self.order[a:b] for a, b in zip(self.start[:-1], self.start[1:], strict=True))


def levels(circuit: Circuit) -> Levels:
    """The levels of a circuit as it is (unbounded fan-in). Empty sums are sources."""
    return group_levels(level_of_nodes(circuit.start, circuit.operand))


def group_levels(of_node: Ints) -> Levels:
    """The nodes grouped by any assignment of levels."""
    return Levels(of_node, starts(np.bincount(of_node, minlength=1)), np.argsort(of_node, kind="stable"))


def level_edges(circuit: Circuit, nodes: Ints) -> tuple[Ints, Ints]:
    """The edges of some nodes: segments (nodes + 1,) over edge numbers."""
    counts = circuit.start[nodes + 1] - circuit.start[nodes]
    return starts(counts), spread(circuit.start[nodes], counts)


def wide_counts(circuit: Circuit) -> Counts:
    """Counts of the nodes as they are. Empty sums are no gates."""
    fan_in = np.diff(circuit.start)
    is_sum = (circuit.kind == Kind.SUM) & (fan_in > 0)
    is_product = circuit.kind == Kind.PRODUCT
    divisions = int(np.count_nonzero(circuit.kind == Kind.QUOTIENT))
    weighted = np.repeat(circuit.kind == Kind.SUM, fan_in) & (~is_unit(circuit.weight) | (circuit.parameter >= 0))
    gates = int(np.count_nonzero(is_sum) + np.count_nonzero(is_product)) + divisions
    return Counts(
        gates=gates,
        size=gates + circuit.in_features,
        depth=int(circuit.levels.of_node[circuit.outputs].max(initial=0)),
        multiplications=int(np.count_nonzero(weighted) + (fan_in[is_product] - 1).sum()),
        additions=int((fan_in[is_sum] - 1).sum()),
        divisions=divisions,
        parameters=circuit.parameters,
    )


def binary_counts(circuit: Circuit) -> Counts:
    """Counts of the binary form, in trees of least depth, without building it."""
    wide = circuit.wide
    fan_in = np.diff(circuit.start)
    is_gate = circuit.kind >= Kind.SUM
    gates = int(np.maximum(fan_in[is_gate] - 1, fan_in[is_gate] > 0).sum())
    return Counts(
        gates=gates,
        size=gates + circuit.in_features,
        depth=int(binary_depths(circuit)[circuit.outputs].max(initial=0)),
        multiplications=wide.multiplications,
        additions=wide.additions,
        divisions=wide.divisions,
        parameters=wide.parameters,
    )


def binary_depths(circuit: Circuit) -> Ints:
    """The depth of every node in the binary form.

    Merging the two shallowest operands of a node again and again gives its tree of least depth: the least ``D`` with
    ``sum over operands of 2^depth <= 2^D`` (Golumbic 1976, "Combinatorial merging").
    """
    fan_in = np.diff(circuit.start)
    depth = np.zeros(circuit.nodes, dtype=np.int64)
    for nodes in list(circuit.levels)[1:]:
        begin, edges = level_edges(circuit, nodes)
        depth[nodes] = _merged_depth(depth[circuit.operand[edges]], begin, fan_in[nodes])
    return depth


def _merged_depth(depths: Ints, begin: Ints, counts: Ints) -> Ints:
    """The depth of the best tree over each segment of operands; a single operand is one gate."""
    deepest = np.maximum.reduceat(depths, begin[:-1])
    below = np.repeat(deepest, counts) - depths
    total = np.add.reduceat(np.exp2(-np.minimum(below, 1000).astype(np.float64)), begin[:-1])
    result = deepest + np.maximum(1, np.ceil(np.log2(total)).astype(np.int64))
    # Terms far below the deepest drop out of the floating-point sum: those nodes are counted in integers.
    for node in np.flatnonzero(np.maximum.reduceat(below, begin[:-1]) > _EXACT_SPREAD):
        own = depths[begin[node] : begin[node + 1]].tolist()
        result[node] = deepest[node] + max(1, _tree_depth(own) - int(deepest[node]))
    return result


def _tree_depth(depths: list[int]) -> int:
    """The same by counting: at each depth the operands are merged in pairs and an odd one is carried on."""
    waiting: dict[int, int] = {}
    for depth in depths:
        waiting[depth] = waiting.get(depth, 0) + 1
    depth, carried = min(waiting), 0
    left = len(depths)
    while True:
        here = carried + waiting.pop(depth, 0)
        left -= here // 2
        carried = (here + 1) // 2
        if left == 1 and not waiting:
            return depth + (1 if here > 1 else 0)
        # A lone operand waits for the next one, however deep that is.
        depth = depth + 1 if carried > 1 or not waiting else min(waiting)


def depends_on_inputs(circuit: Circuit) -> NDArray[np.bool_]:
    """Which nodes can change with the inputs."""
    return reached_from(circuit, circuit.kind == Kind.INPUT)


def reached_from(circuit: Circuit, sources: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The given nodes and all that read them, directly or through others."""
    begin, edges = consumers(circuit.start, circuit.operand)
    return reachable(begin, owners(circuit.start)[edges], np.flatnonzero(sources))


def degrees(circuit: Circuit) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds on the degrees, in inputs and parameters, of every node's numerator and denominator.

    Each node is a rational function; the bound is what its gates can give at most (the formal degree). Floats, since
    repeated squaring has degree ``2^depth``; beyond their range the bound is infinite.
    """
    above = np.zeros(circuit.nodes)
    below = np.zeros(circuit.nodes)
    parametric = circuit.parameter >= 0
    above[circuit.kind == Kind.INPUT] = 1
    constant = np.flatnonzero(circuit.kind == Kind.CONSTANT)
    above[constant] = parametric[circuit.start[constant]]
    with np.errstate(over="ignore", invalid="ignore"):
        for nodes in list(circuit.levels)[1:]:
            begin, edges = level_edges(circuit, nodes)
            top = above[circuit.operand[edges]] + parametric[edges]
            bottom = below[circuit.operand[edges]]
            first = begin[:-1]
            common = np.add.reduceat(bottom, first)
            # Over the common denominator each numerator is multiplied by the other denominators.
            own = np.maximum.reduceat(top - bottom, first) + common
            product = np.add.reduceat(top, first)
            kind = circuit.kind[nodes]
            above[nodes] = np.where(kind == Kind.SUM, own, product)
            below[nodes] = common
            ratio = np.flatnonzero(kind == Kind.QUOTIENT)
            over, under = first[ratio], first[ratio] + 1
            above[nodes[ratio]] = top[over] + bottom[under]
            below[nodes[ratio]] = bottom[over] + top[under]
    above[np.isnan(above)] = np.inf
    return above, below


def largest_weight(circuit: Circuit) -> float:
    """The largest absolute value of a weight of a sum, parameters at their current values."""
    weight = effective_weights(circuit)[np.repeat(circuit.kind == Kind.SUM, np.diff(circuit.start))]
    return float(abs(weight).max()) if len(weight) else 0.0


def effective_weights(circuit: Circuit, field: Field | None = None) -> Numbers:
    """The weights with the parameters' current values multiplied in, as numbers of a field if one is given."""
    trained = circuit.parameter >= 0
    weight, values = circuit.weight, circuit.values
    if field is not None:
        weight, values = field.array(weight), field.array(values)
    if not trained.any():
        return weight
    product = weight.astype(common_type(weight, values))
    product[trained] = product[trained] * values[circuit.parameter[trained]]
    return product if field is None else field.array(product)


def max_fan_out(circuit: Circuit) -> int:
    """The most edges that read one node, a use as an output counting as one."""
    uses = np.bincount(circuit.operand[circuit.operand >= 0], minlength=circuit.nodes)
    uses += np.bincount(circuit.outputs, minlength=circuit.nodes)
    return int(uses.max(initial=0))
