"""Matrices cut into a grid of slices of low rank each: Monarch matrices and block tensor trains.

The rows fall into groups ``g``, the columns into blocks ``k``; slice ``(g, k)`` is an (s, p) matrix of rank at most
``rank``. The slices are disjoint, so in the Frobenius norm each is cut down by its own truncated SVD, and the whole is
optimal (Dao et al., "Monarch", ICML 2022, theorem 1).

In the norm ``||(W - S) C^(1/2)||`` the row groups stay independent but the column blocks of one group interact. With
all blocks but ``k`` fixed and ``E`` what they leave of ``W``, the best slice has a closed form again: completing the
square, ``||(E - X P_k) C^(1/2)||^2 = ||(E C[:, k] C[k, k]^+ - X) C[k, k]^(1/2)||^2 + constant``, a truncated SVD in
the whitened coordinates of the block. A moment of the outputs couples the row groups in the same way. Cycling over
the blocks descends monotonically, both factors of a slice at once. Where the moments are block diagonal in the grid
the start is optimal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from structmat.projection.target import Certificate, Target

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


def fit_slices(slices: Tensor, inputs: Blocks | None, outputs: Blocks | None, rank: int, sweeps: int) -> SliceFit:
    """The nearest matrix whose slices have a rank.

    Args:
        slices: (g, k, s, p): slice ``[g, k]`` holds the rows of group g at the columns of block k. Zero padding of
            whole rows or columns of a slice changes neither its singular values nor the bound.
        inputs: the second moment (k * p, k * p) in the order of the column blocks, or None for the identity.
        outputs: the moment (g * s, g * s) of the outputs in the order of the row groups, or None.
        rank: of every slice, at most min(s, p).
        sweeps: how many passes over the slices may follow the closed-form start in a weighted norm.

    Cost: one batched SVD of the slices; a sweep costs ``out * in**2`` multiply-adds (and ``out**2 * in`` with an output
    moment) and eigenvectors of size min(s, p).
    """
    if inputs is None and outputs is None:
        u, s, vh = torch.linalg.svd(slices, full_matrices=False)
        root = s[..., :rank].sqrt()
        tail = float(torch.linalg.norm(s[..., rank:]))
        left, right = u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]
        return SliceFit(left, right, Certificate.OPTIMAL, tail, "truncated SVD of every slice")
    weighted = _Weighted(slices, inputs, outputs)
    left, right, tail = weighted.start(rank)
    if weighted.is_separable:
        return SliceFit(*_balance(left, right), Certificate.OPTIMAL, tail, "whitened truncated SVD of every slice")
    bound = weighted.lower_bound(rank, tail)
    left, right, spent = weighted.descend(left, right, sweeps)
    method = f"whitened truncated SVD of every slice, {spent} sweeps of block descent"
    certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
    return SliceFit(*_balance(left, right), certificate, bound, method)


class Blocks:
    """``count`` diagonal blocks of a moment: roots, pseudo-inverse roots and the directions that occur."""

    def __init__(self, moment: Tensor, count: int) -> None:
        width = moment.shape[0] // count
        grid = moment.reshape(count, width, count, width)
        self.moment = moment
        self.own = torch.stack([grid[k, :, k] for k in range(count)])  # (count, width, width)
        values, vectors = torch.linalg.eigh(self.own)
        alive = values > _RANK_TOLERANCE * values.max().clamp(min=0.0)
        values = torch.where(alive, values, torch.zeros_like(values))
        inverse = torch.where(alive, values, torch.ones_like(values)).rsqrt() * alive
        self.root = (vectors * values.sqrt()[:, None, :]) @ vectors.mH
        self.inverse_root = (vectors * inverse[:, None, :]) @ vectors.mH
        self.support = (vectors * alive[:, None, :].to(vectors.dtype)) @ vectors.mH
        between = torch.linalg.norm(moment - torch.block_diag(*self.own))
        self.is_whole = bool(between <= _BLOCK_DIAGONAL * torch.linalg.norm(moment))

    @cached_property
    def smallest_share(self) -> float:
        """The largest known mu with ``C >= mu D``, D the block diagonal of C (on the directions that occur in D)."""
        if self.is_whole:
            return 1.0
        size = self.moment.shape[0]
        inverse = torch.block_diag(*self.inverse_root)
        missing = torch.eye(size, dtype=inverse.dtype) - torch.block_diag(*self.support)
        smallest = float(torch.linalg.eigvalsh(inverse @ self.moment @ inverse + missing)[0])
        return max(0.0, smallest - 1e-12 * size)  # less its rounding, so that a bound stays a bound


def input_blocks(target: Target, count: int) -> Blocks | None:
    """Blocks of the second moment of the inputs, made once; None for the identity."""
    moment = target.second_moment
    return None if moment is None else target.input_fact(("blocks", count), lambda: Blocks(moment, count))


def output_blocks(target: Target, count: int) -> Blocks | None:
    """The same for the moment of the outputs."""
    moment = target.output_moment
    return None if moment is None else target.output_fact(("blocks", count), lambda: Blocks(moment, count))


class _Weighted:
    """What the weighted fits of one grid of slices share."""

    def __init__(self, slices: Tensor, inputs: Blocks | None, outputs: Blocks | None) -> None:
        self.groups, self.blocks, self.rows, self.width = slices.shape
        self.slices, self.outputs = slices, outputs
        if inputs is None:
            inputs = Blocks(torch.eye(self.blocks * self.width, dtype=slices.dtype), self.blocks)
        self.inputs = inputs
        # what a slice does on inputs that never occur is free: it follows the matrix itself
        self.unseen = slices - slices @ self.inputs.support
        self.is_separable = self.inputs.is_whole and (self.outputs is None or self.outputs.is_whole)

    def start(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """The optimum for the block diagonals of the moments, scaled to fit best in the whole norm (so that it is never
        worse than zero), and its error in the norm of the block diagonals."""
        weighed = self._weigh(self.slices)
        u, s, _ = torch.linalg.svd(weighed @ self.inputs.root, full_matrices=False)
        tail = float(torch.linalg.norm(s[..., rank:]))
        left, right = self._unweigh(u[..., :rank]), u[..., :rank].mH @ weighed
        if not self.is_separable:
            member, whole = self._rows(left @ right), self._rows(self.slices)
            weighed = self._weighed(member)
            size = _real_inner(weighed, member)
            right = right * (_real_inner(weighed, whole) / size if size > 0 else 1.0)
        return left, right, tail

    def lower_bound(self, rank: int, tail: float) -> float:
        """No member is nearer. With D the block diagonal of C and C >= mu D, errors are at least sqrt(mu) times those
        in the norm of D, whose optimum is known; and the rows of a group have at most rank ``blocks * rank``."""
        share = self.inputs.smallest_share * (1.0 if self.outputs is None else self.outputs.smallest_share)
        by_blocks = share**0.5 * tail
        if self.outputs is not None or self.blocks * rank >= self.rows:
            return float(by_blocks)
        whole = self._rows(self.slices)
        energy = torch.linalg.eigvalsh(whole @ self.inputs.moment @ whole.mH).clamp(min=0.0)
        beyond = float((energy[:, : self.rows - self.blocks * rank].sum() - 1e-12 * energy.sum()).clamp(min=0.0))
        return float(max(by_blocks, beyond**0.5))

    def descend(self, left: Tensor, right: Tensor, sweeps: int) -> tuple[Tensor, Tensor, int]:
        """Sweeps of exact updates of one slice after the other; never ends worse than it starts.

        Without an output moment the groups are independent and are updated at once.
        """
        if sweeps == 0:
            return left, right, 0
        rest = self._rows(self.slices - left @ right)
        error = self._squared(rest)
        for number in range(sweeps):
            new_left, new_right = left.clone(), right.clone()
            rest = self._rows(self.slices - left @ right)
            for k in range(self.blocks):
                self._update_block(k, new_left, new_right, rest)
            reduced = self._squared(rest)
            if not reduced < error:
                return left, right, number
            left, right, gain, error = new_left, new_right, error - reduced, reduced
            if gain <= _PROGRESS * error:
                return left, right, number + 1
        return left, right, sweeps

    def _update_block(self, k: int, left: Tensor, right: Tensor, rest: Tensor) -> None:
        """Replace the slices of column block ``k``, each by the best one given all others; ``rest`` is W - S."""
        columns = slice(k * self.width, (k + 1) * self.width)
        own, inverse = self.inputs.own[k], self.inputs.inverse_root[k]
        reached = rest @ self.inputs.moment[:, columns]  # (g, s, p)
        rank = left.shape[-1]
        turns = [slice(None)] if self.outputs is None else [slice(g, g + 1) for g in range(self.groups)]
        for turn in turns:
            member = left[turn, k] @ right[turn, k]
            gradient = reached[turn] if self.outputs is None else self._unweigh(self._coupled(reached, turn), turn)
            whitened = (gradient + self._weigh(member, turn) @ own) @ inverse
            frame = leading_directions(whitened, rank)
            left[turn, k] = self._unweigh(frame, turn)
            right[turn, k] = frame.mH @ (whitened @ inverse + self._weigh(self.unseen[turn, k], turn))
            change = left[turn, k] @ right[turn, k] - member
            rest[turn, :, columns] -= change
            reached[turn] -= change @ own

    def _coupled(self, reached: Tensor, turn: slice) -> Tensor:
        """The rows of ``B @ reached`` that belong to the groups of a turn."""
        assert self.outputs is not None
        rows = slice(turn.start * self.rows, turn.stop * self.rows)
        coupled = self.outputs.moment[rows] @ reached.reshape(self.groups * self.rows, self.width)
        return coupled.reshape(-1, self.rows, self.width)

    def _weigh(self, slices: Tensor, turn: slice | None = None) -> Tensor:
        """Multiply the slices of row groups, (g, ..., s, n), by the root of their own block of the output moment."""
        return slices if self.outputs is None else self._rooted(self.outputs.root, slices, turn)

    def _unweigh(self, slices: Tensor, turn: slice | None = None) -> Tensor:
        return slices if self.outputs is None else self._rooted(self.outputs.inverse_root, slices, turn)

    @staticmethod
    def _rooted(root: Tensor, slices: Tensor, turn: slice | None) -> Tensor:
        own = root if turn is None else root[turn]
        return (own if slices.dim() == 3 else own[:, None]) @ slices

    def _rows(self, slices: Tensor) -> Tensor:
        """(g, k, s, p) to the rows of each group, (g, s, k * p)."""
        return slices.transpose(1, 2).reshape(self.groups, self.rows, self.blocks * self.width)

    def _squared(self, rows: Tensor) -> float:
        """The square of the target's norm, of the rows of groups."""
        return _real_inner(self._weighed(rows), rows)

    def _weighed(self, rows: Tensor) -> Tensor:
        """``B rows C``: with it inner products of the target's norm become plain ones."""
        weighed = rows @ self.inputs.moment
        if self.outputs is None:
            return weighed
        return (self.outputs.moment @ weighed.reshape(self.groups * self.rows, -1)).reshape(rows.shape)


def _real_inner(one: Tensor, other: Tensor) -> float:
    return float((one * other.conj()).sum().real)


def leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal (..., s, rank) that span the leading left singular directions of (..., s, p).

    By the eigenvectors of the smaller Gram matrix: several times faster than an SVD at half the digits, enough inside
    a descent.
    """
    rows, columns = matrix.shape[-2:]
    if rows <= columns:
        directions: Tensor = torch.linalg.eigh(matrix @ matrix.mH)[1]
        return directions[..., rows - rank :]
    _, vectors = torch.linalg.eigh(matrix.mH @ matrix)
    frame: Tensor = torch.linalg.qr(matrix @ vectors[..., columns - rank :])[0]
    return frame


def _balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of ``left`` and rows of ``right`` scaled to equal norms; the products do not change."""
    a, b = torch.linalg.norm(left, dim=-2), torch.linalg.norm(right, dim=-1)
    alive = (a > 0) & (b > 0)
    scale = torch.where(alive, b / torch.where(alive, a, torch.ones_like(a)), torch.ones_like(a)).sqrt()
    return left * scale[..., None, :], right / scale[..., None]
