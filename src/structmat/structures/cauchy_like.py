"""Cauchy-like matrices: a low rank matrix times a Cauchy matrix, entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from structmat.displacement.form import CauchyForm, Side
from structmat.program import Generated, Program
from structmat.program.generated import cauchy_kernel, cauchy_like
from structmat.projection.nodes import fit_cauchy_like
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import (
    DENSE_GAIN,
    Constant,
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
class CauchyLike(OfDisplacementRank):
    """``W[i, j] = (left[:, i] . right[:, j]) / (s[i] - t[j])`` with ``s[i] = i + rows[i]``, ``t[j] = j + columns[j]``.

    All matrices whose displacement under ``(diag(s), diag(t))`` has at most that rank. ``left`` is (rank, out),
    ``right`` (rank, in); ``(rank + 1) (out + in)`` parameters. Products with the matrix written out, ``O(out in)``
    after ``O(rank out in)``: the direct evaluation that is stable for all nodes. Projection: for the nodes of a fresh
    matrix, truncated SVD of the displacement, exact for members with these nodes, then alternating least squares, row
    by row and column by column; where that is no member, real nodes are found if the rank is small
    (``(rank + 1)^2 < in``); no certificate. ``solve`` by elimination on the generators. Source: Gohberg, Kailath
    and Olshevsky 1995; Golub and Van Loan, section 12.1.

    Args:
        rank: the displacement rank, or a fraction of the dense parameter count.
    """

    rank: int | float = 2

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        rank = whole(self.rank)
        total = float(cauchy_kernel(torch.zeros(shape[0]), torch.full((shape[1],), 0.5)).square().sum())
        return {
            "left": ParameterSpec((rank, shape[0]), Normal((DENSE_GAIN * shape[0] / (rank * total)) ** 0.5)),
            "right": ParameterSpec((rank, shape[1]), Normal(1.0)),
            "rows": ParameterSpec((shape[0],), Constant(0.0)),
            "columns": ParameterSpec((shape[1],), Constant(0.5)),
        }

    def program(self, shape: Shape) -> Program:
        (height, width), rank = shape, whole(self.rank)
        tensors = (("left", rank * height), ("right", rank * width), ("rows", height), ("columns", width))
        return Generated(
            cauchy_like,
            tensors,
            (),
            height,
            width,
            linear=("left", "right"),
            signed=("rows", "columns"),
            roundings=rank + 4,
        )

    def project(self, target: Target) -> Fit:
        found = fit_cauchy_like(target, whole(self.rank))
        return Fit(found, Certificate.NONE, 0.0, "truncated SVD of the displacement, alternating least squares")

    def inversion(self, matrix: StructuredMatrix) -> CauchyForm:
        tensors, places = matrix.tensors, torch.arange(matrix.shape[0])
        nodes = places + tensors["rows"], places + tensors["columns"]
        return CauchyForm(Side.PLAIN, Side.PLAIN, tensors["left"].T, tensors["right"].T, *nodes)

    @classmethod
    def numbers(cls, rank: int, shape: Shape) -> int:
        return (rank + 1) * sum(shape)
