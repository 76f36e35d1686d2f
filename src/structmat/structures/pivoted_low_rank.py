"""Low rank without its gauge freedom: some rows of the matrix itself, and how the others follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import scipy.linalg
import torch

from structmat.program import Chain, Contraction, Pad, Permute, Program, Sum
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
    """``W = P [I; extension] @ basis``: the same matrices as :class:`LowRank`, with ``rank**2`` fewer numbers.

    ``basis`` (rank, in) holds ``rank`` rows of the matrix, ``extension`` (out - rank, rank) expresses the other rows in
    them, ``order`` (out,) puts all rows in their places. ``rank * (out + in - rank)`` parameters and multiply-adds,
    which is the dimension of the set of such matrices: always less than dense. Projection: truncated SVD, then the rows
    chosen by a pivoted QR factorisation, which keeps ``extension`` small; optimal as low rank is.
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
        rank = whole(self.rank)
        specs = {"basis": ParameterSpec((rank, shape[1]), Normal((DENSE_GAIN / shape[1]) ** 0.5))}
        if rank < shape[0]:
            specs["extension"] = ParameterSpec((shape[0] - rank, rank), Normal(rank**-0.5))
        specs["order"] = ParameterSpec((shape[0],), Arange(), learned=False, dtype=torch.int64)
        return specs

    def program(self, shape: Shape) -> Program:
        rank, rows = whole(self.rank), shape[0]
        basis = Contraction("basis", 1, rank, shape[1], 1)
        if rank == rows:
            return Chain((basis, Permute("order", rows)))
        others = Chain((Contraction("extension", 1, rows - rank, rank, 1), Pad(rows - rank, rows, rank)))
        return Chain((basis, Sum((Pad(rank, rows), others)), Permute("order", rows)))

    def project(self, target: Target) -> Fit:
        rank, rows = whole(self.rank), target.native[0]
        left, right, tail = truncate(target, rank)
        frame, triangle = torch.linalg.qr(left)
        _, _, pivots = scipy.linalg.qr(frame.mH.resolve_conj().numpy(), mode="economic", pivoting=True)
        pivots = torch.from_numpy(pivots).to(torch.int64)
        chosen, others = frame[pivots[:rank]], frame[pivots[rank:]]
        tensors = {"basis": chosen @ (triangle @ right), "order": torch.argsort(pivots)}
        if rank < rows:
            tensors["extension"] = torch.linalg.solve(chosen, others, left=False)
        return Fit(tensors, Certificate.OPTIMAL, tail, "truncated SVD, pivoted")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        rank = largest_fitting(lambda r: r * (sum(shape) - r) + shape[0], budget, min(shape))
        if rank:
            yield cls(rank)
