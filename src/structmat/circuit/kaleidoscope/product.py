"""Products of butterfly factor matrices: the common value of all constructions here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Numbers, joined, numbers, starts
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.fields import Field, natural_field
from structmat.circuit.kaleidoscope.columns import columns_of, rows_of
from structmat.circuit.kaleidoscope.stage import Stage
from structmat.errors import CircuitError


@dataclass(frozen=True, eq=False, repr=False)
class ButterflyProduct:
    """A product of stages of one size, in the order in which they are applied.

    Attributes:
        size: n, a power of two, at least 2.
        stages: of any strides; those of a butterfly matrix (class B) have strides 1, 2, .., n / 2, those of a
            transposed one (class B*) n / 2, .., 2, 1.

    Raises:
        CircuitError: a stage has another size.
    """

    size: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if stage.size != self.size:
                raise CircuitError(f"A product of size {self.size} can't hold a stage of size {stage.size}.")

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides in order of application."""
        return tuple(stage.stride for stage in self.stages)

    @property
    def parameters(self) -> int:
        """Stored numbers: 2 n for each stage."""
        return 2 * self.size * len(self.stages)

    @property
    def nonzeros(self) -> int:
        """How many of them are not zero."""
        return sum(stage.nonzeros for stage in self.stages)

    @property
    def flops(self) -> int:
        """Real operations of a product with a vector: 3 n for each stage."""
        return 3 * self.size * len(self.stages)

    def multiply(self, x: ArrayLike, field: Field | None = None) -> Numbers:
        """The matrix times one vector (n,) or a batch of rows (batch, n).

        Args:
            x: numbers.
            field: the arithmetic; None for that of the numbers: floating point, complex where one is, and rationals
                where ``x`` or a weight is an object.

        Cost: two multiply-adds for each coordinate, stage and vector.

        Raises:
            CircuitError: the shape is wrong, or a number is not in the field.
        """
        array = numbers(x)
        columns = columns_of(array, self.size, self.size)
        return rows_of(run(self.stages, columns, self.field(array) if field is None else field), self.size, array)

    def to_dense(self, field: Field | None = None) -> Numbers:
        """The matrix (n, n)."""
        return self.multiply(np.eye(self.size, dtype=np.int64), field).T

    def field(self, *others: Numbers) -> Field:
        """The field that fits the weights and other numbers."""
        return natural_field(*others, *(stage.stored for stage in self.stages if not stage.packed))

    def transpose(self) -> ButterflyProduct:
        """The transposed matrix: the transposed stages in reverse order. B and B* are exchanged."""
        return ButterflyProduct(self.size, tuple(stage.transpose() for stage in reversed(self.stages)))

    @property
    def T(self) -> ButterflyProduct:
        """The transpose."""
        return self.transpose()

    def inverse(self, field: Field | None = None) -> ButterflyProduct:
        """The inverse matrix by inverse stages in reverse order.

        Raises:
            CircuitError: a 2 x 2 block of a stage is singular.
        """
        chosen = self.field() if field is None else field
        return ButterflyProduct(self.size, tuple(stage.inverse(chosen) for stage in reversed(self.stages)))

    def __matmul__(self, first: ButterflyProduct) -> ButterflyProduct:
        """The product of two matrices of one size; the right one is applied first."""
        return ButterflyProduct(self.size, first.stages + self.stages)

    def merged(self) -> ButterflyProduct:
        """The same matrix with neighboring stages of one stride multiplied."""
        result: list[Stage] = []
        for stage in self.stages:
            if result and result[-1].stride == stage.stride:
                result[-1] = stage.after(result[-1])
            else:
                result.append(stage)
        return ButterflyProduct(self.size, tuple(result))

    def padded(self, size: int) -> ButterflyProduct:
        """The block-diagonal matrix with the identity, of a larger size; no stages are added."""
        return ButterflyProduct(size, tuple(stage.padded(size) for stage in self.stages))

    def circuit(self) -> Circuit:
        """The product as a linear circuit: copies and zeros cost no gates."""
        return stages_circuit(self.stages, self.size, self.size, self.size)

    def __repr__(self) -> str:
        return f"<ButterflyProduct: size {self.size}, {len(self.stages)} stages>"


def run(stages: Iterable[Stage], columns: Numbers, field: Field) -> Numbers:
    """Stages applied one after the other to columns (n, batch)."""
    values = np.ascontiguousarray(field.array(columns))
    for stage in stages:
        values = stage.apply(values, field)
    return values


def stages_circuit(stages: Iterable[Stage], size: int, in_features: int, out_features: int) -> Circuit:
    """The circuit of stages on coordinates of which the first are the inputs, the others zero.

    A row with the single weight 1 is a copy and makes no gate, nor does a row of zeros: one empty sum serves for all.
    """
    zero = in_features
    held = np.concatenate([np.arange(in_features), np.full(size - in_features, zero)])
    nodes = in_features + 1
    counts, operands, weights = [np.zeros(in_features + 1, dtype=np.int64)], [], []
    for stage in stages:
        operand, weight = stage.rows()
        read = held[operand]
        kept = (weight != 0) & (read != zero)
        terms = kept.sum(axis=1)
        first = np.where(kept[:, 0], 0, 1)
        every = np.arange(size)
        copies = (terms == 1) & (weight[every, first] == 1)
        gates = (terms > 0) & ~copies
        held = np.where(copies, read[every, first], zero)
        made = int(gates.sum())
        held[gates] = nodes + np.arange(made)
        nodes += made
        counts.append(terms[gates])
        inside = kept & gates[:, None]
        operands.append(read[inside])
        weights.append(weight[inside])
    start = starts(np.concatenate(counts))
    return Circuit(
        kind=np.concatenate([np.full(in_features, Kind.INPUT), np.full(nodes - in_features, Kind.SUM)]),
        start=start,
        operand=np.concatenate(operands) if operands else np.zeros(0, dtype=np.int64),
        weight=joined(weights),
        parameter=np.full(int(start[-1]), -1),
        outputs=held[:out_features],
    )
