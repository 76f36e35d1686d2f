"""Hankel-like matrices: Toeplitz-like ones with their rows in reverse order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

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
class HankelLike(OfDisplacementRank):
    """``sum of C(left[i]) Z_-1(right[i])`` with ``C(v)[k, l] = v[(k + l) mod p]``: ``rank`` products.

    All matrices whose displacement under ``(Z_1^T, Z_-1)`` has at most that rank; 2 holds the Hankel matrices. ``left``
    and ``right`` are (rank, p) with ``p = max(out, in)``; a rectangle keeps the upper left corner. ``2 p rank``
    parameters; products by ``2 rank + 2`` Fourier transforms, for small sizes with the factors written out. Projection:
    truncated SVD of the displacement, exact for members, then refined; with a lower bound. ``solve`` by elimination on
    the generators.
    Source: Golub and Van Loan, Matrix Computations, section 12.1.

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
        found = toeplitz_like_generators(target.weight.flip(0), rank)
        tensors = {"left": _reversed(found.left, target.native[0]), "right": found.right}
        method = "truncated SVD of the displacement"
        return finished(_program(rank, target.native), tensors, "left", target, found.tail / 2, method)

    def inversion(self, matrix: StructuredMatrix) -> CauchyForm:
        left, right = _reversed(matrix.tensors["left"], matrix.shape[0]), matrix.tensors["right"]
        return CauchyForm(Side.SHIFT, Side.TWISTED, left.T, 2 * right.flip(1).T, reversed_rows=True)

    @classmethod
    def numbers(cls, rank: int, shape: Shape) -> int:
        return 2 * rank * max(shape)


def _reversed(left: Tensor, rows: int) -> Tensor:
    """``J Z_1(g)`` has in row k and column l the entry ``g[rows - 1 - k - l]``; and back again."""
    size = left.shape[1]
    return left[:, (rows - 1 - torch.arange(size)) % size]


def _program(rank: int, shape: Shape) -> Program:
    size = max(shape)
    first = convolution("right", rank, 1, size, shape[1], twist=-1.0, period=size)
    return Chain((first, convolution("left", 1, rank, shape[0], size, twist=1.0, period=size, hankel=True)))
