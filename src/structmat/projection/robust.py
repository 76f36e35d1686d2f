"""Robust principal component analysis: a low rank matrix and a sparse one from their sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.linalg import svd
from torch import Tensor

from structmat.errors import DataError
from structmat.matrix import StructuredMatrix
from structmat.projection.low_rank import balance
from structmat.projection.project import make_target

_GROWTH = 1.5
_TOLERANCE = 1e-7
_MOST_STEPS = 200

_NEGLIGIBLE = 1e-6
"""Singular values and entries below this share of the largest are what the tolerance leaves."""


@dataclass(frozen=True)
class RobustPCA:
    """What :func:`robust_pca` found. ``low_rank + sparse`` is the matrix, to ``residual``.

    Args:
        low_rank: (out, in).
        sparse: (out, in).
        rank: of the low rank part.
        nonzeros: of the sparse part.
        incoherence: ``mu`` of the low rank part: the smallest with ``max_i ||U^T e_i||^2 <= mu r / out``, the same for
            V, and ``||U V^T||_inf^2 <= mu r / (out * in)``. Between 1 and ``out * in``; 0 if there is no low rank part.
        steps: of the solver.
        residual: relative.
        verdict: whether a separation was found, in a sentence; see :attr:`succeeded`.
        succeeded: the solver converged, and the parts are what the theorem speaks of: a rank well below the full one
            and a sparse part with well below all entries.
    """

    low_rank: Tensor
    sparse: Tensor
    rank: int
    nonzeros: int
    incoherence: float
    steps: int
    residual: float
    verdict: str
    succeeded: bool

    @property
    def density(self) -> float:
        """Share of the entries that the sparse part holds."""
        return self.nonzeros / self.sparse.numel()

    @property
    def matrix(self) -> StructuredMatrix:
        """The member of ``Sum(LowRank(rank), Sparse(nonzeros=...))``, at least of rank 1 and one entry."""
        # The family of sums projects by this module.
        from structmat.structures.low_rank import LowRank
        from structmat.structures.sparse import Sparse
        from structmat.structures.sum_of import Sum

        rank, count = max(1, self.rank), max(1, self.nonzeros)
        u, s, vh = torch.linalg.svd(self.low_rank, full_matrices=False)
        left, right = balance(u[:, :rank], s[:rank, None] * vh[:rank])
        places = self.sparse.abs().reshape(-1).argsort(descending=True)[:count].sort().values
        tensors = {
            "term0_left": left,
            "term0_right": right,
            "term1_values": self.sparse.reshape(-1)[places],
            "term1_places": places,
        }
        shape = (self.sparse.shape[0], self.sparse.shape[1])
        return StructuredMatrix(Sum(LowRank(rank), Sparse(nonzeros=count)), shape, tensors)


def robust_pca(matrix: Tensor, *, weight: float | None = None) -> RobustPCA:
    """Separate a matrix into low rank plus sparse, the rank and the support both unknown, by a convex program.

    Minimises ``||L||_* + weight * ||S||_1`` with ``L + S`` the matrix, by inexact augmented Lagrangians.

    Guarantee: for an n x n matrix ``L0 + S0``, ``weight = 1 / sqrt(n)`` recovers both exactly with a probability of
    ``1 - O(n^-10)`` if L0 is mu-incoherent with a rank of at most ``c n / (mu log(n)^2)`` and the support of S0 is
    uniformly random with at most ``c' n^2`` entries (Candes, Li, Ma, Wright 2011; c and c' are small constants, which
    are not given). Without incoherence there is none: the identity is sparse and of full rank, the Hadamard matrix
    neither, and the program may answer with everything in one part. That is reported as :attr:`RobustPCA.succeeded`
    and in words.

    Args:
        matrix: (out, in), real or complex.
        weight: of the sparse part; ``1 / sqrt(max(out, in))`` if None.

    Cost: a singular value decomposition a step, about 20 steps where it succeeds.

    Raises:
        ShapeError: the matrix has not two axes.
        DataError: an entry is NaN or infinite, or the weight is not above 0.
    """
    if weight is not None and not 0 < weight < math.inf:
        raise DataError(f"robust_pca(weight={weight!r}): the weight of the sparse part is a number above 0, or None.")
    given = make_target(matrix).weight
    rows, columns = given.shape
    size = float(torch.linalg.norm(given))
    if size == 0:
        zero = torch.zeros_like(given)
        return RobustPCA(zero, zero, 0, 0, 0.0, 0, 0.0, "The matrix is zero.", True)
    weight = 1.0 / math.sqrt(max(rows, columns)) if weight is None else weight
    spectral = float(torch.linalg.matrix_norm(given, 2))
    dual = given / max(spectral, float(given.abs().max()) / weight)
    mu = 1.25 / spectral
    most = mu * 1e7
    sparse, low = torch.zeros_like(given), torch.zeros_like(given)
    residual, steps = 1.0, 0
    while residual >= _TOLERANCE and steps < _MOST_STEPS:
        steps += 1
        u, s, vh = _svd(given - sparse + dual / mu)
        kept = (s - 1 / mu).clamp(min=0)
        low = (u * kept) @ vh
        rest = given - low + dual / mu
        sparse = rest.sgn() * (rest.abs() - weight / mu).clamp(min=0)
        left = given - low - sparse
        dual = dual + mu * left
        mu = min(mu * _GROWTH, most)
        residual = float(torch.linalg.norm(left)) / size
    u, s, vh = _svd(low)
    rank = int((s > _NEGLIGIBLE * spectral).sum())
    low = (u[:, :rank] * s[:rank]) @ vh[:rank]
    floor = _NEGLIGIBLE * float(given.abs().max())
    sparse = torch.where(sparse.abs() > floor, sparse, torch.zeros_like(sparse))
    nonzeros = int((sparse != 0).sum())
    verdict, succeeded = _verdict(rank, nonzeros, rows, columns, residual)
    incoherence = _incoherence(u[:, :rank], vh[:rank], rank)
    return RobustPCA(low, sparse, rank, nonzeros, incoherence, steps, residual, verdict, succeeded)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError:  # divide and conquer may fail where many singular values are equal, as those of transforms are
        found = svd(matrix.numpy(), full_matrices=False, lapack_driver="gesvd")
        u, s, vh = (torch.from_numpy(part) for part in found)
    return u, s, vh


def _incoherence(u: Tensor, vh: Tensor, rank: int) -> float:
    if not rank:
        return 0.0
    rows, columns = u.shape[0], vh.shape[1]
    by_rows = float(u.abs().square().sum(1).max()) * rows / rank
    by_columns = float(vh.abs().square().sum(0).max()) * columns / rank
    together = float((u @ vh).abs().max()) ** 2 * rows * columns / rank
    return max(by_rows, by_columns, together)


def _verdict(rank: int, nonzeros: int, rows: int, columns: int, residual: float) -> tuple[str, bool]:
    share = nonzeros / (rows * columns)
    found = f"rank {rank} and {nonzeros} entries ({share:.1%})"
    if residual >= _TOLERANCE:
        return f"The solver did not converge: {found} leave a relative error of {residual:.1e}.", False
    if rank == 0 or nonzeros == 0:
        part = "sparse" if rank == 0 else "low rank"
        return f"All of the matrix went into the {part} part ({found}): nothing was separated.", False
    numbers = rank * (rows + columns) + nonzeros
    if rank > min(rows, columns) / 2 or share > 0.5 or numbers >= rows * columns:
        return f"No separation: {found} are as many numbers as the matrix or nearly so.", False
    return f"Separated into {found}.", True
