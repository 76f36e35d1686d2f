"""One butterfly factor matrix: independent 2 x 2 blocks on pairs of coordinates a stride apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Bools, Ints, Numbers, exact_product, joined, numbers
from structmat.circuit.fields import Field
from structmat.errors import CircuitError
from structmat.sizes import is_power_of_two


@dataclass(frozen=True, eq=False, repr=False)
class Stage:
    """A butterfly factor matrix of a size that is a power of two.

    Coordinate ``i = (a, b, d)`` in mixed radix, with ``d < stride`` the fast digit and ``b < 2``; the stage computes
    ``y[a, b, d] = sum over c < 2 of weight[a, b, c, d] * x[a, c, d]``. Made by :meth:`of`.

    Attributes:
        size: n, the number of coordinates.
        stride: a power of two below n.
        stored: the 2 n weights, those of 0/1 stages as packed bits: routing makes thousands of them.
        packed: whether they are bits.
    """

    size: int
    stride: int
    stored: Numbers
    packed: bool

    @classmethod
    def of(cls, weight: ArrayLike) -> Stage:
        """The stage with these weights, (n / (2 stride), 2, 2, stride).

        Raises:
            CircuitError: the shape is another one, or n or the stride is no power of two.
        """
        array = np.asarray(weight)
        if array.ndim != 4 or array.shape[1:3] != (2, 2) or not all(map(is_power_of_two, array.shape)):
            raise CircuitError(
                "The weights of a butterfly stage have shape (n / (2 s), 2, 2, s) with powers of two; got "
                f"{array.shape}."
            )
        size, stride = array.size // 2, array.shape[3]
        if array.dtype.kind == "b" or (array.dtype.kind in "iu" and not np.any((array != 0) & (array != 1))):
            return cls(size, stride, np.packbits(array.astype(np.uint8).ravel()), True)
        return cls(size, stride, numbers(array), False)

    @classmethod
    def identity(cls, size: int, stride: int) -> Stage:
        """The identity."""
        return cls.switches(np.zeros((size // (2 * stride), stride), dtype=np.bool_))

    @classmethod
    def switches(cls, crossed: Bools) -> Stage:
        """Pairs that are exchanged where ``crossed`` (n / (2 stride), stride), and passed on elsewhere."""
        straight = ~crossed
        return cls.of(np.stack([np.stack([straight, crossed], 1), np.stack([crossed, straight], 1)], 1))

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(n / (2 stride), 2, 2, stride)."""
        return self.size // (2 * self.stride), 2, 2, self.stride

    @property
    def pattern(self) -> tuple[int, int, int, int]:
        """(a, b, c, d) of the contraction that it is: the shape."""
        a, _, _, d = self.shape
        return a, 2, 2, d

    @property
    def weight(self) -> Numbers:
        """The weights in their shape; a 0/1 stage has them as int64."""
        if not self.packed:
            return self.stored
        bits = np.unpackbits(self.stored, count=2 * self.size)
        return bits.reshape(self.shape).astype(np.int64)

    @property
    def is_identity(self) -> bool:
        """Whether it is the identity matrix."""
        weight = np.unpackbits(self.stored, count=2 * self.size).reshape(self.shape) if self.packed else self.stored
        diagonal = np.all(weight[:, 0, 0] == 1) and np.all(weight[:, 1, 1] == 1)
        return bool(diagonal and not np.any(weight[:, 0, 1] != 0) and not np.any(weight[:, 1, 0] != 0))

    @property
    def nonzeros(self) -> int:
        """Number of weights that are not zero."""
        if self.packed:
            return int(np.unpackbits(self.stored, count=2 * self.size).sum())
        return int(np.count_nonzero(self.stored))

    def rows(self) -> tuple[Ints, Numbers]:
        """What each coordinate reads: two coordinates and their weights, both (n, 2)."""
        blocks, _, _, stride = self.shape
        index = np.arange(self.size).reshape(blocks, 1, 2, stride)
        operand = np.broadcast_to(index, self.shape).transpose(0, 1, 3, 2).reshape(self.size, 2)
        return operand, self.weight.transpose(0, 1, 3, 2).reshape(self.size, 2)

    def apply(self, values: Numbers, field: Field) -> Numbers:
        """The stage times values (n, batch) of the field."""
        operand, weight = self.rows()
        start = np.arange(0, 2 * self.size + 1, 2)
        return field.weighted_sum(values, start, operand.ravel(), field.array(weight.ravel()))

    def transpose(self) -> Stage:
        """The transposed matrix, of the same stride."""
        return Stage.of(self.weight.transpose(0, 2, 1, 3))

    def after(self, first: Stage) -> Stage:
        """The product ``self @ first`` of two stages of one stride."""
        if first.shape != self.shape:
            raise CircuitError(f"Stages of shapes {self.shape} and {first.shape} have no stage as their product.")
        late, early = self.weight, first.weight
        terms = [exact_product(late[:, :, c, None], early[:, None, c]) for c in range(2)]
        return Stage.of(np.asarray(terms[0] + terms[1]))

    def columns_scaled(self, scale: Numbers) -> Stage:
        """The product with a diagonal matrix on the right, which is a stage again; ``scale`` is (n,)."""
        blocks, _, _, stride = self.shape
        return Stage.of(exact_product(self.weight, numbers(scale).reshape(blocks, 1, 2, stride)))

    def inverse(self, field: Field) -> Stage:
        """The inverse in a field, block by block.

        Raises:
            CircuitError: a block is singular.
        """
        w = field.array(self.weight)
        w00, w01, w10, w11 = w[:, 0, 0], w[:, 0, 1], w[:, 1, 0], w[:, 1, 1]
        minus = field.array(np.array([-1]))
        terms = np.stack([w00 * w11, field.array(w01 * w10) * minus[0]])
        determinant = field.array(terms[0] + field.array(terms[1]))
        try:
            over = field.quotient(field.array(np.ones(determinant.shape, dtype=np.int64)), determinant)
        except ZeroDivisionError as error:
            raise CircuitError(
                f"A butterfly stage of stride {self.stride} has a singular 2 x 2 block, so there is no inverse by "
                "stages. Only a product of invertible blocks is inverted."
            ) from error
        negative = field.array(over * minus[0])
        first = np.stack([over * w11, negative * w01], 1)
        second = np.stack([negative * w10, over * w00], 1)
        return Stage.of(field.array(np.stack([first, second], 1)))

    def bit_reversed(self) -> Stage:
        """``R @ self @ R`` for the bit reversal R: a stage of stride n / (2 stride)."""
        blocks, _, _, stride = self.shape
        weight = self.weight[bit_reversal(blocks)][..., bit_reversal(stride)]
        return Stage.of(weight.transpose(3, 1, 2, 0))

    def padded(self, size: int) -> Stage:
        """The block-diagonal matrix of the stage and the identity, of a larger size."""
        blocks = (size - self.size) // (2 * self.stride)
        if not blocks:
            return self
        rest = np.zeros((blocks, 2, 2, self.stride), dtype=np.int64)
        rest[:, 0, 0] = rest[:, 1, 1] = 1
        weight = self.weight
        return Stage.of(joined([weight.ravel(), rest.ravel()]).reshape(-1, 2, 2, self.stride))

    def __repr__(self) -> str:
        return f"<Stage: size {self.size}, stride {self.stride}>"


def bit_reversal(size: int) -> Ints:
    """Every index below a power of two with its bits in reverse order."""
    result = np.zeros(1, dtype=np.int64)
    while len(result) < size:
        result = np.concatenate([2 * result, 2 * result + 1])
    return result
