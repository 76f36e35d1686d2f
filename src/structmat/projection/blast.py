"""Factorisation of a matrix into shared block bases and a coupling for each block (BLAST)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structmat.projection.low_rank import truncate
from structmat.projection.target import Target

_PROXIMITY = 1e-4
"""Weight of staying near the present values, relative to the mean curvature of a block problem."""

_SHRINKAGE = 0.5
"""By how much the proximity shrinks each sweep: at the end the updates are exact block solutions."""

_PATIENCE = 1e-6
"""The descent ends when a sweep lowers the squared error by less than this share."""


@dataclass(frozen=True)
class Factors:
    """``W_ij = u[i] @ diag(s[i, j]) @ v[j].T`` with u (b1, p, r), v (b2, q, r), s (b1, b2, r)."""

    u: Tensor
    v: Tensor
    s: Tensor

    def dense(self) -> Tensor:
        blocks = torch.einsum("ipr,ijr,jqr->ipjq", self.u, self.s, self.v)
        return blocks.reshape(self.u.shape[0] * self.u.shape[1], self.v.shape[0] * self.v.shape[1])


def from_low_rank(target: Target, blocks: tuple[int, int], rank: int) -> Factors:
    """The best matrix of that rank as a member: all couplings are one. A rank above the matrix's is filled with noise.

    The noise stands in the bases on one side only, so that it adds nothing to the product.
    """
    (height, width), (b1, b2) = target.native, blocks
    kept = min(rank, height, width)
    left, right, _ = truncate(target, kept)
    u, v = left.new_zeros(height, rank), left.new_zeros(width, rank)
    u[:, :kept], v[:, :kept] = left, right.T
    if rank > kept:
        noise = torch.randn(width, rank - kept, generator=target.generator(), dtype=torch.float64)
        v[:, kept:] = noise * torch.linalg.norm(right) / (width * kept) ** 0.5
    s = left.new_ones(b1, b2, rank)
    return Factors(u.reshape(b1, height // b1, rank), v.reshape(b2, width // b2, rank), s)


def from_blocks(target: Target, blocks: tuple[int, int], rank: int) -> Factors | None:
    """Every block by its own truncated SVD, in a Latin square of slots; None if the rank gives no slot to each block.

    Block (i, j) uses the slots of number ``(i + j) mod max(b1, b2)``, which no other block of its row or column uses.
    """
    (height, width), (b1, b2) = target.native, blocks
    p, q, most = height // b1, width // b2, max(blocks)
    share = min(rank // most, p, q)
    if share == 0 or most == 1:
        return None
    grid = target.weight.reshape(b1, p, b2, q).transpose(1, 2)
    left, values, right = torch.linalg.svd(grid, full_matrices=False)
    u, v = grid.new_zeros(b1, p, rank), grid.new_zeros(b2, q, rank)
    s = grid.new_zeros(b1, b2, rank)
    for i in range(b1):
        for j in range(b2):
            slots = slice((i + j) % most * share, ((i + j) % most + 1) * share)
            u[i, :, slots] = left[i, j, :, :share]
            v[j, :, slots] = right[i, j, :share].T
            s[i, j, slots] = values[i, j, :share]
    used = most * share
    if used < rank:  # what is left over takes the best low rank part of the rest
        rest = target.replace_weight(target.weight - Factors(u, v, s).dense())
        extra = from_low_rank(rest, blocks, rank - used)
        u[..., used:], v[..., used:], s[..., used:] = extra.u, extra.v, extra.s
    return Factors(u, v, s)


def from_noise(target: Target, blocks: tuple[int, int], rank: int) -> Factors:
    """Small random bases and couplings uniform in (0, 1)."""
    (height, width), (b1, b2) = target.native, blocks
    generator = target.generator()
    scale = float(torch.linalg.norm(target.weight) / (height * width) ** 0.5) ** 0.5
    u = torch.randn(b1, height // b1, rank, generator=generator, dtype=target.weight.dtype) * 1e-1 * scale
    v = torch.randn(b2, width // b2, rank, generator=generator, dtype=target.weight.dtype) * 1e-1 * scale
    s = torch.rand(b1, b2, rank, generator=generator, dtype=torch.float64).to(target.weight.dtype)
    return Factors(u, v, s)


class Descent:
    """Alternating exact (or, with a proximity, damped) block updates of u, v and s in the target's norm.

    Every update minimises the squared error over one block of variables plus a multiple of its squared change, so it
    never raises the error: the preconditioned alternating gradient descent of Lee et al., "BLAST: Block-Level Adaptive
    Structured Matrices" (NeurIPS 2024), with step one in the convention ``||.||^2 / 2``. In a weighted norm the column
    blocks are coupled through the second moment ``C``: they are updated one after the other. A sweep costs about
    ``6 out in rank`` multiply-adds, with a weight ``3 out in^2`` more, and ``b1 b2`` solves of size ``rank``.
    """

    def __init__(self, target: Target, factors: Factors) -> None:
        self.target, self.factors = target, factors
        self.moment = target.second_moment
        b2, q = factors.v.shape[:2]
        self._columns = [slice(j * q, (j + 1) * q) for j in range(b2)]
        self._rows = (factors.u.shape[0], factors.u.shape[1])
        self._inverses: list[Tensor] = []
        if self.moment is not None:
            own = torch.stack([self.moment[c, c] for c in self._columns])
            self._inverses = list(torch.linalg.pinv(own, rtol=1e-12, hermitian=True))
        self._refresh()

    def _refresh(self) -> None:
        self.left = self.target.weight - self.factors.dense()
        self.image = self.left if self.moment is None else self.left @ self.moment

    @property
    def squared(self) -> float:
        return float((self.image * self.left.conj()).real.sum().clamp(min=0.0))

    def sweep(self, proximity: float) -> None:
        self.update_u(proximity)
        self.update_v(proximity)
        self.update_s(proximity)

    def update_u(self, proximity: float) -> None:
        f = self.factors
        b1, p = self._rows
        rows = torch.einsum("ijr,jqr->irjq", f.s, f.v).reshape(b1, f.u.shape[2], -1)  # (b1, r, in)
        images = rows if self.moment is None else rows @ self.moment
        gram = images @ rows.mH
        pull = self.image.reshape(b1, p, -1) @ rows.mH
        change = _solve(gram.mT, pull.mT, proximity).mT
        self.factors = replace(f, u=f.u + change)
        self._refresh()

    def update_v(self, proximity: float) -> None:
        v = self.factors.v.clone()
        for j, columns in enumerate(self._columns):
            basis = (self.factors.u * self.factors.s[:, j, None]).flatten(0, 1)  # (out, r)
            pull = basis.mH @ self.image[:, columns]
            if self.moment is not None:
                pull = pull @ self._inverses[j]
            change = _solve(basis.mH @ basis, pull, proximity)
            v[j] += change.T
            self._subtract(basis @ change, columns)
        self.factors = replace(self.factors, v=v)

    def update_s(self, proximity: float) -> None:
        f = self.factors
        b1, p = self._rows
        s = f.s.clone()
        left_gram = f.u.mH @ f.u
        for j, columns in enumerate(self._columns):
            right = f.v[j].T  # (r, q)
            own = right if self.moment is None else right @ self.moment[columns, columns]
            curvature = left_gram * (own @ right.mH).T
            pull = ((f.u.mH @ self.image[:, columns].reshape(b1, p, -1)) * right.conj()).sum(2)
            change = _solve(curvature, pull[..., None], proximity)[..., 0]
            s[:, j] += change
            self._subtract(((f.u * change[:, None]) @ right).flatten(0, 1), columns)
        self.factors = replace(f, s=s)

    def _subtract(self, change: Tensor, columns: slice) -> None:
        self.left = self.left.clone()
        self.left[:, columns] -= change
        if self.moment is None:
            self.image = self.left
        else:
            self.image = self.image - change @ self.moment[columns]


def _solve(gram: Tensor, right: Tensor, proximity: float) -> Tensor:
    """``(gram + shift) x = right`` for (batches of) positive semidefinite systems, the shift relative to the trace."""
    size = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    eye = torch.eye(size, dtype=gram.dtype)
    shift = max(proximity, 1e-13)
    for _ in range(5):
        amount = (shift * mean).clamp(min=torch.finfo(mean.dtype).tiny)
        factor, info = torch.linalg.cholesky_ex(gram + amount[..., None, None] * eye)
        if not bool(info.any()):
            solution: Tensor = torch.cholesky_solve(right, factor)
            return solution
        shift *= 100.0
    return torch.zeros_like(right)


def descend(target: Target, factors: Factors, sweeps: int) -> tuple[Factors, float]:
    """Sweep until nothing is gained; returns the factors and their squared error. Monotone up to rounding."""
    run = Descent(target, factors)
    best = (factors, run.squared)
    proximity = _PROXIMITY
    for _ in range(sweeps):
        run.sweep(proximity)
        proximity *= _SHRINKAGE
        before, squared = best[1], run.squared
        if squared < before:
            best = (run.factors, squared)
        if before - squared <= _PATIENCE * before:
            break
    return best


def blast(target: Target, blocks: tuple[int, int], rank: int) -> Factors:
    """A member near the target: the best of several starts after descent, never worse than low rank of that rank.

    Starts are the best low rank matrix, the blocks by themselves and (with sweeps to spend) noise. All spend a quarter
    of the sweeps, the best one the rest. With 0 sweeps it is the better of the first two.
    """
    starts = [from_low_rank(target, blocks, rank)]
    latin = from_blocks(target, blocks, rank)
    starts += [] if latin is None else [latin]
    if target.sweeps == 0:
        return balance(min(starts, key=lambda f: target.squared(target.weight - f.dense())))
    if max(blocks) > 1:
        starts.append(from_noise(target, blocks, rank))
    quick = max(1, target.sweeps // 4)
    best = min((descend(target, start, quick) for start in starts), key=lambda trial: trial[1])
    return balance(descend(target, best[0], target.sweeps - quick)[0])


def balance(factors: Factors) -> Factors:
    """The same matrix with couplings of mean square one and bases of equal norms, slot by slot."""
    u, v, s = factors.u, factors.v, factors.s
    sizes = [torch.linalg.norm(t.reshape(-1, t.shape[2]), dim=0) for t in (u, v, s)]
    alive = (sizes[0] > 0) & (sizes[1] > 0) & (sizes[2] > 0)
    one = torch.ones_like(sizes[0])
    unit = torch.where(alive, sizes[2] / (s.shape[0] * s.shape[1]) ** 0.5, one)
    even = torch.where(alive, (sizes[1] / sizes[0].clamp(min=1e-300)).sqrt(), one)
    return Factors(u * even * unit.sqrt(), v / even * unit.sqrt(), s / unit)


def lower_bound(target: Target, blocks: tuple[int, int], rank: int) -> float:
    """No member has a smaller error: each block row has at most that rank, and without a weight each block column."""
    height, width = target.native
    rows = target.whitened.reshape(blocks[0], height // blocks[0], width)
    bound = float(torch.linalg.norm(torch.linalg.svdvals(rows)[:, rank:]))
    if target.second_moment is None:
        columns = target.weight.reshape(height, blocks[1], width // blocks[1]).transpose(0, 1)
        bound = max(bound, float(torch.linalg.norm(torch.linalg.svdvals(columns)[:, rank:])))
    return bound
