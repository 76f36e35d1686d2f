"""Products of Monarch matrices: the same constructions in any size ``n = k b``, with 3 factors in place of 2 log2(n).

A Monarch matrix M multiplies inside k blocks of size b, then across the blocks; a transposed one the other way. Since
every butterfly matrix is a Monarch matrix, so is what is made of them; the constructions here are direct, and need no
power of two. Source: Dao et al., "Monarch" (arXiv 2204.00595), section 3 and the appendix on expressiveness.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Ints, Numbers, exact_product, joined, numbers, owners, starts
from structmat.circuit.fields import Field, natural_field
from structmat.circuit.kaleidoscope.columns import columns_of, rows_of
from structmat.circuit.kaleidoscope.cycles import in_cycle
from structmat.errors import CircuitError


@dataclass(frozen=True, eq=False, repr=False)
class MonarchStage:
    """One factor of size n = k b: dense blocks of size b, or dense k x k matrices across them.

    Coordinate ``i = (c, d)`` with ``d < b`` the fast digit. Across the blocks, pattern (1, k, k, b), coordinates of one
    d are mixed; within them, pattern (k, b, b, 1), coordinates of one c. Stored are the entries that are not zero.

    Attributes:
        size: n.
        block: b, which divides n.
        across: which of the two.
        start: (n + 1,) segments of the entries of each row; no row is empty.
        operand: (entries,) which coordinate is read.
        value: (entries,) numbers.

    Raises:
        CircuitError: an entry is outside of the pattern.
    """

    size: int
    block: int
    across: bool
    start: Ints
    operand: Ints
    value: Numbers

    @classmethod
    def of_entries(
        cls, size: int, block: int, across: bool, row: Ints, column: Ints, value: ArrayLike = 1
    ) -> MonarchStage:
        """The stage with these entries, no two in one place."""
        if block < 1 or size % block or np.any((row - column) % block if across else row // block != column // block):
            raise CircuitError(
                f"An entry is outside of the pattern of a Monarch factor of size {size} with blocks of {block} "
                f"{'across' if across else 'within'} the blocks."
            )
        empty = np.ones(size, dtype=np.bool_)
        empty[row] = False
        zero = np.flatnonzero(empty)
        given = numbers(np.broadcast_to(numbers(value), row.shape))
        row, column = np.concatenate([row, zero]), np.concatenate([column, zero])
        every = joined([given, np.zeros(len(zero), dtype=np.int64)])
        order = np.lexsort((column, row))
        start = starts(np.bincount(row, minlength=size))
        return cls(size, block, across, start, column[order], every[order])

    @classmethod
    def identity(cls, size: int, block: int, across: bool) -> MonarchStage:
        """The identity."""
        return cls.of_entries(size, block, across, np.arange(size), np.arange(size))

    @property
    def pattern(self) -> tuple[int, int, int, int]:
        """(a, b, c, d) of the dense weights."""
        blocks = self.size // self.block
        return (1, blocks, blocks, self.block) if self.across else (blocks, self.block, self.block, 1)

    @cached_property
    def weight(self) -> Numbers:
        """The dense weights, of shape :attr:`pattern`."""
        a, b, c, d = self.pattern
        weight = np.zeros((a, b, c, d), dtype=self.value.dtype)
        row = owners(self.start)
        weight[row // (b * d), row // d % b, self.operand // d % c, row % d] = self.value
        return weight

    @property
    def parameters(self) -> int:
        """Numbers of the dense weights."""
        return math.prod(self.pattern)

    @property
    def is_identity(self) -> bool:
        """Whether it is the identity matrix."""
        kept = self.value != 0
        return bool(
            int(kept.sum()) == self.size
            and np.array_equal(owners(self.start)[kept], self.operand[kept])
            and np.all(self.value[kept] == 1)
        )

    def apply(self, values: Numbers, field: Field) -> Numbers:
        """The stage times values (n, batch) of the field."""
        return field.weighted_sum(values, self.start, self.operand, field.array(self.value))

    def transpose(self) -> MonarchStage:
        """The transposed matrix, of the same kind."""
        kept = self.value != 0
        row = owners(self.start)[kept]
        return MonarchStage.of_entries(self.size, self.block, self.across, self.operand[kept], row, self.value[kept])

    def columns_scaled(self, scale: Numbers) -> MonarchStage:
        """The product with a diagonal matrix on the right; ``scale`` is (n,)."""
        value = exact_product(self.value, numbers(scale)[self.operand])
        return MonarchStage(self.size, self.block, self.across, self.start, self.operand, value)

    def __repr__(self) -> str:
        return f"<MonarchStage: pattern {self.pattern}>"


@dataclass(frozen=True, eq=False, repr=False)
class MonarchProduct:
    """``S_out E S_in^T`` with E in ``(M M*)^width`` of size ``size``: inputs padded with zeros, outputs cropped.

    Attributes:
        size: n.
        block: b, which divides n.
        stages: in order of application, ``width`` times across, within (M*, applied first), within, across (M).
        in_features: number of inputs, at most ``size``.
        out_features: number of outputs, at most ``size``.

    Raises:
        CircuitError: the stages have other sizes or another order, or the features do not fit.
    """

    size: int
    block: int
    stages: tuple[MonarchStage, ...]
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        kinds = tuple(stage.across for stage in self.stages)
        fits = all((stage.size, stage.block) == (self.size, self.block) for stage in self.stages)
        if not fits or kinds != _CYCLE * (len(kinds) // len(_CYCLE)):
            raise CircuitError(
                f"A Monarch product of size {self.size} with blocks of {self.block} repeats factors of that size "
                "across, within, within and across the blocks. MonarchProduct.packed fills the gaps with identities."
            )
        if not (0 <= self.in_features <= self.size and 0 <= self.out_features <= self.size):
            raise CircuitError(
                f"{self.in_features} inputs and {self.out_features} outputs do not fit size {self.size}."
            )

    @classmethod
    def packed(
        cls,
        size: int,
        block: int,
        stages: Iterable[MonarchStage],
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> MonarchProduct:
        """The product of any stages, with identities between them so that the kinds are as they must be."""
        rest = {across: MonarchStage.identity(size, block, across) for across in (False, True)}
        filled = in_cycle(stages, lambda stage: stage.across, _CYCLE, rest)
        inputs, outputs = (size if given is None else given for given in (in_features, out_features))
        return cls(size, block, filled, inputs, outputs)

    @property
    def width(self) -> int:
        """Number of factors M M*."""
        return len(self.stages) // len(_CYCLE)

    @property
    def expansion(self) -> float:
        """The size over the larger number of features."""
        return self.size / max(self.in_features, self.out_features, 1)

    @property
    def parameters(self) -> int:
        """Numbers of the dense weights, ``2 width (n b + n^2 / b)``."""
        return sum(stage.parameters for stage in self.stages)

    @property
    def flops(self) -> int:
        """Real operations of a product with a vector."""
        return 2 * self.parameters - len(self.stages) * self.size

    def multiply(self, x: ArrayLike, field: Field | None = None) -> Numbers:
        """The matrix times one vector (inputs,) or a batch of rows (batch, inputs), in any field.

        Raises:
            CircuitError: the shape is wrong, or a number is not in the field.
        """
        array = numbers(x)
        columns = columns_of(array, self.in_features, self.size)
        chosen = natural_field(array, *(stage.value for stage in self.stages)) if field is None else field
        values = np.ascontiguousarray(chosen.array(columns))
        for stage in self.stages:
            values = stage.apply(values, chosen)
        return rows_of(values, self.out_features, array)

    def to_dense(self, field: Field | None = None) -> Numbers:
        """The matrix (outputs, inputs)."""
        return self.multiply(np.eye(self.in_features, dtype=np.int64), field).T

    def transpose(self) -> MonarchProduct:
        """The transposed matrix, of the same width."""
        stages = tuple(stage.transpose() for stage in reversed(self.stages))
        return MonarchProduct(self.size, self.block, stages, self.out_features, self.in_features)

    @property
    def T(self) -> MonarchProduct:
        """The transpose."""
        return self.transpose()

    def __matmul__(self, first: MonarchProduct) -> MonarchProduct:
        """The product; the right one is applied first. The widths add.

        Raises:
            CircuitError: the sizes, blocks or features do not fit.
        """
        if (first.size, first.block, first.out_features) != (self.size, self.block, self.in_features):
            raise CircuitError(
                f"A Monarch product of size {self.size}, blocks of {self.block} and {self.in_features} inputs can't "
                f"follow one of size {first.size}, blocks of {first.block} and {first.out_features} outputs."
            )
        late = self.stages
        if late and self.in_features < self.size:
            keep = (np.arange(self.size) < self.in_features).astype(np.int64)
            late = (late[0].columns_scaled(keep), *late[1:])
        return MonarchProduct(self.size, self.block, first.stages + late, first.in_features, self.out_features)

    def __repr__(self) -> str:
        return (
            f"<MonarchProduct: {self.in_features} inputs, {self.out_features} outputs, width {self.width}, "
            f"size {self.size}, block {self.block}>"
        )


_CYCLE = (True, False, False, True)
