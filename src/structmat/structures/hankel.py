"""Hankel matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, final

from structmat.displacement.form import CauchyForm, of_toeplitz
from structmat.program import Program, convolution
from structmat.projection.diagonals import fit_diagonals
from structmat.projection.target import Fit, Target
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure

if TYPE_CHECKING:
    from structmat.matrix import StructuredMatrix


@final
@dataclass(frozen=True)
class Hankel(Structure):
    """Constant along antidiagonals: ``W[i, j] = weight[i + j]``, with ``out + in - 1`` numbers.

    The first column and then the last row: a Toeplitz matrix with its rows in reverse order. Products by Fourier
    transforms, ``O((out + in) log(out + in))``, and for small sizes with the matrix written out. Projection: means
    along the antidiagonals, optimal; in an activation-weighted norm a linear system, optimal too. ``solve``: see
    :mod:`structmat.displacement`.
    Source: Golub and Van Loan, Matrix Computations, section 4.7.
    """

    by_default: ClassVar[bool] = False

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return {"weight": ParameterSpec((sum(shape) - 1,), Normal((DENSE_GAIN / shape[1]) ** 0.5))}

    def program(self, shape: Shape) -> Program:
        return convolution("weight", 1, 1, *shape, hankel=True)

    def project(self, target: Target) -> Fit:
        return fit_diagonals(convolution("weight", 1, 1, *target.native, hankel=True), target)

    def inversion(self, matrix: StructuredMatrix) -> CauchyForm:
        return of_toeplitz(matrix.tensors["weight"], hankel=True)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if sum(shape) - 1 <= budget:
            yield cls()
