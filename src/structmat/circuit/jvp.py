"""The Jacobian-vector product: forward differentiation as a circuit."""

from __future__ import annotations

import numpy as np

from structmat.circuit.arrays import owners
from structmat.circuit.binary import binary
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.edges import Edges
from structmat.circuit.measure import depends_on_inputs
from structmat.circuit.rebuild import from_parts, without_copies
from structmat.circuit.simplify import prune


def jvp(circuit: Circuit, *, value: bool = False) -> Circuit:
    """The circuit of ``(x, v) -> J(x) v``.

    Every node ``g`` gets a derivative ``g'`` along ``v``: sums term by term, products ``(g h)' = g' h + g h'``, and
    quotients ``(g / h)' = (g' - (g / h) h') / h``. At most three further operations for each product and quotient.

    Args:
        circuit: ``n`` inputs, ``m`` outputs.
        value: also the ``m`` outputs ``f(x)``, first.

    Returns:
        A circuit of ``2 n`` inputs: ``x``, then ``v``. For a linear circuit it is that circuit applied to ``v``.

    Cost: linear in the edges, to build it.
    """
    c = prune(circuit)
    if np.any((c.kind == Kind.PRODUCT) & (np.diff(c.start) != 2)):
        c = binary(c)
    n = c.in_features
    varies = depends_on_inputs(c)
    # Each gate is followed by its derivative, which two helpers precede: values, helper, helper, derivative.
    length = np.where(c.kind >= Kind.PRODUCT, 4, 2)
    length[c.kind == Kind.CONSTANT] = 1
    length[:n] = 2
    begin = np.cumsum(length) - length
    value_of, slope = begin.copy(), begin + length - 1
    value_of[:n], slope[:n] = np.arange(n), np.arange(n, 2 * n)
    kind = np.full(int(length.sum()), Kind.SUM, dtype=np.uint8)
    kind[value_of], kind[slope[:n]] = c.kind, Kind.INPUT
    edges = Edges()
    target = owners(c.start)
    edges.add(value_of[target], np.where(c.operand >= 0, value_of[c.operand], -1), c.weight, c.parameter)
    moving = (c.operand >= 0) & varies[c.operand]
    summed = np.flatnonzero((c.kind[target] == Kind.SUM) & moving)
    edges.add(slope[target[summed]], slope[c.operand[summed]], c.weight[summed], c.parameter[summed])

    nodes = np.flatnonzero(c.kind == Kind.PRODUCT)
    first, second = c.operand[c.start[nodes]], c.operand[c.start[nodes] + 1]
    for place, own, other in ((1, first, second), (2, second, first)):
        some = varies[own]
        part = (begin[nodes] + place)[some]
        kind[part] = Kind.PRODUCT
        edges.add(part, slope[own[some]])
        edges.add(part, value_of[other[some]])
        edges.add(slope[nodes[some]], part)

    nodes = np.flatnonzero(c.kind == Kind.QUOTIENT)
    above, below = c.operand[c.start[nodes]], c.operand[c.start[nodes] + 1]
    helper, numerator = begin[nodes] + 1, begin[nodes] + 2
    some = varies[below]
    kind[helper[some]] = Kind.PRODUCT
    edges.add(helper[some], value_of[nodes[some]])
    edges.add(helper[some], slope[below[some]])
    edges.add(numerator[some], helper[some], -np.ones(int(some.sum()), np.int64))
    some = varies[above]
    edges.add(numerator[some], slope[above[some]])
    some = varies[nodes]
    kind[slope[nodes[some]]] = Kind.QUOTIENT
    edges.add(slope[nodes[some]], numerator[some])
    edges.add(slope[nodes[some]], value_of[below[some]])

    # The derivative of a constant is the empty sum, an output only where an output does not vary.
    slope[~varies] = len(kind)
    kind = np.append(kind, np.uint8(Kind.SUM))
    outputs = [value_of[c.outputs]] if value else []
    built = edges.joined()
    result = from_parts(
        kind, *built, outputs=np.concatenate([*outputs, slope[c.outputs]]), values=c.values, groups=c.groups
    )
    return prune(without_copies(result))
