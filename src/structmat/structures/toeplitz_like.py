"""Toeplitz-like matrices: small displacement rank under the operators of Toeplitz matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from structmat.displacement.form import CauchyForm, Side
from structmat.program import Chain, Program, convolution
from structmat.projection.displacement import finished, toeplitz_like_generators
from structmat.projection.target import Fit, Target
from structmat.structure import (
    DENSE_GAIN,
    Normal,
    ParameterSpec,
    Shape,
    whole,
)
from structmat.structures.generators import OfDisplacementRank

if TYPE_CHECKING:
    from structmat.matrix import StructuredMatrix


@final
@dataclass(frozen=True)
class ToeplitzLike(OfDisplacementRank):
    """``sum of Z_1(left[i]) Z_-1(right[i])``: products of a circulant and a skew-circulant matrix, ``rank`` of them.

    All matrices whose displacement under ``(Z_1, Z_-1)`` has at most that rank: 2 holds the Toeplitz matrices and their
    inverses, 4 the products of two. ``left`` and ``right`` are (rank, p) with ``p = max(out, in)``; a rectangle keeps
    the upper left corner. ``2 p rank`` parameters; products by ``2 rank + 2`` Fourier transforms, for small sizes with
    the factors written out. Projection: truncated SVD of the displacement, exact for members, then refined; with a
    lower bound. ``solve`` by elimination on the generators.
    Source: Sindhwani, Sainath and Kumar (NeurIPS 2015); Golub and Van Loan, section 12.1.

    Args:
        rank: the displacement rank, or a fraction of the dense parameter count.
    """

    rank: int | float = 2

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        rank, size = whole(self.rank), max(shape)
        return {
            "left": ParameterSpec((rank, size), Normal((DENSE_GAIN / (rank * size)) ** 0.5)),
            "right": ParameterSpec((rank, size), Normal(shape[1] ** -0.5)),
        }

    def program(self, shape: Shape) -> Program:
        return _program(whole(self.rank), shape)

    def project(self, target: Target) -> Fit:
        rank = whole(self.rank)
        found = toeplitz_like_generators(target.weight, rank)
        tensors = {"left": found.left, "right": found.right}
        method = "truncated SVD of the displacement"
        return finished(_program(rank, target.native), tensors, "left", target, found.tail / 2, method)

    def inversion(self, matrix: StructuredMatrix) -> CauchyForm:
        left, right = matrix.tensors["left"], matrix.tensors["right"]
        return CauchyForm(Side.SHIFT, Side.TWISTED, left.T, 2 * right.flip(1).T)

    @classmethod
    def numbers(cls, rank: int, shape: Shape) -> int:
        return 2 * rank * max(shape)


def _program(rank: int, shape: Shape) -> Program:
    size = max(shape)
    first = convolution("right", rank, 1, size, shape[1], twist=-1.0, period=size)
    return Chain((first, convolution("left", 1, rank, shape[0], size, twist=1.0, period=size)))
