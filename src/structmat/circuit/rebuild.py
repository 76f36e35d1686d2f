"""Making circuits of the nodes of others: keeping some, replacing reads, ordering anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from structmat.circuit.arrays import Bools, Ints, Numbers, owners, spread, starts
from structmat.circuit.circuit import Circuit, Group, Kind


def subset(circuit: Circuit, nodes: Ints) -> Circuit:
    """The circuit of these nodes in this order. All that they read must come before them, all inputs first."""
    place = np.full(circuit.nodes, -1)
    place[nodes] = np.arange(len(nodes))
    counts = np.diff(circuit.start)[nodes]
    edges = spread(circuit.start[nodes], counts)
    read = circuit.operand[edges]
    return replace(
        circuit,
        kind=circuit.kind[nodes],
        start=starts(counts),
        operand=np.where(read >= 0, place[read], -1),
        weight=circuit.weight[edges],
        parameter=circuit.parameter[edges],
        outputs=place[circuit.outputs],
    )


def without_edges(circuit: Circuit, keep: Bools) -> Circuit:
    """The circuit without some edges."""
    counts = np.bincount(owners(circuit.start)[keep], minlength=circuit.nodes)
    return replace(
        circuit,
        start=starts(counts),
        operand=circuit.operand[keep],
        weight=circuit.weight[keep],
        parameter=circuit.parameter[keep],
    )


def from_parts(
    kind: NDArray[np.uint8],
    target: Ints,
    operand: Ints,
    weight: Numbers,
    parameter: Ints,
    outputs: Ints,
    values: Numbers,
    groups: tuple[Group, ...],
) -> Circuit:
    """A circuit of sorted nodes from edges in any order; among the edges of one node their order is kept."""
    order = np.argsort(target, kind="stable")
    return Circuit(
        kind=kind,
        start=starts(np.bincount(target, minlength=len(kind))),
        operand=operand[order],
        weight=weight[order],
        parameter=parameter[order],
        outputs=outputs,
        values=values,
        groups=groups,
    )


def without_copies(circuit: Circuit) -> Circuit:
    """Reads of sums of one term with weight 1 or -1 go to what they copy; copies that remain are outputs.

    Signs move into the weights of the sums that read, so that multiplications and additions are unchanged. Products and
    quotients have no weights: a negation that they read stays. The copies themselves stay too, unread: :func:`prune
    <structmat.circuit.simplify.prune>` removes them.
    """
    first = circuit.start[:-1]
    single = np.flatnonzero((circuit.kind == Kind.SUM) & (np.diff(circuit.start) == 1))
    edge = first[single]
    untrained = circuit.parameter[edge] < 0
    weight = circuit.weight[edge]
    plus = np.asarray(weight == 1, dtype=bool) & untrained
    minus = np.asarray(weight == -1, dtype=bool) & untrained
    if not plus.any() and not minus.any():
        return circuit
    plain, _ = _followed(circuit, single[plus], edge[plus], np.ones(int(plus.sum()), dtype=np.int64))
    either = plus | minus
    signed, sign = _followed(circuit, single[either], edge[either], np.where(plus, 1, -1)[either])
    real = circuit.operand >= 0
    summed = np.repeat(circuit.kind == Kind.SUM, np.diff(circuit.start)) & real
    operand = np.where(real, plain[circuit.operand], -1)
    operand[summed] = signed[circuit.operand[summed]]
    new_weight = circuit.weight.copy()
    flipped = np.flatnonzero(summed)[sign[circuit.operand[summed]] < 0]
    new_weight[flipped] = -new_weight[flipped]
    return replace(circuit, operand=operand, weight=new_weight, outputs=plain[circuit.outputs])


def _followed(circuit: Circuit, copies: Ints, edge: Ints, sign: Ints) -> tuple[Ints, Ints]:
    """What each node is a copy of in the end, and with which sign; by doubling, in log(longest chain) rounds."""
    source = np.arange(circuit.nodes)
    signs = np.ones(circuit.nodes, dtype=np.int64)
    source[copies] = circuit.operand[edge]
    signs[copies] = sign
    while True:
        further = source[source]
        if np.array_equal(further, source):
            return source, signs
        signs = signs * signs[source]
        source = further
