"""What makes arrays a circuit, checked whenever one is made."""

from __future__ import annotations

import numpy as np

from structmat.circuit.arrays import owners
from structmat.circuit.circuit import Circuit, Kind
from structmat.errors import CircuitError


def validate(circuit: Circuit) -> None:
    """Refuse what is no circuit: raises :class:`~structmat.errors.CircuitError` with the first place that is wrong."""
    c = circuit
    shapes = {name: getattr(c, name).shape for name in ("kind", "start", "operand", "weight", "parameter", "outputs")}
    if any(len(shape) != 1 for shape in shapes.values()):
        raise CircuitError(f"The arrays of a circuit have one axis each; got shapes {shapes}.")
    if len(c.start) != c.nodes + 1 or c.start[0] != 0 or c.start[-1] != len(c.operand) or np.any(np.diff(c.start) < 0):
        raise CircuitError(
            f"The segments of {c.nodes} nodes over {len(c.operand)} edges must begin at 0, ascend, and end at the last "
            f"edge; got {len(c.start)} entries. Use structmat.circuit.arrays.starts(counts)."
        )
    if not len(c.operand) == len(c.weight) == len(c.parameter):
        raise CircuitError(
            f"Every edge has one operand, weight and parameter; got {len(c.operand)}, {len(c.weight)} and "
            f"{len(c.parameter)}."
        )
    if c.nodes and c.kind.max() > max(Kind):
        raise CircuitError(f"Node {int(c.kind.argmax())} is of kind {int(c.kind.max())}, which does not exist.")
    if np.any(c.kind[: c.in_features] != Kind.INPUT):
        raise CircuitError("The inputs of a circuit are its first nodes. Circuit.from_edges sorts them.")
    _validate_fan_in(c)
    _validate_operands(c)
    if np.any((c.outputs < 0) | (c.outputs >= c.nodes)):
        wrong = c.outputs[(c.outputs < 0) | (c.outputs >= c.nodes)][0]
        raise CircuitError(f"Output node {wrong} does not exist: the circuit has {c.nodes} nodes.")
    if np.any((c.parameter < -1) | (c.parameter >= len(c.values))):
        wrong = c.parameter[(c.parameter < -1) | (c.parameter >= len(c.values))][0]
        raise CircuitError(f"An edge reads parameter {wrong}, but the circuit has {len(c.values)} parameters.")
    if sum(group.size for group in c.groups) != len(c.values):
        raise CircuitError(f"The groups of parameters {c.groups} do not hold {len(c.values)} values together.")
    if len({group.name for group in c.groups}) != len(c.groups):
        raise CircuitError(f"Two groups of parameters have the same name: {[g.name for g in c.groups]}.")


def _validate_fan_in(c: Circuit) -> None:
    fan_in = np.diff(c.start)
    wrong = (
        ((c.kind == Kind.INPUT) & (fan_in != 0))
        | ((c.kind == Kind.CONSTANT) & (fan_in != 1))
        | ((c.kind == Kind.PRODUCT) & (fan_in < 1))
        | ((c.kind == Kind.QUOTIENT) & (fan_in != 2))
    )
    if wrong.any():
        node = int(np.flatnonzero(wrong)[0])
        raise CircuitError(
            f"Node {node} is of kind {Kind(c.kind[node]).name} and has {fan_in[node]} operands. Inputs have none, "
            "constants one edge, products at least one, quotients two."
        )


def _validate_operands(c: Circuit) -> None:
    if not len(c.operand):
        return
    target = owners(c.start)
    late = c.operand >= target
    if late.any():
        edge = int(np.flatnonzero(late)[0])
        node, read = int(target[edge]), int(c.operand[edge])
        if read >= c.nodes:
            raise CircuitError(f"Node {node} reads node {read}, but the circuit has {c.nodes} nodes.")
        raise CircuitError(
            f"Node {node} reads node {read}, which does not come before it: there is a cycle, or the nodes are not "
            "sorted. Circuit.from_edges sorts nodes and finds cycles."
        )
    constant = c.kind[target] == Kind.CONSTANT
    wrong = (c.operand < 0) != constant
    if wrong.any() or c.operand.min() < -1:
        edge = int(np.flatnonzero(wrong | (c.operand < -1))[0])
        raise CircuitError(
            f"Node {target[edge]} reads node {c.operand[edge]}. Operands are nodes from 0 on, and constants have -1."
        )
    weighted = (c.kind[target] == Kind.SUM) | constant
    if not weighted.all():
        wrong = ~weighted & ((c.weight != 1) | (c.parameter >= 0))
        if wrong.any():
            raise CircuitError(
                f"Node {target[np.flatnonzero(wrong)[0]]} is a product or quotient with a weight. Scale it by a sum of "
                "one term."
            )
    if c.weight.dtype.kind in "fc" and not np.isfinite(c.weight).all():
        edge = int(np.flatnonzero(~np.isfinite(c.weight))[0])
        raise CircuitError(f"Node {target[edge]} has the weight {c.weight[edge]}. Weights are finite numbers.")
