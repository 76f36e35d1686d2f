"""Evaluation level by level: the gates of a level are independent, and each is computed for a whole batch at once.

A plan gives every value a row of one buffer, and a row is used again when its value is needed no more; so the memory is
that of the values alive, not of the circuit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from structmat.circuit.arrays import Ints, Numbers, numbers, spread, starts
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.fields import Field, natural_field
from structmat.circuit.measure import effective_weights, level_edges
from structmat.circuit.simplify import live
from structmat.errors import CircuitError

_BUFFER_BYTES = 1 << 28
"""The batch is cut so that the buffer of values stays below this size."""


@dataclass(frozen=True, eq=False)
class Step:
    """The gates of one kind on one level.

    Attributes:
        kind: sum, product or quotient.
        nodes: (gates,) their numbers.
        rows: (gates,) rows of the buffer where their values go.
        start: (gates + 1,) segments of the following.
        operand: rows of the buffer to read.
        edge: the edges, for their weights.
    """

    kind: Kind
    nodes: Ints
    rows: Ints | slice
    start: NDArray[np.int32]
    operand: NDArray[np.int32]
    edge: Ints


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of evaluation of a circuit's live nodes.

    Attributes:
        rows: of the buffer.
        inputs: inputs that matter, and their rows.
        constants: constants (and empty sums) that matter, and their rows.
        levels: the steps of each level after the sources.
        outputs: the row of each output.
    """

    rows: int
    inputs: tuple[Ints, Ints]
    constants: tuple[Ints, Ints]
    levels: tuple[tuple[Step, ...], ...]
    outputs: Ints


def plan(circuit: Circuit, *, keep: bool = False) -> Plan:
    """Rows of the buffer for every live value, level by level.

    With ``keep`` every value has a row of its own, the one of its number: nothing is overwritten.
    """
    alive = live(circuit)
    levels = circuit.levels
    by_level = [nodes[alive[nodes]] for nodes in levels]
    edges = [level_edges(circuit, nodes) for nodes in by_level]
    row = np.arange(circuit.nodes) if keep else np.full(circuit.nodes, -1)
    rows = circuit.nodes
    if not keep:
        rows = _assign_rows(circuit, by_level, edges, row)
    steps = []
    for nodes, (begin, own) in zip(by_level[1:], edges[1:], strict=True):
        kinds = circuit.kind[nodes]
        present = [kind for kind in (Kind.SUM, Kind.PRODUCT, Kind.QUOTIENT) if np.any(kinds == kind)]
        steps.append(tuple(_step(circuit, kind, nodes, kinds, begin, own, row, len(present)) for kind in present))
    sources = by_level[0]
    is_input = circuit.kind[sources] == Kind.INPUT
    inputs, constants = sources[is_input], sources[~is_input]
    return Plan(rows, (inputs, row[inputs]), (constants, row[constants]), tuple(steps), row[circuit.outputs])


def _assign_rows(circuit: Circuit, by_level: list[Ints], edges: list[tuple[Ints, Ints]], row: Ints) -> int:
    """Fill in ``row``; the number of rows."""
    depth = len(by_level)
    last = np.full(circuit.nodes, -1)
    for level, (_, own) in enumerate(edges):
        read = circuit.operand[own]
        last[read[read >= 0]] = level
    last[circuit.outputs] = depth  # never overwritten
    everything = np.concatenate(by_level)
    order = np.argsort(last[everything], kind="stable")
    dying = everything[order]
    ends = np.searchsorted(last[dying], np.arange(depth + 1))
    free = np.zeros(0, dtype=np.int64)
    rows = 0
    for level, nodes in enumerate(by_level):
        reused = min(len(free), len(nodes))
        taken = np.sort(free[len(free) - reused :])
        fresh = len(nodes) - reused
        row[nodes] = np.concatenate([taken, np.arange(rows, rows + fresh)])
        rows += fresh
        free = np.concatenate([free[: len(free) - reused], row[dying[ends[level] : ends[level + 1]]]])
    return rows


def _step(
    circuit: Circuit, kind: Kind, nodes: Ints, kinds: NDArray[np.uint8], begin: Ints, own: Ints, row: Ints, present: int
) -> Step:
    if present > 1:
        chosen = np.flatnonzero(kinds == kind)
        counts = begin[chosen + 1] - begin[chosen]
        own = own[spread(begin[chosen], counts)]
        begin, nodes = starts(counts), nodes[chosen]
    rows = row[nodes]
    contiguous = bool(np.all(np.diff(rows) == 1))
    return Step(
        kind,
        nodes,
        slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else rows,
        begin.astype(np.int32),
        row[circuit.operand[own]].astype(np.int32),
        own,
    )


