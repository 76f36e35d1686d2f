"""Whether two circuits compute the same function, by evaluation at random points of a prime field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from structmat.circuit.arrays import Ints
from structmat.circuit.circuit import Circuit
from structmat.circuit.fields import LARGEST_PRIME, PrimeField
from structmat.circuit.measure import degrees
from structmat.errors import CircuitError

_ATTEMPTS = 20
"""Draws of a point until no divisor vanishes."""


@dataclass(frozen=True, eq=False)
class Equality:
    """The verdict on two circuits. It is true or false as a condition: ``if equal(a, b): ...``.

    Attributes:
        equal: whether the outputs agreed at all points. ``False`` is certain.
        error_probability: at most how probable it was that different functions agree at all points.
        trials: number of points.
        prime: the arithmetic was modulo this prime.
        degree: bound on the degree of the difference, in inputs and parameters.
        witness: (inputs,) a point where the circuits differ, or None.
    """

    equal: bool
    error_probability: float
    trials: int
    prime: int
    degree: float
    witness: Ints | None = None

    def __bool__(self) -> bool:
        return self.equal


def equal(
    first: Circuit, second: Circuit, *, trials: int = 4, prime: int = LARGEST_PRIME, seed: int | None = None
) -> Equality:
    """Compare two circuits at random points, with random values of their parameters.

    A polynomial of degree ``d`` that is not zero vanishes at a random point with probability at most ``d / prime``
    (Schwartz 1980, Zippel 1979). Constants are taken as the exact numbers that they are, floats as dyadic fractions:
    two circuits whose constants were rounded differently differ.

    Args:
        first: a circuit.
        second: of as many inputs, outputs and parameters; parameters are compared by their numbers.
        trials: number of points; the error probability is ``(d / prime) ** trials``.
        prime: below 2^31. The statement is about the functions modulo this prime: rational functions that differ by
            multiples of it are equal here. Complex constants need a prime 1 modulo 4.
        seed: of the points; None draws others every time, as the statement about probability supposes.

    Raises:
        CircuitError: the numbers of inputs, outputs or parameters differ, a constant has no value modulo the prime, or
            a divisor is zero at every point.
    """
    sizes = [(c.in_features, c.out_features, c.parameters) for c in (first, second)]
    if sizes[0] != sizes[1]:
        raise CircuitError(f"Circuits with {sizes[0]} and {sizes[1]} inputs, outputs and parameters can't be compared.")
    field = PrimeField(prime)
    generator = np.random.default_rng(seed)
    degree = _difference_degree(first, second)
    for _ in range(trials):
        point, results = _at_a_random_point(first, second, field, generator)
        if not np.array_equal(results[0], results[1]):
            return Equality(False, 0.0, trials, prime, degree, point)
    return Equality(True, float(min(1.0, degree / prime) ** trials), trials, prime, degree)


def _difference_degree(first: Circuit, second: Circuit) -> float:
    """The degree of ``p1 q2 - p2 q1`` for the rational functions ``p1 / q1`` and ``p2 / q2`` of each output."""
    above, below = zip(*(degrees(c) for c in (first, second)), strict=True)
    a, b = (above[k][c.outputs] for k, c in enumerate((first, second)))
    p, q = (below[k][c.outputs] for k, c in enumerate((first, second)))
    return float(np.maximum(a + q, b + p).max(initial=0.0))


def _at_a_random_point(
    first: Circuit, second: Circuit, field: PrimeField, generator: np.random.Generator
) -> tuple[Ints, list[Ints]]:
    for _ in range(_ATTEMPTS):
        point = field.random((first.in_features,), generator)
        values = field.random((first.parameters,), generator)
        try:
            return point, [c.evaluate(point, field, parameters=values) for c in (first, second)]
        except CircuitError as error:
            if "divides by zero" not in str(error):
                raise
    raise CircuitError(f"At {_ATTEMPTS} random points a divisor was zero modulo {field.prime}. Try another prime.")
