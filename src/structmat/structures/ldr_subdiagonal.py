"""Low displacement rank with learned subdiagonal operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from structmat.program import Chain, Generated, Program
from structmat.program.generated import subdiagonal_by_transforms, subdiagonal_krylov
from structmat.projection.krylov import Shift, fit_krylov, krylov_scales
from structmat.projection.target import Fit, Target
from structmat.structure import Normal, ParameterSpec, Shape, whole
from structmat.structures.generators import OfDisplacementRank


@final
@dataclass(frozen=True)
class LDRSubdiagonal(OfDisplacementRank):
    """``sum of K(A, left[i]) K(B^T, right[i])^T``: Krylov matrices of learned operators with a subdiagonal and a
    corner.

    ``left_operator`` (out,) holds what stands below the diagonal of A and, last, in its upper right corner;
    ``right_operator`` (in,) the same of ``B^T``; ``left`` is (rank, out), ``right`` (rank, in), and a Krylov matrix has
    ``min(out, in)`` columns. The displacement rank under the learned operators is at most ``2 rank``.
    ``(rank + 1) (out + in)`` parameters. A fresh A is the plain shift: training begins at Toeplitz-like matrices.

    Products: the Krylov matrices written out, ``O(rank min(out, in) (out + in))``, stable whatever the operators.
    ``freeze`` puts Fourier transforms in their place, ``O(rank n log n)``, where the running products of an operator
    differ by less than 1e5 in float32 (1e12 in float64), and dense matrices elsewhere. Projection: for the plain shift,
    or for subdiagonals that are found, as those of generic members with ``(rank + 1) (rank + 2) < in`` are, by
    truncated SVD of the displacement, exact for members with these operators, then alternating least squares and
    descent over all tensors; no certificate. Source: Thomas, Gu, Dao, Rudra and Re, "Learning compressed transforms
    with low displacement rank" (NeurIPS 2018).

    Args:
        rank: number of products, or a fraction of the dense parameter count.
    """

    rank: int | float = 1

    most_proposed: ClassVar[int | None] = 4

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        (height, width), rank = shape, whole(self.rank)
        left, right = krylov_scales(shape, rank)
        return {
            "left": ParameterSpec((rank, height), Normal(left)),
            "right": ParameterSpec((rank, width), Normal(right)),
            "left_operator": ParameterSpec((height,), Shift()),
            "right_operator": ParameterSpec((width,), Shift()),
        }

    def program(self, shape: Shape) -> Program:
        (height, width), count = shape, min(shape)
        return Chain((self._krylov("right", width, count).transpose(), self._krylov("left", height, count)))

    def _krylov(self, side: str, size: int, count: int) -> Generated:
        rank = whole(self.rank)
        tensors = ((f"{side}_operator", size), (side, rank * size))
        return Generated(
            subdiagonal_krylov,
            tensors,
            (count,),
            size,
            rank * count,
            linear=(side,),
            roundings=count + 4,
            fast=subdiagonal_by_transforms,
        )

    def project(self, target: Target) -> Fit:
        (height, width), rank = target.native, whole(self.rank)
        operators = {"left_operator": Shift().values(height), "right_operator": Shift().values(width)}
        return fit_krylov(self.program(target.native), operators, target, rank)

    @classmethod
    def numbers(cls, rank: int, shape: Shape) -> int:
        return (rank + 1) * sum(shape)
