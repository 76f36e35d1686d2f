"""Matrices cut into a grid of slices of low rank each: Monarch matrices and block tensor trains.

The rows fall into groups ``g``, the columns into blocks ``k``; slice ``(g, k)`` is an (s, p) matrix of rank at most
``rank``. The slices are disjoint, so in the Frobenius norm each is cut down by its own truncated SVD, and the whole is
optimal (Dao et al., "Monarch", ICML 2022, theorem 1).

In the norm ``||(W - S) C^(1/2)||`` the row groups stay independent but the column blocks of one group interact. With
all blocks but ``k`` fixed and ``E`` what they leave of ``W``, the best slice has a closed form again: completing the
square, ``||(E - X P_k) C^(1/2)||^2 = ||(E C[:, k] C[k, k]^+ - X) C[k, k]^(1/2)||^2 + constant``, a truncated SVD in
the whitened coordinates of the block. Cycling over the blocks descends monotonically, both factors of a slice at once.
Where ``C`` is block diagonal in the blocks one pass is optimal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.projection.target import Certificate

_RANK_TOLERANCE = 1e-12
"""Eigenvalues below this share of the largest are rounding: directions in which the inputs never vary."""

_PROGRESS = 1e-5
"""A descent ends when a sweep lowers the squared error by less than this share."""

_BLOCK_DIAGONAL = 1e-14
"""Off-diagonal blocks below this share of the second moment are rounding."""


@dataclass(frozen=True)
class SliceFit:
    """Factors ``left`` (g, k, s, rank) and ``right`` (g, k, rank, p) of every slice, with what is known of them."""

    left: Tensor
    right: Tensor
    certificate: Certificate
    lower_bound: float
    method: str


def fit_slices(slices: Tensor, second_moment: Tensor | None, rank: int, sweeps: int) -> SliceFit:
    """The nearest matrix whose slices have a rank.

    Args:
        slices: (g, k, s, p): slice ``[g, k]`` holds the rows of group g at the columns of block k. Zero padding of
            whole rows or columns of a slice changes neither its singular values nor the bound.
        second_moment: (k * p, k * p) positive semidefinite in the order of the column blocks, or None.
        rank: of every slice, at most min(s, p).
        sweeps: how many passes over the column blocks may follow the closed-form start in the weighted norm.

    Cost: one batched SVD of the slices; a sweep costs ``out * in**2`` multiply-adds and eigenvectors of size min(s, p).
    """
    if second_moment is None:
        u, s, vh = torch.linalg.svd(slices, full_matrices=False)
        root = s[..., :rank].sqrt()
        tail = float(torch.linalg.norm(s[..., rank:]))
        left, right = u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]
        return SliceFit(left, right, Certificate.OPTIMAL, tail, "truncated SVD of every slice")
    weighted = _Weighted(slices, second_moment)
    left, right, tail = weighted.start(rank)
    if weighted.is_block_diagonal:
        return SliceFit(*_balance(left, right), Certificate.OPTIMAL, tail, "whitened truncated SVD of every slice")
    bound = weighted.lower_bound(rank, tail)
    left, right, spent = weighted.descend(left, right, sweeps)
    method = f"whitened truncated SVD of every slice, {spent} sweeps of block descent"
    certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
    return SliceFit(*_balance(left, right), certificate, bound, method)


class _Weighted:
    """What the weighted fits of one grid of slices share."""

    def __init__(self, slices: Tensor, moment: Tensor) -> None:
        self.groups, self.blocks, self.rows, self.width = slices.shape
        self.slices, self.moment = slices, moment
        grid = moment.reshape(self.blocks, self.width, self.blocks, self.width)
        own = torch.stack([grid[k, :, k] for k in range(self.blocks)])  # (k, p, p)
        values, vectors = torch.linalg.eigh(own)
        alive = values > _RANK_TOLERANCE * values.max().clamp(min=0.0)
        values = torch.where(alive, values, torch.zeros_like(values))
        inverse = torch.where(alive, values, torch.ones_like(values)).rsqrt() * alive
        self.root = (vectors * values.sqrt()[:, None, :]) @ vectors.mH
        self.inverse_root = (vectors * inverse[:, None, :]) @ vectors.mH
        self.support = (vectors * alive[:, None, :].to(vectors.dtype)) @ vectors.mH
        # what a slice does on inputs that never occur is free: it follows the matrix itself
        self.unseen = slices - slices @ self.support
        between = torch.linalg.norm(moment - torch.block_diag(*own))
        self.is_block_diagonal = bool(between <= _BLOCK_DIAGONAL * torch.linalg.norm(moment))

    def start(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """The optimum for the block diagonal of the second moment, and its error in that norm."""
        u, s, _ = torch.linalg.svd(self.slices @ self.root, full_matrices=False)
        left = u[..., :rank]
        return left, left.mH @ self.slices, float(torch.linalg.norm(s[..., rank:]))

    def lower_bound(self, rank: int, tail: float) -> float:
        """No member is nearer. With D the block diagonal of C and C >= mu D, errors are at least sqrt(mu) times those
        in the norm of D, whose optimum is known; and a row group has at most rank ``blocks * rank``."""
        size = self.blocks * self.width
        inverse = torch.block_diag(*self.inverse_root)
        missing = torch.eye(size, dtype=inverse.dtype) - torch.block_diag(*self.support)
        smallest = float(torch.linalg.eigvalsh(inverse @ self.moment @ inverse + missing)[0])
        # Subtracted: the rounding of the eigenvalue, so that the bound stays a bound.
        by_blocks = max(0.0, smallest - 1e-12 * size) ** 0.5 * tail
        if self.blocks * rank >= min(self.rows, size):
            return by_blocks
        whole = self._rows(self.slices)
        energy = torch.linalg.eigvalsh(whole @ self.moment @ whole.mH).clamp(min=0.0)
        beyond = energy[:, : self.rows - self.blocks * rank].sum() - 1e-12 * energy.sum()
        return max(by_blocks, float(beyond.clamp(min=0.0)) ** 0.5)

    def descend(self, left: Tensor, right: Tensor, sweeps: int) -> tuple[Tensor, Tensor, int]:
        """Sweeps of exact updates of one column block after the other; never ends worse than it starts."""
        rank = left.shape[-1]
        rest = self._rows(self.slices - left @ right)
        error = self._squared(rest)
        for number in range(sweeps):
            new_left, new_right = left.clone(), right.clone()
            rest = self._rows(self.slices - left @ right)
            for k in range(self.blocks):
                columns = slice(k * self.width, (k + 1) * self.width)
                member = new_left[:, k] @ new_right[:, k]
                reached = rest @ self.moment[:, columns] + member @ self.moment[columns, columns]
                inverse = self.inverse_root[k]
                whitened = reached @ inverse
                new_left[:, k] = leading_directions(whitened, rank)
                new_right[:, k] = new_left[:, k].mH @ (whitened @ inverse + self.unseen[:, k])
                rest[..., columns] += member - new_left[:, k] @ new_right[:, k]
            reduced = self._squared(rest)
            if not reduced < error:
                return left, right, number
            left, right, gain, error = new_left, new_right, error - reduced, reduced
            if gain <= _PROGRESS * error:
                return left, right, number + 1
        return left, right, sweeps

    def _rows(self, slices: Tensor) -> Tensor:
        """(g, k, s, p) to the rows of each group, (g, s, k * p)."""
        return slices.transpose(1, 2).reshape(self.groups, self.rows, self.blocks * self.width)

    def _squared(self, rest: Tensor) -> float:
        return float(((rest @ self.moment) * rest.conj()).sum().real)


def leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal (..., s, rank) that span the leading left singular directions of (..., s, p).

    By the eigenvectors of the smaller Gram matrix: several times faster than an SVD at half the digits, enough inside
    a descent.
    """
    rows, columns = matrix.shape[-2:]
    if rows <= columns:
        return torch.linalg.eigh(matrix @ matrix.mH)[1][..., rows - rank :]
    _, vectors = torch.linalg.eigh(matrix.mH @ matrix)
    return torch.linalg.qr(matrix @ vectors[..., columns - rank :])[0]


def _balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of ``left`` and rows of ``right`` scaled to equal norms; the products do not change."""
    a, b = torch.linalg.norm(left, dim=-2), torch.linalg.norm(right, dim=-1)
    alive = (a > 0) & (b > 0)
    scale = torch.where(alive, b / torch.where(alive, a, torch.ones_like(a)), torch.ones_like(a)).sqrt()
    return left * scale[..., None, :], right / scale[..., None]
