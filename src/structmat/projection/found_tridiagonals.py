"""Tridiagonal operators of a given matrix found, by a descent that starts at the shift.

``W - A W B`` has rank 2 r for the operators of a sum of r products of Krylov matrices, and its singular values beyond
are zero: a problem of least squares in the six bands, by Levenberg and Marquardt. It converges in about ten steps or
not at all, and where it does not, it starts again from operators a little aside. Derived for this library.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STARTS = 6
_ASIDE = 0.1
"""How far from the shift the entries of further starts lie."""

_STEPS = 15
_HOPELESS = 8
"""After so many steps a start is given up if less than a tenth of the tail is gone."""

_MET, _ENOUGH = 1e-12, 3e-16
"""Tails up to the first are those of a member, and from the second on nothing is to be gained."""

_LARGEST = 64
"""Sides up to this: a step is a least squares problem with six unknowns a place."""


def tridiagonal_members(matrix: Tensor, rank: int) -> dict[str, Tensor] | None:
    """The tensors of ``LDRTridiagonal(rank)`` for a generic member (n, n), real, in float64; None where the descent
    finds none.

    Args:
        matrix: (n, n), n from 8 to 64.
        rank: at least 1, less than n / 4.
    """
    size = matrix.shape[0]
    if matrix.shape[1] != size or matrix.is_complex() or not 8 <= size <= _LARGEST or 4 * rank >= size:
        return None
    if not bool(matrix.any()):
        return None  # of no displacement at all
    generator = torch.Generator().manual_seed(0)
    for start in range(_STARTS):
        bands = torch.zeros(2, 3, size, dtype=matrix.dtype)
        bands[:, 0, :-1] = 1.0
        if start:
            bands += _ASIDE * (2 * torch.rand(bands.shape, generator=generator, dtype=matrix.dtype) - 1)
        found = _descended(matrix, bands, 2 * rank)
        if found is not None:
            tensors = _vectors(matrix, found, rank)
            if tensors is not None:
                return tensors
    return None


def _places(size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of an operator with bands (3, n): below the diagonal, on it, above it; corners
    last."""
    i = torch.arange(size)
    after = (i + 1) % size
    return torch.cat([after, i, i]), torch.cat([i, i, after])


def _operator(bands: Tensor) -> Tensor:
    size = bands.shape[1]
    found = bands.new_zeros(size, size)
    found[_places(size)] = bands.flatten()
    return found


def _descended(matrix: Tensor, bands: Tensor, rank: int) -> Tensor | None:
    """Bands (2, 3, n) of A and of ``B^T`` for which ``W - A W B`` has a rank, from a start."""
    size = matrix.shape[0]
    i, j = _places(size)
    norm = float(torch.linalg.norm(matrix))

    def displaced(bands: Tensor) -> Tensor:
        return matrix - _operator(bands[0]) @ matrix @ _operator(bands[1]).mT

    def tail(bands: Tensor) -> float:
        return float(torch.linalg.norm(torch.linalg.svdvals(displaced(bands))[rank:])) / norm

    damping, error = 1e-2, tail(bands)
    first = error
    for step in range(_STEPS):
        rest = displaced(bands)
        u, _, vh = torch.linalg.svd(rest)
        u, v = u[:, rank:], vh[rank:].mT
        beside = matrix @ _operator(bands[1]).mT @ v
        above = u.mT @ _operator(bands[0]) @ matrix
        slope = torch.cat(
            [torch.einsum("ka,kb->abk", u[i], beside[j]), torch.einsum("ak,kb->abk", above[:, j], v[i])], 2
        )
        slope = slope.flatten(0, 1)
        wanted = (u.mT @ rest @ v).flatten()
        normal, side = slope.mT @ slope, slope.mT @ wanted
        scale = normal.diagonal().mean()
        while damping < 1e4:
            change = torch.linalg.solve(normal + damping * scale * torch.eye(len(normal), dtype=normal.dtype), side)
            trial = bands + change.reshape(bands.shape)
            moved = tail(trial)
            if moved < error:
                bands, error, damping = trial, moved, damping / 10
                break
            damping *= 4
        else:
            break
        if error <= _ENOUGH or (step >= _HOPELESS and error > 0.1 * first):
            break
    return bands if error <= _MET else None


def _vectors(matrix: Tensor, bands: Tensor, rank: int) -> dict[str, Tensor] | None:
    """``left`` and ``right`` for operators: ``W - A W B`` is ``sum of g h^T - (A^n g) (B^T^n h)^T``, so that both g and
    ``A^n g`` lie in the span of its columns."""
    size = matrix.shape[0]
    a, b = _operator(bands[0]), _operator(bands[1])
    u, _, vh = torch.linalg.svd(matrix - a @ matrix @ b.mT)
    krylov = []
    for operator, basis in ((a, u), (b, vh.mT)):
        span, beside = basis[:, : 2 * rank], basis[:, 2 * rank :]
        null = torch.linalg.svd(beside.mT @ torch.linalg.matrix_power(operator, size) @ span).Vh[-rank:]
        columns = [span @ null.mT]
        for _ in range(size - 1):
            columns.append(operator @ columns[-1])
        krylov.append(torch.stack(columns, 2))  # (n, rank, n)
    system = torch.stack([krylov[0][:, i] @ krylov[1][:, j].mT for i in range(rank) for j in range(rank)])
    if not bool(torch.isfinite(system).all()):
        return None
    solution = torch.linalg.lstsq(system.flatten(1).mT, matrix.reshape(-1, 1), driver="gelsd").solution
    between = solution.reshape(rank, rank)
    rest = matrix - torch.einsum("ij,ijkl->kl", between, system.reshape(rank, rank, size, size))
    if float(torch.linalg.norm(rest)) > 1e-6 * float(torch.linalg.norm(matrix)):
        return None
    return {
        "left": (krylov[0][:, :, 0] @ between).mT.contiguous(),
        "right": krylov[1][:, :, 0].mT.contiguous(),
        "left_operator": bands[0],
        "right_operator": bands[1],
    }
