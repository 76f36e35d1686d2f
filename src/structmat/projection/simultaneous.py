"""Grids of blocks ``A_i D_ij C_j`` with diagonal D: products of Monarch matrices, and BLAST matrices.

For blocks of one size with invertible factors, ``M_i1^-1 M_ij M_1j^-1 M_11`` is ``C_1^-1 (a diagonal matrix) C_1`` for
all i and j: these matrices are diagonalised together, by the eigenvectors of one random combination of them.
Source: Dao et al., "Monarch: expressive structured matrices" (ICML 2022), the factorization of MM*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.errors import ShapeError

_COMBINATIONS = 3
_MORE, _SMALL = 20, 16
"""Random combinations that are tried, more of small blocks; eigenvalues of one may happen to lie close together."""

_MET = 1e-15

_REAL = 1e-6
"""Relative imaginary parts below this are rounding: eigenvectors of a real member are real."""


@dataclass(frozen=True)
class Grid:
    """Factors of a grid of p x q blocks: ``left`` (p, r, r), ``middle`` (p, q, r), ``right`` (q, r, r)."""

    left: Tensor
    middle: Tensor
    right: Tensor

    @property
    def blocks(self) -> Tensor:
        """The grid (p, q, r, r) that they make."""
        return (self.left[:, None] * self.middle[:, :, None, :]) @ self.right[None]


@dataclass(frozen=True)
class MonarchPair:
    """``M_1 M_2^*`` for two Monarch matrices with ``blocks`` columns a block, as three factors.

    Args:
        first: (b, k, k), applied first: on the places j, j + b, j + 2 b, ... for each j < b.
        middle: (k, b, b), on contiguous blocks of b places.
        last: (b, k, k), as the first.
        error: relative, in the Frobenius norm.
    """

    first: Tensor
    middle: Tensor
    last: Tensor
    error: float

    @property
    def dense(self) -> Tensor:
        """The product (n, n), ``n = b k``."""
        size = self.first.shape[0] * self.first.shape[1]
        return torch.einsum("jim,mjh,hml->ijlh", self.last, self.middle, self.first).reshape(size, size)


def monarch_pair(matrix: Tensor, block: int, *, seed: int = 0) -> MonarchPair | None:
    """The factors of a product ``M_1 M_2^*`` of Monarch matrices, if the matrix is one.

    Not a projection: for a matrix that is no such product the error says so, and nothing is near to optimal about the
    factors. They are known up to diagonal matrices and the order of the terms between them; complex ones may be needed.

    Args:
        matrix: (n, n), real or complex.
        block: columns of a block, b, a divisor of n between 2 and n / 2.
        seed: of the random combinations.

    Returns:
        The factors, or None if a block of the grid is singular, which a generic member has not.

    Raises:
        ShapeError: the matrix is not square or the block does not divide it.

    Cost: ``O(n^3 / b)``.
    """
    size = matrix.shape[0]
    if matrix.dim() != 2 or matrix.shape[1] != size or not 2 <= block <= size // 2 or size % block:
        raise ShapeError(
            f"monarch_pair takes a square matrix and a divisor of its size between 2 and half of it; got "
            f"{tuple(matrix.shape)} and {block}."
        )
    wide = matrix.detach().to(torch.complex128 if matrix.is_complex() else torch.float64)
    rows = size // block
    grid = wide.reshape(rows, block, rows, block).permute(1, 3, 0, 2)
    found = factor_grid(grid, seed=seed)
    if found is None:
        return None
    # Block (j, h) is last[j] diag(middle[:, j, h]) first[h].
    pair = MonarchPair(found.right, found.middle.permute(2, 0, 1), found.left, 0.0)
    error = float(torch.linalg.norm(pair.dense - wide) / torch.linalg.norm(wide))
    return MonarchPair(pair.first, pair.middle, pair.last, error)


def factor_grid(blocks: Tensor, *, seed: int = 0) -> Grid | None:
    """Factors of a grid (p, q, r, r), p and q at least 2, in float64 or complex128: exact for generic members.

    None if in each row or in each column a block is singular. Of a few random combinations the best one is taken.
    """
    # Everything goes through one row and one column: those of which the worst block is best.
    values = torch.linalg.svdvals(blocks)
    health = values[..., -1] / values[..., 0].clamp(min=1e-300)
    rows, columns = _put_first(health.amin(1)), _put_first(health.amin(0))
    found = _factor_grid(blocks[rows[:, None], columns], seed)
    if found is None:
        return None
    by_row, by_column = rows.argsort(), columns.argsort()
    return Grid(found.left[by_row], found.middle[by_row[:, None], by_column], found.right[by_column])


def _put_first(health: Tensor) -> Tensor:
    """The order (n,) that puts the healthiest place in front."""
    order = torch.arange(len(health))
    return order.roll(-int(health.argmax()))


def _factor_grid(blocks: Tensor, seed: int) -> Grid | None:
    corner = blocks[0, 0]
    try:
        by_row = torch.linalg.solve(blocks[1:, :1], blocks[1:, 1:])  # M_i1^-1 M_ij
        by_column = torch.linalg.solve(blocks[:1, 1:], corner)  # M_1j^-1 M_11
    except RuntimeError:  # torch.linalg.LinAlgError: a block is singular
        return None
    alike = by_row @ by_column
    if not bool(torch.isfinite(alike).all()):
        return None
    generator = torch.Generator().manual_seed(seed)
    best, least = None, torch.inf
    enough = _MET * float(torch.linalg.norm(blocks))
    for _ in range(_MORE if blocks.shape[-1] <= _SMALL else _COMBINATIONS):
        weights = torch.randn(alike.shape[:2], generator=generator, dtype=torch.float64)
        together = torch.einsum("ij,ijkl->kl", weights.to(alike), alike / alike.abs().amax((-2, -1), keepdim=True))
        _, vectors = torch.linalg.eig(together)
        if not blocks.is_complex() and float(vectors.imag.norm() / vectors.norm()) < _REAL:
            vectors = vectors.real
        found = _from_vectors(blocks.to(vectors.dtype), vectors)
        if found is not None:
            error = float(torch.linalg.norm(found.blocks - blocks))
            if error < least:
                best, least = found, error
            if error <= enough:
                break
    return best


def _from_vectors(blocks: Tensor, vectors: Tensor) -> Grid | None:
    """All factors, from the inverse of the first right one."""
    left = blocks[:, 0] @ vectors
    try:
        right = torch.linalg.solve(left[:1].expand(blocks.shape[1], -1, -1), blocks[0])
        middle = torch.linalg.solve(left[:, None], blocks)
        middle = torch.linalg.solve(right[None], middle, left=False)
    except RuntimeError:  # torch.linalg.LinAlgError: a block is singular
        return None
    return Grid(left, middle.diagonal(dim1=-2, dim2=-1), right)
