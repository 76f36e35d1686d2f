"""A structured matrix plus low rank, the rank unknown: constant diagonals by algebra, a known support by completion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 300
_HOPELESS = 0.3
"""Completions that leave more than this after a few steps are given up."""

_ENOUGH = 1e-14


@dataclass(frozen=True)
class PlusLowRank:
    """``structured + left @ right``: (out, in), (out, rank), (rank, in), and the relative error of the sum."""

    structured: Tensor
    left: Tensor
    right: Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def toeplitz_plus_low_rank(matrix: Tensor, floor: float) -> PlusLowRank | None:
    """A Toeplitz matrix and a matrix of low rank from their sum.

    ``W[1:, 1:] - W[:-1, :-1]`` knows nothing of the Toeplitz matrix. Where the other one is ``U V^T`` of rank r, it has
    rank 2 r and its columns are spanned by ``U[1:]`` and ``U[:-1]``: all vectors u for which both ``u[1:]`` and
    ``u[:-1]`` lie in that space are the span of U, a null space. The same for V; what is between them is a linear
    problem. Exact for generic sums with ``r < min(out, in) / 4``.

    Args:
        matrix: (out, in), in float64 or complex128.
        floor: singular values up to it are rounding.

    Returns:
        None where the displacement has not an even rank of that size, or nothing is left of low rank.
    """
    inner = matrix[1:, 1:] - matrix[:-1, :-1]
    if min(inner.shape) < 4:
        return None
    u, s, vh = torch.linalg.svd(inner, full_matrices=False)
    twice = int((s > floor).sum())
    if twice == 0 or twice % 2 or twice >= min(inner.shape) // 2:
        return None
    rank = twice // 2
    left, right = _shifted_span(u[:, :twice], rank), _shifted_span(vh[:twice].mH, rank)
    # inner = U[1:] X V[1:]^H - U[:-1] X V[:-1]^H, for X in the coordinates of the two spans.
    system = torch.stack(
        [
            (torch.outer(left[1:, i], right[1:, j].conj()) - torch.outer(left[:-1, i], right[:-1, j].conj())).flatten()
            for i in range(rank)
            for j in range(rank)
        ],
        1,
    )
    between = torch.linalg.lstsq(system, inner.reshape(-1, 1), driver="gelsd").solution.reshape(rank, rank)
    low_right = between @ right.mH
    structured = diagonal_means(matrix - left @ low_right)
    error = float(torch.linalg.norm(matrix - structured - left @ low_right) / torch.linalg.norm(matrix))
    return PlusLowRank(structured, left, low_right, error)


def _shifted_span(basis: Tensor, rank: int) -> Tensor:
    """An orthonormal basis (n, rank) of the vectors whose last n - 1 and first n - 1 entries lie in the columns'
    span (n - 1, 2 rank)."""
    # u[1:] = basis a and u[:-1] = basis b agree where they overlap.
    _, _, vh = torch.linalg.svd(torch.cat([basis[:-1], -basis[1:]], 1), full_matrices=True)
    null = vh[-rank:].mH
    below, above = basis @ null[: basis.shape[1]], basis @ null[basis.shape[1] :]
    found: Tensor = torch.linalg.qr(torch.cat([above[:1], below])).Q
    return found


def diagonal_means(matrix: Tensor) -> Tensor:
    """The nearest Toeplitz matrix."""
    rows, columns = matrix.shape
    place = torch.arange(rows)[:, None] - torch.arange(columns) + columns - 1
    sums = matrix.new_zeros(rows + columns - 1).index_add(0, place.flatten(), matrix.flatten())
    counts = torch.bincount(place.flatten())
    return (sums / counts)[place]


def support_plus_low_rank(matrix: Tensor, support: Tensor, rank: int, tolerance: float) -> PlusLowRank | None:
    """A matrix that lives on a known support, and one of a known rank, from their sum.

    The entries off the support are those of the low rank matrix: completed by alternating least squares, row by row
    and column by column.

    Args:
        matrix: (out, in), in float64 or complex128.
        support: (out, in), boolean.
        rank: of the rest, at least 1.
        tolerance: relative errors up to it are rounding: the steps end there.

    Returns:
        None where the descent does not come near.
    """
    norm = float(torch.linalg.norm(matrix))
    known = (~support).to(matrix.dtype)
    held = matrix * known
    right = torch.linalg.svd(held, full_matrices=False)[2][:rank]
    left = matrix.new_zeros(matrix.shape[0], rank)
    error, before = 1.0, 1.0
    for step in range(_STEPS):
        left = _rows(held, known, right)
        right = _rows(held.mT, known.mT, left.mT).mT
        error = float(torch.linalg.norm(known * (matrix - left @ right))) / norm
        if error <= max(_ENOUGH, tolerance / 100):
            break
        if step % 10 == 9:
            if error > _HOPELESS or error > 0.9 * before:
                break
            before = error
    if error > _HOPELESS:
        return None
    return PlusLowRank(torch.where(support, matrix - left @ right, 0.0), left, right, error)


def _rows(matrix: Tensor, known: Tensor, right: Tensor) -> Tensor:
    """The least squares rows (out, rank) for known entries of each row."""
    weighted = known[:, None, :] * right[None].conj()  # (out, rank, in)
    gram = weighted @ right.mT
    ridge = 1e-14 * gram.diagonal(dim1=-2, dim2=-1).abs().mean()
    gram = gram + ridge * torch.eye(right.shape[0], dtype=gram.dtype)
    wanted = weighted @ matrix[:, :, None]
    solution: Tensor = torch.linalg.solve(gram.mT, wanted)
    return solution[..., 0]
