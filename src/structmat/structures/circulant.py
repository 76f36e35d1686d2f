"""Circulant matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, final

from torch import Tensor

from structmat.program import Convolution, Program, convolution
from structmat.projection.diagonals import fit_diagonals
from structmat.projection.target import Fit, Target
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure

if TYPE_CHECKING:
    from structmat.matrix import StructuredMatrix


@final
@dataclass(frozen=True)
class Circulant(Structure):
    """Diagonals that wrap around: ``W[i, j] = weight[(i - j) mod p]`` with ``p = max(out, in)`` numbers.

    The cyclic convolution with ``weight``, of which a rectangle keeps a corner. Products by Fourier transforms,
    ``O(p log p)``, and for small sizes with the matrix written out. Projection: means along the diagonals, optimal; in
    an activation-weighted norm a linear system, optimal too. ``solve`` divides by the transform of the weight.
    Source: Golub and Van Loan, Matrix Computations, section 4.8.
    """

    by_default: ClassVar[bool] = False

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return {"weight": ParameterSpec((max(shape),), Normal((DENSE_GAIN / shape[1]) ** 0.5))}

    def program(self, shape: Shape) -> Program:
        return _stage(shape)

    def project(self, target: Target) -> Fit:
        return fit_diagonals(_stage(target.native), target)

    def inversion(self, matrix: StructuredMatrix) -> Tensor:
        return matrix.tensors["weight"]

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if max(shape) <= budget:
            yield cls()


def _stage(shape: Shape) -> Convolution:
    return convolution("weight", 1, 1, *shape, twist=1.0, period=max(shape))
