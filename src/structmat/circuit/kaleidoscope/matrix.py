"""Kaleidoscope matrices: the corner of a product of w pairs of butterfly matrices, ``(B B*)^w`` with an expansion.

Source: Dao et al., "Kaleidoscope: an efficient, learnable representation for all structured linear maps"
(arXiv 2012.14966), definitions 2.1 to 2.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Numbers, numbers
from structmat.circuit.circuit import Circuit
from structmat.circuit.fields import Field
from structmat.circuit.kaleidoscope.columns import columns_of, rows_of
from structmat.circuit.kaleidoscope.cycles import in_cycle
from structmat.circuit.kaleidoscope.product import ButterflyProduct, run, stages_circuit
from structmat.circuit.kaleidoscope.stage import Stage
from structmat.errors import CircuitError
from structmat.sizes import power_of_two


@dataclass(frozen=True, eq=False, repr=False)
class Kaleidoscope:
    """``S_out E S_in^T`` with E in ``(B B*)^width`` of size ``size``: inputs padded with zeros, outputs cropped.

    Attributes:
        product: E: ``width`` times the strides size / 2, .., 1 (B*, applied first) and 1, .., size / 2 (B).
        in_features: number of inputs, at most ``size``.
        out_features: number of outputs, at most ``size``.

    Raises:
        CircuitError: the strides are others, or the features do not fit.
    """

    product: ButterflyProduct
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        cycle = _cycle(self.size)
        if len(self.product.stages) % len(cycle) or self.product.strides != cycle * self.width:
            raise CircuitError(
                f"A kaleidoscope matrix of size {self.size} repeats the strides {cycle}; got {self.product.strides}. "
                "Kaleidoscope.packed fills the gaps with identities."
            )
        if not (0 <= self.in_features <= self.size and 0 <= self.out_features <= self.size):
            raise CircuitError(
                f"{self.in_features} inputs and {self.out_features} outputs do not fit size {self.size}."
            )

    @classmethod
    def packed(cls, size: int, stages: Iterable[Stage], in_features: int, out_features: int) -> Kaleidoscope:
        """The product of any stages, with identity stages between them so that the strides are as they must be.

        The least width for the given stages in their order.
        """
        cycle = _cycle(size)
        rest = {stride: Stage.identity(size, stride) for stride in set(cycle)}
        filled = in_cycle(stages, lambda stage: stage.stride, cycle, rest)
        return cls(ButterflyProduct(size, filled), in_features, out_features)

    @property
    def size(self) -> int:
        """Size of the butterfly matrices, a power of two."""
        return self.product.size

    @property
    def width(self) -> int:
        """Number of factors B B*."""
        return len(self.product.stages) // len(_cycle(self.size))

    @property
    def expansion(self) -> float:
        """The size over the larger number of features."""
        return self.size / max(self.in_features, self.out_features, 1)

    @property
    def parameters(self) -> int:
        """Stored numbers, ``4 width size log2(size)``, the fixed zeros and ones of this matrix included."""
        return self.product.parameters

    @property
    def merged_parameters(self) -> int:
        """The same when neighboring stages of one stride are multiplied, ``2 size (width (2 log2(size) - 2) + 1)``."""
        strides = self.product.strides
        return 2 * self.size * sum(1 for i, stride in enumerate(strides) if i == 0 or strides[i - 1] != stride)

    @property
    def flops(self) -> int:
        """Real operations of a product with a vector, ``6 width size log2(size)``."""
        return self.product.flops

    def multiply(self, x: ArrayLike, field: Field | None = None) -> Numbers:
        """The matrix times one vector (inputs,) or a batch of rows (batch, inputs), in any field.

        Raises:
            CircuitError: the shape is wrong, or a number is not in the field.
        """
        array = numbers(x)
        columns = columns_of(array, self.in_features, self.size)
        chosen = self.product.field(array) if field is None else field
        return rows_of(run(self.product.stages, columns, chosen), self.out_features, array)

    def to_dense(self, field: Field | None = None) -> Numbers:
        """The matrix (outputs, inputs)."""
        return self.multiply(np.eye(self.in_features, dtype=np.int64), field).T

    def transpose(self) -> Kaleidoscope:
        """The transposed matrix, of the same width."""
        return Kaleidoscope(self.product.transpose(), self.out_features, self.in_features)

    @property
    def T(self) -> Kaleidoscope:
        """The transpose."""
        return self.transpose()

    def inverse(self, field: Field | None = None) -> Kaleidoscope:
        """The inverse, of the same width, of a matrix that is not a corner of a larger one.

        Raises:
            CircuitError: the features are not the size, or a 2 x 2 block of a stage is singular.
        """
        if not self.in_features == self.out_features == self.size:
            raise CircuitError(
                f"Only a whole product is inverted by its stages: size {self.size}, but {self.in_features} inputs and "
                f"{self.out_features} outputs."
            )
        return Kaleidoscope(self.product.inverse(field), self.size, self.size)

    def expanded(self, size: int) -> Kaleidoscope:
        """The same matrix as a corner of a larger size: identity stages are added outside.

        Raises:
            CircuitError: the size is smaller.
        """
        if size < self.size:
            raise CircuitError(f"A matrix of size {self.size} can't be expanded to {size}.")
        if size == self.size:
            return self
        padded = self.product.padded(power_of_two(size))
        # A wide matrix keeps its width: the larger strides go before B* and after B.
        return Kaleidoscope.packed(padded.size, padded.stages, self.in_features, self.out_features)

    def __matmul__(self, first: Kaleidoscope) -> Kaleidoscope:
        """The product; the right one is applied first. The widths add.

        What the first matrix leaves beyond its outputs is set to zero by a diagonal, which a stage absorbs.

        Raises:
            CircuitError: the features do not fit.
        """
        if first.out_features != self.in_features:
            raise CircuitError(
                f"A matrix of {self.in_features} inputs can't follow one of {first.out_features} outputs."
            )
        size = max(self.size, first.size)
        early, late = first.expanded(size).product.stages, self.expanded(size).product.stages
        if late:
            keep = (np.arange(size) < self.in_features).astype(np.int64)
            late = (late[0].columns_scaled(keep), *late[1:])
        return Kaleidoscope(ButterflyProduct(size, early + late), first.in_features, self.out_features)

    def circuit(self) -> Circuit:
        """The matrix as a linear circuit: copies and zeros cost no gates."""
        return stages_circuit(self.product.stages, self.size, self.in_features, self.out_features)

    def __repr__(self) -> str:
        return (
            f"<Kaleidoscope: {self.in_features} inputs, {self.out_features} outputs, width {self.width}, "
            f"size {self.size}>"
        )


def _cycle(size: int) -> tuple[int, ...]:
    up = tuple(1 << level for level in range(size.bit_length() - 1))
    return (*reversed(up), *up)
