"""The linear circuit inside a general one: the terms of degree 1 around a point."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Bools, Numbers, numbers, owners
from structmat.circuit.binary import binary
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.edges import Edges
from structmat.circuit.equality import equal
from structmat.circuit.evaluate import values_of_nodes
from structmat.circuit.fields import Field, PrimeField, Rationals, natural_field
from structmat.circuit.measure import depends_on_inputs
from structmat.circuit.rebuild import from_parts, without_copies
from structmat.circuit.simplify import merge_terms, prune, without_zero_terms
from structmat.errors import CircuitError

_POINTS = 5
"""Points of expansion that are tried, zero first, until no divisor vanishes."""


def linear_part(circuit: Circuit, at: ArrayLike | None = None, field: Field | None = None) -> Circuit:
    """The linear circuit of the derivative at a point: of a linear map, the map itself, whatever the point.

    Each node is expanded as ``v0 + v1`` with the number ``v0`` and the linear form ``v1``: a sum is expanded term by
    term, ``(u w)1 = w0 u1 + u0 w1``, ``(u / w)1 = u1 / w0 - (u0 / w0^2) w1``. Every gate becomes one gate, so neither
    gates nor depth increase. Source: Strassen 1973, "Vermeidung von Divisionen".

    Args:
        circuit: any; of an affine map the constant term is dropped.
        at: (inputs,) the point, zero by default.
        field: the arithmetic of the expansion, as in :meth:`Circuit.evaluate`: integers and fractions stay exact.

    Returns:
        A linear circuit of the same inputs and outputs. Weights of sums keep their parameters; what stems from products
        and quotients is computed with the parameters' current values.

    Cost: one evaluation at the point.

    Raises:
        CircuitError: a division by zero at the point.
    """
    c = prune(circuit)
    if np.any((c.kind == Kind.PRODUCT) & (np.diff(c.start) != 2)):
        c = binary(c)
    varies = depends_on_inputs(c)
    target = owners(c.start)
    moving = (c.operand >= 0) & varies[c.operand]
    edges = Edges()
    kept = np.flatnonzero((c.kind[target] == Kind.SUM) & moving)
    edges.add(target[kept], c.operand[kept], c.weight[kept], c.parameter[kept])
    if np.any((c.kind == Kind.PRODUCT) | (c.kind == Kind.QUOTIENT)):
        _expand(c, edges, moving, *_values(c, at, field))
    kind = np.where(c.kind == Kind.INPUT, Kind.INPUT, Kind.SUM).astype(np.uint8)
    built = edges.joined()
    result = from_parts(kind, *built, outputs=c.outputs, values=c.values, groups=c.groups)
    return prune(without_copies(without_zero_terms(merge_terms(prune(result)))))


def _values(c: Circuit, at: ArrayLike | None, field: Field | None) -> tuple[Numbers, Field]:
    point = np.zeros(c.in_features, np.int64) if at is None else numbers(at)
    if point.shape != (c.in_features,):
        raise CircuitError(f"The point of expansion has shape {point.shape}; the circuit has {c.in_features} inputs.")
    if field is None and all(a.dtype.kind in "iO" for a in (point, c.weight, c.values) if len(a)):
        field = Rationals()
    field = field or natural_field(point, c.weight, c.values)
    try:
        return values_of_nodes(c, point, field), field
    except CircuitError as error:
        if "divides by zero" in str(error):
            fact = str(error).partition(".")[0]
            raise CircuitError(f"There is no expansion at this point: {fact}. Choose another one: at=...") from None
        raise


def _expand(c: Circuit, edges: Edges, moving: Bools, value: Numbers, field: Field) -> None:
    """The edges of products and quotients, whose weights are values at the point."""
    nodes = np.flatnonzero(c.kind == Kind.PRODUCT)
    first, second = c.start[nodes], c.start[nodes] + 1
    for edge, other in ((first, second), (second, first)):
        some = moving[edge]
        edges.add(nodes[some], c.operand[edge[some]], value[c.operand[other[some]]])
    nodes = np.flatnonzero(c.kind == Kind.QUOTIENT)
    above, below = c.start[nodes], c.start[nodes] + 1
    divisor = value[c.operand[below]]
    inverse = field.quotient(field.array(np.ones(len(nodes), dtype=np.int64)), divisor)
    some = moving[above]
    edges.add(nodes[some], c.operand[above[some]], inverse[some])
    some = moving[below]
    edges.add(nodes[some], c.operand[below[some]], field.array(-value[nodes] * inverse)[some])


def linear_circuit(circuit: Circuit) -> Circuit:
    """The linear circuit of a circuit that computes a linear map, by whatever products and constants.

    Raises:
        CircuitError: the circuit computes no linear map.
    """
    if circuit.is_linear:
        return circuit
    simple = circuit.simplify()
    if simple.is_linear:
        return simple
    complex_constants = any(a.dtype.kind == "c" for a in (simple.weight, simple.values))
    for attempt in range(_POINTS):
        point = np.random.default_rng(attempt).integers(-9, 10, circuit.in_features) * (attempt > 0)
        try:
            linear = linear_part(simple, point, None if complex_constants else Rationals())
        except CircuitError as error:
            if "no expansion" not in str(error):
                raise
            continue
        if equal(linear, simple):
            return linear if circuit.weight.dtype == object else _in_type(linear, circuit.weight.dtype)
        break
    if _is_affine(simple, PrimeField()):
        raise CircuitError(
            "A linear map is required, but this one is affine: it is not 0 at 0. Subtract its value there, or give it "
            "an input that is always 1."
        )
    raise CircuitError(
        "A linear map is required, but the function is not linear. Its terms of degree 1 at a point are "
        "linear_part(at=...)."
    )


def _in_type(circuit: Circuit, dtype: np.dtype[Any]) -> Circuit:
    """The weights as floats again, or as integers where all of them are."""
    if dtype.kind == "i" and any(isinstance(w, Fraction) for w in circuit.weight):
        return circuit
    return replace(circuit, weight=circuit.weight.astype(dtype))


def _is_affine(circuit: Circuit, field: PrimeField) -> bool:
    """Whether ``f(x + y) - f(x) - f(y) + f(0)`` vanishes at random points of a prime field."""
    generator = np.random.default_rng(0)
    x, y = field.random((2, circuit.in_features), generator)
    try:
        values = circuit.evaluate(np.stack([(x + y) % field.prime, x, y, 0 * x]), field)
    except CircuitError:
        return False
    return not np.any((values[0] - values[1] - values[2] + values[3]) % field.prime)
