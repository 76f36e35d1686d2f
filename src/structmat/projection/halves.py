"""Fits of matrices that are halved again and again along the diagonal, with low rank beside it.

The off-diagonal blocks of all levels and the leaves do not overlap, so that without shared bases each is cut down by
its own truncated SVD, and the whole is optimal in the Frobenius norm. Nested bases are those of whole block rows and
columns (diagonal block left out), orthonormal, level by level upwards; what the separate cuts lose is a lower bound for
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.program import Program
from structmat.projection.refine import refine
from structmat.projection.target import Certificate, Fit, Target


def fit_separate(program: Program, target: Target, ranks: Sequence[int]) -> Fit:
    """Each off-diagonal block by its own truncated SVD.

    Args:
        program: of the target's native shape, for a weighted norm.
        target: its sizes are multiples of ``2^levels``.
        ranks: of the blocks of each level, the first halving first.
    """
    tensors = {"leaf": _leaves(target.weight, len(ranks))}
    squared = 0.0
    for level, rank in enumerate(ranks, 1):
        for side, blocks in _beside(target.weight, level).items():
            u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
            root = s[:, :rank].sqrt()
            tensors[f"{side}_left{level}"] = u[:, :, :rank] * root[:, None, :]
            tensors[f"{side}_right{level}"] = root[:, :, None] * vh[:, :rank]
            squared += float((s[:, rank:] ** 2).sum())
    method = "truncated SVD of every off-diagonal block"
    if target.second_moment is None and target.output_moment is None:
        return Fit(tensors, Certificate.OPTIMAL, squared**0.5, method)
    return _refined(program, tensors, target, 0.0, method)


def fit_nested(program: Program, target: Target, levels: int, rank: int) -> Fit:
    """Orthonormal bases of block rows and columns, then transfers between the levels.

    Args:
        program: of the target's native shape.
        target: its sizes are multiples of ``2^levels``.
        levels: of halvings.
        rank: of all bases.
    """
    weight = target.weight
    count = 2**levels
    left, right = _bases(weight, count, rank)  # (count, height, rank), (count, width, rank)
    tensors = {"leaf": _leaves(weight, levels), "left_basis": left, "right_basis": right.mT.conj()}
    core = _compressed(weight, left, right)
    for level in range(levels, 0, -1):
        for side, blocks in _beside(core, level).items():
            tensors[f"{side}{level}"] = blocks
        if level > 1:
            left, right = _bases(core, 2 ** (level - 1), rank)
            tensors[f"left_transfer{level}"], tensors[f"right_transfer{level}"] = left, right.mT.conj()
            core = _compressed(core, left, right)
    squared = 0.0
    for level in range(1, levels + 1):
        for blocks in _beside(weight, level).values():
            squared += float((torch.linalg.svdvals(blocks)[:, rank:] ** 2).sum())
    return _refined(program, tensors, target, squared**0.5, "nested bases from the leaves up")


def _refined(program: Program, tensors: dict[str, Tensor], target: Target, bound: float, method: str) -> Fit:
    found = refine(program, tensors, target, target.sweeps)
    plain = target.second_moment is None and target.output_moment is None
    certificate = Certificate.BOUND if plain and bound > 0 else Certificate.NONE
    method += ", alternating least squares" if target.sweeps else ""
    return Fit(found, certificate, bound if plain else 0.0, method)


def _grid(matrix: Tensor, count: int) -> Tensor:
    """Blocks (row, column, height, width) of a matrix cut into ``count`` parts each way."""
    height, width = matrix.shape[0] // count, matrix.shape[1] // count
    return matrix.reshape(count, height, count, width).transpose(1, 2)


def _leaves(matrix: Tensor, levels: int) -> Tensor:
    places = range(2**levels)
    return _grid(matrix, 2**levels)[places, places].clone()


def _beside(matrix: Tensor, level: int) -> dict[str, Tensor]:
    """The off-diagonal blocks of a halving, by side: (pairs, height, width)."""
    grid, even = _grid(matrix, 2**level), torch.arange(0, 2**level, 2)
    return {"lower": grid[even + 1, even], "upper": grid[even, even + 1]}


def _bases(matrix: Tensor, count: int, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases for the rows and the columns of each part, its diagonal block left out."""
    grid = _grid(matrix, count).clone()
    grid[range(count), range(count)] = 0
    height, width = grid.shape[2:]
    rows = grid.transpose(1, 2).reshape(count, height, count * width)
    columns = grid.permute(1, 3, 0, 2).reshape(count, width, count * height).conj()
    left = torch.linalg.svd(rows, full_matrices=False)[0][:, :, :rank]
    right = torch.linalg.svd(columns, full_matrices=False)[0][:, :, :rank]
    return left, right


def _compressed(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The matrix in the bases, (count * rank, count * rank)."""
    count, rank = left.shape[0], left.shape[2]
    core = left.mH[:, None] @ _grid(matrix, count) @ right[None]
    return core.transpose(1, 2).reshape(count * rank, count * rank)
