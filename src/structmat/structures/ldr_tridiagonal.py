"""Low displacement rank with learned tridiagonal operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch.nn import functional

from structmat.program import Chain, Generated, Program
from structmat.program.generated import tridiagonal_krylov
from structmat.projection.found_tridiagonals import tridiagonal_members
from structmat.projection.krylov import Shift, fit_krylov, krylov_scales, member_error
from structmat.projection.target import Fit, Target
from structmat.structure import Normal, ParameterSpec, Shape, whole
from structmat.structures.generators import OfDisplacementRank


@final
@dataclass(frozen=True)
class LDRTridiagonal(OfDisplacementRank):
    """``sum of K(A, left[i]) K(B^T, right[i])^T``: Krylov matrices of learned tridiagonal operators with corners.

    ``left_operator`` (3, out) holds A: below the diagonal and, last, the upper right corner; the diagonal; above it
    and, last, the lower left corner. ``right_operator`` (3, in) is the same of ``B^T``; ``left`` is (rank, out),
    ``right`` (rank, in), and a Krylov matrix has ``min(out, in)`` columns. The displacement rank under the learned
    operators is at most ``2 rank``. ``(rank + 3) (out + in)`` parameters. A fresh A is the plain shift.

    Products: the Krylov matrices written out column by column, one product with the operator after the other,
    ``O(rank min(out, in) (out + in))``: the stable form, and as many steps as there are columns. Projection: as of
    ``LDRSubdiagonal``; for square matrices of sizes 8 to 64 all bands are found too, which gives back generic members
    whose operators are not far from shifts.
    Source: Thomas, Gu, Dao, Rudra and Re, "Learning compressed transforms with low displacement rank" (NeurIPS 2018).

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
            "left_operator": ParameterSpec((3, height), Shift()),
            "right_operator": ParameterSpec((3, width), Shift()),
        }

    def program(self, shape: Shape) -> Program:
        (height, width), count = shape, min(shape)
        return Chain((self._krylov("right", width, count).transpose(), self._krylov("left", height, count)))

    def _krylov(self, side: str, size: int, count: int) -> Generated:
        rank = whole(self.rank)
        tensors = ((f"{side}_operator", 3 * size), (side, rank * size))
        return Generated(
            tridiagonal_krylov,
            tensors,
            (count,),
            size,
            rank * count,
            linear=(side,),
            roundings=3 * count + 4,
        )

    def project(self, target: Target) -> Fit:
        (height, width), rank = target.native, whole(self.rank)
        operators = {}
        for name, size in (("left_operator", height), ("right_operator", width)):
            operators[name] = torch.stack([Shift().values(size), *torch.zeros(2, size, dtype=torch.float64)])
        plain = fit_krylov(self.program(target.native), operators, target, rank)
        for smaller in range(1, rank + 1):
            found = tridiagonal_members(target.weight, smaller)
            if found is not None:
                for name in ("left", "right"):
                    found[name] = functional.pad(found[name], (0, 0, 0, rank - smaller))
                errors = [member_error(self.program(target.native), t, target) for t in (plain.tensors, found)]
                return Fit(found, plain.certificate, 0.0, "operators found") if errors[1] < errors[0] else plain
        return plain

    @classmethod
    def numbers(cls, rank: int, shape: Shape) -> int:
        return (rank + 3) * sum(shape)