def evaluate(
    circuit: Circuit, x: ArrayLike, field: Field | None = None, parameters: ArrayLike | None = None
) -> Numbers:
    """What :meth:`Circuit.evaluate` documents."""
    given = np.asarray(x)
    rows = numbers(given)
    if rows.ndim not in (1, 2) or rows.shape[-1] != circuit.in_features:
        raise CircuitError(
            f"The circuit has {circuit.in_features} inputs; got values of shape {rows.shape}. Give "
            f"({circuit.in_features},), or (batch, {circuit.in_features})."
        )
    circuit = _with_parameters(circuit, parameters)
    if field is not None and not isinstance(field, Field):
        raise CircuitError(f"An arithmetic is an instance of Field, such as Floats() or PrimeField(); got {field!r}.")
    if field is None:
        field = natural_field(rows, circuit.weight, circuit.values, precision=given.dtype)
    batch = np.atleast_2d(rows)
    weights = effective_weights(circuit, field)
    chosen = circuit.plan
    item = field.zeros((1,)).itemsize
    width = max(1, _BUFFER_BYTES // max(1, chosen.rows * item))
    parts = []
    for begin in range(0, max(1, len(batch)), width):
        columns = np.ascontiguousarray(field.array(batch[begin : begin + width]).T)
        buffer = run(circuit, chosen, field, columns, weights)
        parts.append(buffer[chosen.outputs].T)
    result = np.concatenate(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0])
    return result[0] if rows.ndim == 1 else result


def values_of_nodes(circuit: Circuit, x: Numbers, field: Field) -> Numbers:
    """The value of every live node for one vector (inputs,): (nodes,); the others are zero.

    Raises:
        CircuitError: as :meth:`Circuit.evaluate`.
    """
    weights = effective_weights(circuit, field)
    return run(circuit, plan(circuit, keep=True), field, field.array(x)[:, None], weights)[:, 0]


def run(circuit: Circuit, chosen: Plan, field: Field, columns: Numbers, weights: Numbers) -> Numbers:
    """The buffer of values after the last level, for inputs (inputs, batch) and the weights of all edges."""
    batch = columns.shape[1]
    buffer = field.zeros((chosen.rows, batch))
    nodes, rows = chosen.inputs
    buffer[rows] = columns[nodes]
    nodes, rows = chosen.constants
    filled = np.diff(circuit.start)[nodes] > 0
    buffer[rows[filled]] = weights[circuit.start[nodes[filled]]][:, None]
    if batch == 0:
        return buffer
    for level in chosen.levels:
        # All gates of a level read before any writes.
        results = [_compute(step, field, buffer, weights) for step in level]
        for step, result in zip(level, results, strict=True):
            buffer[step.rows] = result
    return buffer


def _compute(step: Step, field: Field, buffer: Numbers, weights: Numbers) -> Numbers:
    if step.kind == Kind.SUM:
        return field.weighted_sum(buffer, step.start, step.operand, weights[step.edge])
    if step.kind == Kind.PRODUCT:
        return field.product(buffer, step.start, step.operand)
    divisor = buffer[step.operand[1::2]]
    try:
        return field.quotient(buffer[step.operand[0::2]], divisor)
    except ZeroDivisionError:
        zero = [i for i, row in enumerate(divisor == 0) if row.any()]
        raise CircuitError(
            f"Gate {step.nodes[zero[0]]} divides by zero in {field}. Evaluate at another point."
        ) from None


def _with_parameters(circuit: Circuit, parameters: ArrayLike | None) -> Circuit:
    if parameters is None:
        return circuit
    return _reusing_plan(circuit, circuit.with_values(np.asarray(parameters)))


def _reusing_plan(old: Circuit, new: Circuit) -> Circuit:
    """The plan depends on the edges only: hand it on rather than making it anew."""
    new.__dict__["plan"] = old.plan
    return new


def to_dense(circuit: Circuit, field: Field | None = None) -> Numbers:
    """What :meth:`Circuit.to_dense` documents."""
    require_linear(circuit, "to_dense")
    field = field or natural_field(circuit.weight, circuit.values)
    unit = np.eye(circuit.in_features, dtype=np.int64)
    return np.ascontiguousarray(evaluate(circuit, unit, field).T)


def require_linear(circuit: Circuit, what: str) -> None:
    """Refuse a circuit that is not linear, saying why.

    Raises:
        CircuitError: a live node is a constant, product or quotient.
    """
    if circuit.is_linear:
        return
    kinds = circuit.kind[live(circuit)]
    found = {kind.name.lower(): int(np.count_nonzero(kinds == kind)) for kind in Kind if kind not in (0, 2)}
    parts = ", ".join(f"{count} {name}s" for name, count in found.items() if count)
    raise CircuitError(
        f"{what} needs a linear circuit, made of sums of its inputs; this one also has {parts}. Its terms of degree 1 "
        "are linear_part(at=...)."
    )
