"""When each gate is computed: levels and orders in which few values are alive; circuits as products of matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from structmat.circuit.arrays import Ints, Numbers, owners, spread, starts
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.evaluate import require_linear
from structmat.circuit.measure import Levels, group_levels, level_edges
from structmat.circuit.rebuild import subset
from structmat.circuit.simplify import prune, without_zero_terms
from structmat.errors import CircuitError

_ROUNDS = 20
"""Rounds of moving gates to other levels; each lowers the number of values alive or is the last."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One sparse matrix of a product: what is alive after a level from what was alive before it.

    Attributes:
        columns: number of values before.
        start: (rows + 1,) segments of the entries of each row.
        column: (entries,) which value is read.
        weight: (entries,) numbers.
        parameter: (entries,) the parameter that multiplies the weight, or -1.
        nodes: (rows,) the circuit's node that each row holds.
    """

    columns: int
    start: Ints
    column: Ints
    weight: Numbers
    parameter: Ints
    nodes: Ints

    @property
    def rows(self) -> int:
        """Number of values after."""
        return len(self.start) - 1

    @property
    def nonzeros(self) -> int:
        """Number of entries."""
        return len(self.column)

    def matrix(self, values: Numbers | None = None) -> sparse.csr_array:
        """The matrix (rows, columns), for these values of all parameters of the circuit (floating point)."""
        weight = (
            self.weight.astype(np.result_type(np.float64, self.weight.dtype))
            if self.weight.dtype != object
            else (self.weight.astype(np.float64))
        )
        trained = self.parameter >= 0
        if trained.any():
            if values is None:
                raise CircuitError("This layer reads parameters: give their values, matrix(circuit.values).")
            weight = weight * np.where(trained, values[self.parameter], 1)
        return sparse.csr_array((weight, self.column, self.start), shape=(self.rows, self.columns))


def layers(circuit: Circuit, levels: Levels | None = None, *, keep_all: bool = False) -> tuple[Layer, ...]:
    """Matrices ``M_d ... M_1`` whose product is the matrix of a linear circuit, first applied first.

    Between two layers there are only the values that a later gate or an output still needs (their *live ranges*). The
    rows of the last layer are the outputs in their order.

    Args:
        circuit: linear; its binary form gives rows of at most two entries.
        levels: when each gate is computed, by default as early as possible; :func:`narrow_levels` may need less.
        keep_all: keep every value to the end, as in the proof of the kaleidoscope theorem. Then every layer has at
            most ``2 * size`` entries, for a circuit in binary form whose outputs are distinct.

    Raises:
        CircuitError: the circuit is not linear, or a gate is scheduled before what it reads.
    """
    require_linear(circuit, "layers")
    if levels is None:
        circuit = prune(without_zero_terms(circuit))
        levels = circuit.levels
    read_level = levels.of_node[circuit.operand]
    if np.any(read_level >= levels.of_node[owners(circuit.start)]):
        raise CircuitError("In the given levels a gate is not after all that it reads.")
    depth = int(levels.of_node[circuit.outputs].max(initial=0))
    need = _last_level(circuit, levels, depth)
    fan_in = np.diff(circuit.start)
    alive = np.arange(circuit.in_features)
    position = np.full(circuit.nodes, -1)
    result = []
    by_level = list(levels)
    for level in range(1, max(depth, 1) + 1):
        position[:] = -1
        position[alive] = np.arange(len(alive))
        columns = len(alive)
        gates = by_level[level] if level < len(by_level) else alive[:0]
        if not keep_all:
            gates = gates[need[gates] > level]
            alive = alive[need[alive] > level]
        rows = circuit.outputs if level >= depth else np.concatenate([alive, gates])
        alive = rows
        carried = position[rows] >= 0
        counts = np.where(carried, 1, fan_in[rows])
        begin = starts(counts)
        edges = spread(circuit.start[rows], counts)
        is_carried = np.repeat(carried, counts)
        column = np.empty(len(edges), dtype=np.int64)
        column[is_carried] = position[rows[carried]]
        column[~is_carried] = position[circuit.operand[edges[~is_carried]]]
        edges = np.where(is_carried, 0, edges)
        one = np.ones((), dtype=circuit.weight.dtype)
        weight = np.where(is_carried, one, circuit.weight[edges]) if len(circuit.weight) else np.ones(len(edges))
        parameter = np.where(is_carried, -1, circuit.parameter[edges]) if len(circuit.weight) else -np.ones_like(edges)
        result.append(Layer(columns, begin, column, weight, parameter, rows))
    return tuple(result)


def live_widths(circuit: Circuit, levels: Levels | None = None) -> Ints:
    """How many values are alive after each level, that of the sources first; after the last: the distinct outputs.

    Empty sums are not counted: zero needs no memory.
    """
    levels = levels or circuit.levels
    depth = int(levels.of_node.max(initial=0))
    need = _last_level(circuit, levels, depth)
    counted = (circuit.kind != Kind.SUM) | (np.diff(circuit.start) > 0)
    born, dies = levels.of_node[counted], np.maximum(need, levels.of_node)[counted]
    change = np.bincount(born, minlength=depth + 2) - np.bincount(dies, minlength=depth + 2)[: depth + 2]
    return np.cumsum(change)[: depth + 1]


def _last_level(circuit: Circuit, levels: Levels, depth: int) -> Ints:
    """The last level that reads each node; one after the last for outputs, -1 where nothing reads it."""
    need = np.full(circuit.nodes, -1)
    for level, nodes in enumerate(levels):
        _, edges = level_edges(circuit, nodes)
        read = circuit.operand[edges]
        need[read[read >= 0]] = level
    need[circuit.outputs] = depth + 1
    return need


def latest_levels(circuit: Circuit) -> Levels:
    """Every gate as late as possible within the same depth; sources stay on level 0."""
    depth = int(circuit.levels.of_node[circuit.outputs].max(initial=0))
    latest = np.full(circuit.nodes, depth)
    target = owners(circuit.start)
    for nodes in list(circuit.levels)[:0:-1]:
        _, edges = level_edges(circuit, nodes)
        np.minimum.at(latest, circuit.operand[edges], latest[target[edges]] - 1)
    latest[circuit.levels.of_node == 0] = 0
    return group_levels(latest)


def narrow_levels(circuit: Circuit) -> Levels:
    """Levels of the same depth in which few values are alive at once.

    Compared are the earliest and the latest levels, and each after moves that shorten live ranges: a gate that is the
    last reader of nothing moves towards its first reader, one that is the only last reader of two values or more moves
    towards its operands. The least maximum wins, then the least sum over the levels; a heuristic, the problem being
    NP-hard.
    """
    candidates = []
    for levels in (circuit.levels, latest_levels(circuit)):
        best = levels
        for _ in range(_ROUNDS):
            moved = _shortened(circuit, best)
            if _width(circuit, moved) >= _width(circuit, best):
                break
            best = moved
        candidates += [levels, best]
    return min(candidates, key=lambda levels: _width(circuit, levels))


def _width(circuit: Circuit, levels: Levels) -> tuple[int, int]:
    widths = live_widths(circuit, levels)
    return int(widths.max(initial=0)), int(widths.sum())


def _shortened(circuit: Circuit, levels: Levels) -> Levels:
    """One round of moves. Gates that move down and gates that move up may meet; the caller checks the width."""
    level = levels.of_node
    depth = int(level.max(initial=0))
    target = owners(circuit.start)
    read = circuit.operand >= 0
    need = _last_level(circuit, levels, depth)
    is_last = np.zeros(len(target), dtype=bool)
    is_last[read] = level[target[read]] == need[circuit.operand[read]]
    last_readers = np.bincount(circuit.operand[read & is_last], minlength=circuit.nodes)
    ends = np.zeros(circuit.nodes, dtype=np.int64)
    sole = read & is_last
    sole[read] &= last_readers[circuit.operand[read]] == 1
    np.add.at(ends, target[sole], 1)
    first_reader = np.full(circuit.nodes, depth + 1)
    np.minimum.at(first_reader, circuit.operand[read], level[target[read]])
    first_reader[circuit.outputs] = np.minimum(first_reader[circuit.outputs], depth + 1)
    earliest = np.zeros(circuit.nodes, dtype=np.int64)
    np.maximum.at(earliest, target[read], level[circuit.operand[read]] + 1)
    gate = level > 0
    new = level.copy()
    later = gate & (ends == 0)
    new[later] = np.maximum(level[later], first_reader[later] - 1)
    # Where nothing above has moved, moving down is safe; so only gates without a moved operand go earlier.
    moved_operand = np.zeros(circuit.nodes, dtype=bool)
    moved_operand[target[read & (new[circuit.operand] != level[circuit.operand])]] = True
    earlier = gate & (ends >= 2) & ~moved_operand
    new[earlier] = np.minimum(level[earlier], earliest[earlier])
    return group_levels(new)


def peak_live(circuit: Circuit) -> int:
    """The most values alive when the gates are computed one after the other in the circuit's order."""
    last = np.arange(circuit.nodes)
    read = circuit.operand >= 0
    np.maximum.at(last, circuit.operand[read], owners(circuit.start)[read])
    last[circuit.outputs] = circuit.nodes
    change = np.ones(circuit.nodes + 1, dtype=np.int64)
    np.subtract.at(change, np.minimum(last + 1, circuit.nodes), 1)
    return int(np.cumsum(change[:-1]).max(initial=0))


