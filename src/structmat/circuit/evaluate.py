"""Evaluation level by level: the gates of a level are independent, and each is computed for a whole batch at once.

A plan gives every value a row of one buffer, and a row is used again when its value is needed no more; so the memory is
that of the values alive, not of the circuit.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from structmat.circuit.arrays import Ints, Numbers, numbers, spread, starts
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.fields import Field, natural_field
from structmat.circuit.measure import effective_weights
from structmat.circuit.simplify import live
from structmat.errors import CircuitError

_INPUT, _SUM = int(Kind.INPUT), int(Kind.SUM)
_GATE_KINDS = (Kind.SUM, Kind.PRODUCT, Kind.QUOTIENT)

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

    Cost: linear in the edges, plus some 10 microseconds for each level.
    """
    levels = circuit.levels
    order = levels.order[live(circuit)[levels.order]]
    level = levels.of_node[order]
    ends = starts(np.bincount(level, minlength=levels.count))
    fan_in = np.diff(circuit.start)[order]
    begin, edge = starts(fan_in), spread(circuit.start[order], fan_in)
    read = circuit.operand[edge]
    row = np.arange(circuit.nodes) if keep else np.full(circuit.nodes, -1)
    rows = circuit.nodes
    if not keep:
        place = np.full(circuit.nodes, -1)
        place[order] = np.arange(len(order))
        last = np.full(len(order), -1)
        # Of several writes to one place the last one stays, which is that of the highest level.
        last[place[read[read >= 0]]] = np.repeat(level, fan_in)[read >= 0]
        last[place[circuit.outputs]] = levels.count  # never overwritten
        assigned, rows = _assigned_rows(ends.tolist(), last)
        row[order] = assigned
    where, kinds = row[order], circuit.kind[order]
    gates = _Gates(order, where, kinds, begin, row[read].astype(np.int32), edge)
    sources = order[: ends[1]]
    is_input = kinds[: ends[1]] == _INPUT
    inputs, constants = sources[is_input], sources[~is_input]
    steps = tuple(gates.steps(first, end) for first, end in itertools.pairwise(ends[1:].tolist()))
    return Plan(rows, (inputs, row[inputs]), (constants, row[constants]), steps, row[circuit.outputs])


def _assigned_rows(ends: list[int], last: Ints) -> tuple[list[int], int]:
    """A row for each value, in their order, and the number of rows.

    Args:
        ends: where the values of each level begin, and after the last one where they end.
        last: (values,) the level after which the row of each value is free, -1 where nothing reads it.
    """
    depth = len(ends) - 1
    dying = np.argsort(last, kind="stable")
    dies = np.searchsorted(last[dying], np.arange(depth + 1)).tolist()
    dead = dying.tolist()
    assigned: list[int] = []
    free: list[int] = []
    rows = 0
    for level in range(depth):
        width = ends[level + 1] - ends[level]
        reused = min(len(free), width)
        assigned += sorted(free[len(free) - reused :])
        del free[len(free) - reused :]
        assigned += range(rows, rows + width - reused)
        rows += width - reused
        free += [assigned[value] for value in dead[dies[level] : dies[level + 1]]]
    return assigned, rows


@dataclass(frozen=True, eq=False)
class _Gates:
    """All live nodes by level, and their edges; :meth:`steps` cuts out the gates of one level."""

    nodes: Ints
    rows: Ints
    kinds: NDArray[np.uint8]
    begin: Ints
    operand: NDArray[np.int32]
    edge: Ints

    @cached_property
    def linear(self) -> bool:
        """Whether all gates are sums."""
        return not np.any(self.kinds > _SUM)

    def steps(self, first: int, end: int) -> tuple[Step, ...]:
        """The gates ``first .. end - 1``, by kind."""
        if first == end:
            return ()
        kinds = self.kinds[first:end]
        begin = self.begin[first : end + 1]
        if self.linear or kinds.min() == kinds.max():
            kind = Kind.SUM if self.linear else Kind(int(kinds[0]))
            own = slice(begin[0], begin[-1])
            return (self._step(kind, slice(first, end), begin - begin[0], own),)
        found = []
        for kind in _GATE_KINDS:
            chosen = first + np.flatnonzero(kinds == int(kind))
            if len(chosen):
                counts = self.begin[chosen + 1] - self.begin[chosen]
                found.append(self._step(kind, chosen, starts(counts), spread(self.begin[chosen], counts)))
        return tuple(found)

    def _step(self, kind: Kind, chosen: Ints | slice, start: Ints, own: Ints | slice) -> Step:
        rows = self.rows[chosen]
        contiguous = rows[-1] - rows[0] == len(rows) - 1 and bool(np.all(rows[1:] > rows[:-1]))
        return Step(
            kind,
            self.nodes[chosen],
            slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else rows,
            start.astype(np.int32),
            self.operand[own],
            self.edge[own],
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
