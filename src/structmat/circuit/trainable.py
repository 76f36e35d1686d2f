"""Constants that become parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from structmat.circuit.arrays import is_unit, joined, owners
from structmat.circuit.circuit import Circuit, Group, Kind
from structmat.errors import CircuitError


def trainable(circuit: Circuit, *, units: bool = False, tied: bool = False, name: str = "weight") -> Circuit:
    """The circuit whose constants are parameters, at their values: a known algorithm as a starting point for learning.

    Args:
        circuit: any; parameters that it has are kept.
        units: also the weights 1 and -1 of sums. Without them only those constants are trained that cost a
            multiplication.
        tied: equal constants share a parameter.
        name: of the new group.

    Returns:
        A circuit of the same function. Its multiplications are unchanged, or with ``units`` one for each term.

    Raises:
        CircuitError: the circuit already has parameters of this name.
    """
    if any(group.name == name for group in circuit.groups):
        raise CircuitError(f"The circuit already has parameters named {name!r}. Use another name: trainable(name=...).")
    kind = circuit.kind[owners(circuit.start)]
    constant = ((kind == Kind.SUM) | (kind == Kind.CONSTANT)) & (circuit.parameter < 0)
    if not units:
        constant &= (kind == Kind.CONSTANT) | ~is_unit(circuit.weight)
    edges = np.flatnonzero(constant)
    if not len(edges):
        return circuit
    values = circuit.weight[edges]
    place = np.arange(len(edges))
    if tied:
        values, place = np.unique(values, return_inverse=True)
    weight, parameter = circuit.weight.copy(), circuit.parameter.copy()
    weight[edges] = 1
    parameter[edges] = circuit.parameters + place
    return replace(
        circuit,
        weight=weight,
        parameter=parameter,
        values=joined([circuit.values, values]),
        groups=(*circuit.groups, Group(name, (len(values),))),
    )
