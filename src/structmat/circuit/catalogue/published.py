"""Counts of real operations, and the counts of the literature to compare them with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from structmat.circuit.arrays import is_unit, owners
from structmat.circuit.circuit import Circuit, Kind

_SAME = 1e-12
"""Relative difference up to which real and imaginary part of a constant count as equal."""


@dataclass(frozen=True)
class Published:
    """A count of the literature.

    Attributes:
        operations: multiplications and additions together, over the reals where ``real`` says so.
        source: where it is from.
        real: complex operations are counted as real ones.
        record: the fewest that are known, counted in the same way, where that is less and an exact count is published.
        record_source: where that is from.
    """

    operations: int
    source: str
    real: bool = False
    record: int | None = None
    record_source: str = ""

    def compared_with(self, circuit: Circuit) -> float:
        """The circuit's operations over the published ones."""
        own = real_operations(circuit) if self.real else circuit.counts.operations
        return own / self.operations


def real_operations(circuit: Circuit) -> int:
    """Real multiplications and additions of a circuit on complex values.

    An addition is 2; a multiplication by 1, -1, i or -i is free, by another real or imaginary number 2, by a number
    whose parts are equal in size 4, by any other 6, and a product of two values 6.
    """
    inside = circuit.kind[owners(circuit.start)] == Kind.SUM
    weight = circuit.weight[inside].astype(complex)
    unit = is_unit(circuit.weight[inside]) & (circuit.parameter[inside] < 0)
    real, imag = np.abs(weight.real), np.abs(weight.imag)
    size = np.abs(weight)
    tiny = _SAME * size
    axis = (real <= tiny) | (imag <= tiny)
    free = axis & (np.abs(size - 1) <= _SAME) & (circuit.parameter[inside] < 0)
    cost = np.where(axis, 2, np.where(np.abs(real - imag) <= tiny, 4, 6))
    cost[free] = 0
    products = circuit.multiplications - int(np.count_nonzero(~unit))
    return int(cost.sum()) + 2 * circuit.additions + 6 * (products + circuit.counts.divisions)