def reschedule(circuit: Circuit) -> Circuit:
    """The same gates in another order, so that few values are alive at once when they are computed one by one.

    The orders compared are the given one, level by level (as early, as late and as narrow as possible), and depth first
    from the outputs with the deeper operand first; the best by :func:`peak_live` is taken. Dead gates are dropped.

    Cost: depth first is a loop over the gates, about a second for a million.
    """
    circuit = prune(circuit)
    by_levels = [latest_levels(circuit), narrow_levels(circuit), circuit.levels]
    orders = [_inputs_first(circuit, levels.order) for levels in by_levels]
    candidates = [circuit, *(subset(circuit, order) for order in [*orders, _depth_first(circuit)])]
    return min(candidates, key=peak_live)


def _inputs_first(circuit: Circuit, order: Ints) -> Ints:
    return order[np.argsort(circuit.kind[order] != Kind.INPUT, kind="stable")]


def _depth_first(circuit: Circuit) -> Ints:
    """Every gate just before its first reader, as far as its operands allow."""
    start, operand = circuit.start.tolist(), circuit.operand.tolist()
    level = circuit.levels.of_node.tolist()
    order = list(range(circuit.in_features))
    placed = [False] * circuit.nodes
    for node in order:
        placed[node] = True
    for output in circuit.outputs.tolist():
        stack = [output]
        while stack:
            node = stack[-1]
            waiting = [u for u in operand[start[node] : start[node + 1]] if u >= 0 and not placed[u]]
            if placed[node] or not waiting:
                stack.pop()
                if not placed[node]:
                    placed[node] = True
                    order.append(node)
            else:
                stack.append(max(waiting, key=level.__getitem__))
    return np.array(order, dtype=np.int64)
