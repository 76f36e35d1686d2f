"""All partial derivatives by one reversed sweep (Baur and Strassen 1983).

Node ``v`` gets an adjoint: the derivative of the result with respect to the value of ``v``. It is the sum, over the
gates that read ``v``, of their adjoint times the gate's partial derivative:

    t = sum of w_k g_k     w_k * adjoint(t) for g_k
    t = g * h              adjoint(t) * h for g, adjoint(t) * g for h
    t = g / h              r = adjoint(t) / h for g, -r * t for h

At most four operations for each operation of the circuit, so a value and all its derivatives take at most five times
the operations of the value (multiplications, additions, divisions).
"""

from __future__ import annotations

import numpy as np

from structmat.circuit.arrays import Ints, owners
from structmat.circuit.binary import binary
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.edges import Edges
from structmat.circuit.rebuild import from_parts, without_copies
from structmat.circuit.simplify import fold_constants, prune
from structmat.errors import CircuitError


def gradient(circuit: Circuit, *, parameters: bool = False, value: bool = False) -> Circuit:
    """The circuit of all partial derivatives of the single output.

    Args:
        circuit: with one output.
        parameters: also the derivatives with respect to the parameters.
        value: also the output itself.

    Returns:
        A circuit of the same inputs. Outputs: the value if asked for, one derivative for each input, one for each
        parameter if asked for. With ``value`` its operations are at most 5 times those of the circuit.

    Cost: linear in the edges, to build it.

    Source: Baur, Strassen, "The complexity of partial derivatives" (1983).

    Raises:
        CircuitError: there is not exactly one output.
    """
    if circuit.out_features != 1:
        raise CircuitError(
            f"The gradient is of one output; the circuit has {circuit.out_features}. Use vjp(), whose further inputs "
            "weigh the outputs."
        )
    swept = _reversed_sweep(circuit, parameters, value, seeds_are_inputs=False)
    return prune(without_copies(fold_constants(swept)))


def vjp(circuit: Circuit, *, parameters: bool = False, value: bool = False) -> Circuit:
    """The circuit of the vector-Jacobian product ``(x, g) -> J(x)^T g``.

    Args:
        circuit: ``n`` inputs, ``m`` outputs.
        parameters: also the derivatives of ``g . f(x)`` with respect to the parameters.
        value: also the ``m`` outputs ``f(x)`` themselves.

    Returns:
        A circuit of ``n + m`` inputs: ``x``, then ``g``. Outputs: the values if asked for, ``n`` derivatives, and one
        for each parameter if asked for. For a linear circuit the first part is its transpose, which does not read
        ``x``.

    Cost: linear in the edges, to build it.
    """
    return prune(without_copies(_reversed_sweep(circuit, parameters, value, seeds_are_inputs=True)))


def _reversed_sweep(circuit: Circuit, parameters: bool, value: bool, *, seeds_are_inputs: bool) -> Circuit:
    """The sweep before copies and dead gates are dropped."""
    c = prune(circuit)
    if np.any((c.kind == Kind.PRODUCT) & (np.diff(c.start) != 2)):
        c = binary(c)
    n, seeds = c.in_features, c.out_features
    # Numbers of the nodes: inputs, seeds, the other nodes, then the adjoints from the last node to the first, each
    # followed by its two contributions where it is a product or quotient.
    value_of = np.concatenate([np.arange(n), np.arange(n, c.nodes) + seeds])
    has_two = c.kind >= Kind.PRODUCT
    length = np.where(has_two, 3, 1)[::-1]
    adjoint = (c.nodes + seeds + np.cumsum(length) - length)[::-1].copy()
    total = c.nodes + seeds + int(length.sum())
    kind = np.full(total, Kind.SUM, dtype=np.uint8)
    kind[value_of] = c.kind
    kind[n : n + seeds] = Kind.INPUT if seeds_are_inputs else Kind.CONSTANT
    edges = Edges()
    target = owners(c.start)
    edges.add(value_of[target], np.where(c.operand >= 0, value_of[c.operand], -1), c.weight, c.parameter)
    if not seeds_are_inputs:
        edges.add(np.arange(n, n + seeds), np.full(seeds, -1))
    edges.add(adjoint[c.outputs], np.arange(n, n + seeds))
    summed = np.flatnonzero(c.kind[target] == Kind.SUM)
    edges.add(adjoint[c.operand[summed]], adjoint[target[summed]], c.weight[summed], c.parameter[summed])
    _products(c, kind, edges, value_of, adjoint)
    _quotients(c, kind, edges, value_of, adjoint)
    outputs = [value_of[c.outputs]] if value else []
    outputs.append(adjoint[:n])
    if parameters:
        kind, partials = _parameters(c, kind, edges, value_of, adjoint)
        outputs.append(partials)
    built = edges.joined()
    return from_parts(kind, *built, outputs=np.concatenate(outputs), values=c.values, groups=c.groups)


def _products(c: Circuit, kind: np.ndarray, edges: Edges, value_of: Ints, adjoint: Ints) -> None:
    nodes = np.flatnonzero(c.kind == Kind.PRODUCT)
    first, second = c.operand[c.start[nodes]], c.operand[c.start[nodes] + 1]
    for place, own, other in ((1, first, second), (2, second, first)):
        part = adjoint[nodes] + place
        kind[part] = Kind.PRODUCT
        edges.add(part, adjoint[nodes])
        edges.add(part, value_of[other])
        edges.add(adjoint[own], part)


def _quotients(c: Circuit, kind: np.ndarray, edges: Edges, value_of: Ints, adjoint: Ints) -> None:
    nodes = np.flatnonzero(c.kind == Kind.QUOTIENT)
    above, below = c.operand[c.start[nodes]], c.operand[c.start[nodes] + 1]
    ratio, scaled = adjoint[nodes] + 1, adjoint[nodes] + 2
    kind[ratio], kind[scaled] = Kind.QUOTIENT, Kind.PRODUCT
    edges.add(ratio, adjoint[nodes])
    edges.add(ratio, value_of[below])
    edges.add(adjoint[above], ratio)
    edges.add(scaled, ratio)
    edges.add(scaled, value_of[nodes])
    edges.add(adjoint[below], scaled, -np.ones(len(nodes), np.int64))


def _parameters(c: Circuit, kind: np.ndarray, edges: Edges, value_of: Ints, adjoint: Ints) -> tuple[np.ndarray, Ints]:
    """For each parameter the sum of weight * operand * adjoint over its edges; edges of constants have no operand."""
    target = owners(c.start)
    trained = np.flatnonzero((c.parameter >= 0) & (c.operand >= 0))
    part = len(kind) + np.arange(len(trained))
    partial = len(kind) + len(trained) + np.arange(c.parameters)
    edges.add(part, adjoint[target[trained]])
    edges.add(part, value_of[c.operand[trained]])
    edges.add(partial[c.parameter[trained]], part, c.weight[trained])
    constant = np.flatnonzero((c.parameter >= 0) & (c.operand < 0))
    edges.add(partial[c.parameter[constant]], adjoint[target[constant]], c.weight[constant])
    more = np.concatenate([np.full(len(trained), Kind.PRODUCT), np.full(c.parameters, Kind.SUM)])
    return np.concatenate([kind, more.astype(np.uint8)]), partial
