"""Fewer gates for the same function."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from structmat.circuit.arrays import Bools, Ints, Numbers, joined, owners, reachable, spread, starts
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.measure import depends_on_inputs, level_edges, reached_from
from structmat.circuit.rebuild import subset, without_copies, without_edges
from structmat.errors import CircuitError


def live(circuit: Circuit) -> Bools:
    """Which nodes an output needs."""
    return reachable(circuit.start, circuit.operand, circuit.outputs)


def prune(circuit: Circuit) -> Circuit:
    """Without the gates and constants that no output needs. Inputs stay."""
    keep = live(circuit)
    keep[: circuit.in_features] = True
    return circuit if keep.all() else subset(circuit, np.flatnonzero(keep))


def simplify(circuit: Circuit) -> Circuit:
    """A circuit of the same function with at most as many gates, repeated until nothing changes.

    In each round: terms with weight 0 and repeated terms of a sum are merged, products with constants become weights,
    gates of constants become constants, copies are bypassed, equal gates become one, and dead gates are dropped.

    Parameters stay parameters: nothing is computed from their values. Floating-point constants are folded in floating
    point, so the results differ by rounding; integers and fractions are exact.

    Cost: linear in the edges, plus sorting, for each of a few rounds.

    Law: ``equal(c, simplify(c))``, for constants that fold exactly.
    """
    while True:
        before = (circuit.nodes, circuit.edges, circuit.multiplications, circuit.additions)
        for step in (prune, merge_terms, fold_constants, without_copies, share_gates, prune):
            circuit = step(circuit)
        if before == (circuit.nodes, circuit.edges, circuit.multiplications, circuit.additions):
            return circuit


def merge_terms(circuit: Circuit) -> Circuit:
    """Terms of one sum that read the same node (and parameter) become one, and those of weight 0 are dropped."""
    target = owners(circuit.start)
    summed = circuit.kind[target] == Kind.SUM
    edges = np.flatnonzero(summed)
    if not len(edges):
        return circuit
    order = edges[np.lexsort((circuit.parameter[edges], circuit.operand[edges], target[edges]))]
    same = (
        (target[order][1:] == target[order][:-1])
        & (circuit.operand[order][1:] == circuit.operand[order][:-1])
        & (circuit.parameter[order][1:] == circuit.parameter[order][:-1])
    )
    weight = circuit.weight
    keep = np.ones(len(target), dtype=bool)
    if same.any():
        first = np.flatnonzero(np.concatenate([[True], ~same]))
        # Sums of large integers leave 64 bits.
        large = weight.dtype.kind == "i" and np.abs(weight[order]).max() >= 1 << 31
        weight = weight.astype(object) if large else weight.copy()
        weight[order[first]] = np.add.reduceat(weight[order], first)
        weight = _narrow(weight)
        keep[np.delete(order, first)] = False
    keep &= ~(summed & np.asarray(weight == 0, dtype=bool))
    if keep.all():
        return circuit
    return without_edges(replace(circuit, weight=weight), keep)


def fold_constants(circuit: Circuit) -> Circuit:
    """Gates whose operands are numbers become numbers; products with numbers become weights.

    Constant gates that depend on parameters stay gates. A division by the constant zero stays too, so that evaluating
    it reports it.
    """
    fixed = ~(depends_on_inputs(circuit) | reached_from(circuit, _trained_nodes(circuit)))
    if not fixed.any():
        return circuit
    from structmat.circuit.evaluate import values_of_nodes
    from structmat.circuit.fields import Floats, Rationals

    kinds = circuit.weight.dtype.kind
    field = Rationals() if kinds in "iO" else Floats(circuit.weight.dtype)
    folding = prune(replace(circuit, outputs=np.flatnonzero(fixed)))
    try:
        values = values_of_nodes(folding, np.zeros(circuit.in_features, np.int64), field)[folding.outputs]
    except CircuitError:  # a division by zero, or numbers that grow beyond bounds: left as they are
        return circuit
    value = np.zeros(circuit.nodes, dtype=values.dtype)
    value[fixed] = values
    circuit = _constants_instead(circuit, fixed, value)
    return without_zero_terms(_constants_out_of_products(circuit, fixed, value))


def _trained_nodes(circuit: Circuit) -> Bools:
    trained = np.zeros(circuit.nodes, dtype=bool)
    trained[owners(circuit.start)[circuit.parameter >= 0]] = True
    return trained


def _constants_instead(circuit: Circuit, fixed: Bools, value: Numbers) -> Circuit:
    """Gates of known value become constants. An empty sum stays: it is the constant 0 already."""
    gate = fixed & (circuit.kind >= Kind.SUM) & (np.diff(circuit.start) > 0)
    zero = gate & np.asarray(value == 0, dtype=bool)
    number = gate & ~zero
    if not gate.any():
        return circuit
    counts = np.diff(circuit.start)
    keep = ~np.repeat(gate, counts)
    kind = circuit.kind.copy()
    kind[zero], kind[number] = Kind.SUM, Kind.CONSTANT
    target = np.concatenate([owners(circuit.start)[keep], np.flatnonzero(number)])
    order = np.argsort(target, kind="stable")
    none = np.full(int(number.sum()), -1)
    return replace(
        circuit,
        kind=kind,
        start=starts(np.bincount(target, minlength=circuit.nodes)),
        operand=np.concatenate([circuit.operand[keep], none])[order],
        weight=joined([circuit.weight[keep], _narrow(value[number])])[order],
        parameter=np.concatenate([circuit.parameter[keep], none])[order],
    )


def _constants_out_of_products(circuit: Circuit, fixed: Bools, value: Numbers) -> Circuit:
    """A product or quotient with one varying operand and known others is a sum of one term."""
    target = owners(circuit.start)
    read = np.where(circuit.operand >= 0, circuit.operand, 0)
    known = fixed[read] & (circuit.operand >= 0)
    varying = np.bincount(target[~known], minlength=circuit.nodes)
    some = np.bincount(target[known], minlength=circuit.nodes) > 0
    scaled = (circuit.kind == Kind.PRODUCT) & some & (varying == 1)
    divided = (circuit.kind == Kind.QUOTIENT) & (varying == 1)
    divisor = circuit.start[:-1][divided] + 1
    divided[divided] = known[divisor] & np.asarray(value[read[divisor]] != 0, dtype=bool)
    changed = scaled | divided
    if not changed.any():
        return circuit
    weight = circuit.weight.astype(np.result_type(circuit.weight, value) if value.dtype != object else object)
    inside = changed[target]
    factor = np.where(known, value[read], value.dtype.type(1) if value.dtype != object else 1)
    edges = np.flatnonzero(divided[target] & known)
    factor[edges] = [_inverse(number) for number in factor[edges].tolist()]
    nodes = np.flatnonzero(changed)
    begin = starts(np.diff(circuit.start)[nodes])[:-1]
    total = np.multiply.reduceat(factor[inside], begin)
    keep = ~(inside & known)
    weight[inside & ~known] = total
    kind = circuit.kind.copy()
    kind[changed] = Kind.SUM
    counts = np.bincount(target[keep], minlength=circuit.nodes)
    return replace(
        circuit,
        kind=kind,
        start=starts(counts),
        operand=circuit.operand[keep],
        weight=_narrow(weight[keep]),
        parameter=circuit.parameter[keep],
    )


def without_zero_terms(circuit: Circuit) -> Circuit:
    """Terms that read an empty sum, the constant 0, are dropped; again where that makes another sum empty."""
    while True:
        target = owners(circuit.start)
        read = np.where(circuit.operand >= 0, circuit.operand, 0)
        empty = (circuit.kind == Kind.SUM) & (np.diff(circuit.start) == 0)
        zero = (circuit.kind[target] == Kind.SUM) & (circuit.operand >= 0) & empty[read]
        if not zero.any():
            return circuit
        circuit = without_edges(circuit, ~zero)


def _inverse(number: object) -> object:
    from fractions import Fraction

    return Fraction(1) / number if isinstance(number, int | Fraction) else 1 / number  # type: ignore[operator]


def _narrow(values: Numbers) -> Numbers:
    """Objects that all are small integers as int64."""
    if values.dtype == object and all(isinstance(v, int) and abs(v) < 1 << 62 for v in values.tolist()):
        return values.astype(np.int64)
    return values


def share_gates(circuit: Circuit) -> Circuit:
    """Equal gates and constants (same kind, same terms in any order) become one; level by level from the sources.

    Equal terms are found by two 64-bit hashes and then compared, so that no collision can merge different gates.
    """
    hashes = _weight_hashes(circuit)
    into = np.arange(circuit.nodes)
    operand = circuit.operand.copy()
    for number, nodes in enumerate(circuit.levels):
        gates = nodes if number else nodes[circuit.kind[nodes] != Kind.INPUT]
        if len(gates) < 2:
            continue
        begin, edges = level_edges(circuit, gates)
        operand[edges] = np.where(operand[edges] >= 0, into[operand[edges]], -1)
        into[gates] = _first_equal(circuit, gates, begin, edges, operand, hashes)
    read = operand >= 0
    final = np.where(read, into[operand], -1)
    return replace(circuit, operand=final, outputs=into[circuit.outputs])


_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))


def _scrambled(words: Ints | Numbers, salt: np.uint64) -> Numbers:
    """A bijective mixing of 64-bit words (the finalizer of SplitMix64)."""
    with np.errstate(over="ignore"):
        word = np.asarray(words).astype(np.uint64) + salt
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(word ^ (word >> np.uint64(31)))


def _weight_numbers(weight: Numbers) -> Ints:
    """A number for each distinct weight."""
    if weight.dtype == object:
        seen: dict[object, int] = {}
        return np.array([seen.setdefault(w, len(seen)) for w in weight.tolist()], dtype=np.int64)
    return np.asarray(np.unique(weight, return_inverse=True)[1], dtype=np.int64)


def _weight_hashes(circuit: Circuit) -> Ints:
    """A number for each distinct pair of weight and parameter."""
    distinct = _weight_numbers(circuit.weight)
    return distinct * (circuit.parameters + 1) + circuit.parameter + 1


def _first_equal(circuit: Circuit, gates: Ints, begin: Ints, edges: Ints, operand: Ints, hashes: Ints) -> Ints:
    """For each gate of a level the first gate that equals it."""
    counts = np.diff(begin)
    # The order of a quotient's operands matters, that of other gates does not.
    position = np.where(
        np.repeat(circuit.kind[gates] == Kind.QUOTIENT, counts),
        np.arange(len(edges)) - np.repeat(begin[:-1], counts),
        0,
    )
    keys = [circuit.kind[gates].astype(np.uint64) + np.uint64(8) * counts.astype(np.uint64)]
    filled = np.flatnonzero(counts)
    for salt in _MIX:
        with np.errstate(over="ignore"):
            term = _scrambled(
                _scrambled(operand[edges] + 1, salt) ^ _scrambled(hashes[edges] * 2 + position, salt * np.uint64(3)),
                salt,
            )
            key = np.zeros(len(gates), dtype=np.uint64)
            if len(filled):
                key[filled] = np.add.reduceat(term, begin[:-1][filled])
        keys.append(key)
    order = np.lexsort((gates, *keys))
    same = np.ones(len(order) - 1, dtype=bool)
    for key in keys:
        same &= key[order][1:] == key[order][:-1]
    leader = order[np.maximum.accumulate(np.where(np.concatenate([[False], same]), 0, np.arange(len(order))))]
    first = np.empty(len(gates), dtype=np.int64)
    first[order] = leader
    twin = np.flatnonzero(first != np.arange(len(gates)))
    if len(twin):
        terms = np.lexsort((position, hashes[edges], operand[edges], owners(begin)))
        differs = _rows_differ(begin, twin, first[twin], operand[edges][terms], hashes[edges][terms])
        first[twin[differs]] = twin[differs]
    return np.asarray(gates[first])


def _rows_differ(begin: Ints, rows: Ints, others: Ints, *columns: Ints) -> Bools:
    """Whether the segments of pairs of equal length differ in a column."""
    counts = begin[rows + 1] - begin[rows]
    mine, theirs = spread(begin[rows], counts), spread(begin[others], counts)
    unequal = np.zeros(len(mine), dtype=bool)
    for column in columns:
        unequal |= column[mine] != column[theirs]
    differs = np.zeros(len(rows), dtype=bool)
    np.logical_or.at(differs, np.repeat(np.arange(len(rows)), counts), unequal)
    return differs
