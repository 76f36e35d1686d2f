"""Low rank without its gauge freedom: some columns of the matrix itself, and how the others follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import scipy.linalg
import torch

from structmat.program import Chain, Contraction, Interpolation, Permute, Program
from structmat.projection.low_rank import truncate
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import (
    DENSE_GAIN,
    Arange,
    Normal,
    ParameterSpec,
    Shape,
    Structure,
    check_size,
    largest_fitting,
    whole,
)


@final
@dataclass(frozen=True)
class PivotedLowRank(Structure):
    """``W = basis @ [I, extension] @ P``: the same matrices as :class:`LowRank`, with ``rank**2`` fewer numbers.

    ``places`` (in,) puts ``rank`` chosen inputs first, ``extension`` (rank, in - rank) adds what the other inputs share
    with them, and ``basis`` (out, rank) holds the chosen columns of the matrix. ``rank * (out + in - rank)`` parameters
    and multiply-adds, the dimension of the set of such matrices: always less than dense. Projection: truncated SVD,
    then columns chosen by a pivoted QR factorisation, which keeps ``extension`` small; optimal as low rank is.
    Source: skeleton decompositions (Goreinov, Tyrtyshnikov, Zamarashkin 1997); for layers Zhao et al., "Pivoting
    Factorization" (2025).

    Args:
        rank: an integer of at least 1, or a fraction of the dense parameter count.
    """

    rank: int | float

    weighs_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size(self, "rank", self.rank)

    def restriction(self, shape: Shape) -> str | None:
        if isinstance(self.rank, int) and self.rank > min(shape):
            return f"its rank is at most {min(shape)}. Use rank={min(shape)} or less, or rank=0.5 for half of dense."
        return None

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        rank, columns = whole(self.rank), shape[1]
        specs = {"basis": ParameterSpec((shape[0], rank), Normal((DENSE_GAIN / columns) ** 0.5))}
        if rank < columns:
            specs["extension"] = ParameterSpec((rank, columns - rank), Normal(rank**-0.5))
        specs["places"] = ParameterSpec((columns,), Arange(), learned=False, dtype=torch.int64)
        return specs

    def program(self, shape: Shape) -> Program:
        rank, columns = whole(self.rank), shape[1]
        basis = Contraction("basis", 1, shape[0], rank, 1)
        if rank == columns:
            return Chain((Permute("places", columns, inverse=True), basis))
        return Chain((Interpolation("extension", "places", rank, columns), basis))

    def project(self, target: Target) -> Fit:
        rank, columns = whole(self.rank), target.native[1]
        left, right, tail = truncate(target, rank)
        frame, triangle = torch.linalg.qr(right.mH)  # right = triangle^H frame^H
        rows = frame.mH.resolve_conj()
        _, _, pivots = scipy.linalg.qr(rows.numpy(), mode="economic", pivoting=True)
        order = torch.from_numpy(pivots).to(torch.int64)
        chosen, others = rows[:, order[:rank]], rows[:, order[rank:]]
        tensors = {"basis": left @ (triangle.mH @ chosen), "places": torch.argsort(order)}
        if rank < columns:
            tensors["extension"] = torch.linalg.solve(chosen, others)
        return Fit(tensors, Certificate.OPTIMAL, tail, "truncated SVD, pivoted")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        rank = largest_fitting(lambda r: r * (sum(shape) - r) + shape[1], budget, min(shape))
        if rank:
            yield cls(rank)
