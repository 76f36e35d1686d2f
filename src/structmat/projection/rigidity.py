"""Matrix rigidity: how many entries must change for the rank to fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import qr
from torch import Tensor

from structmat.errors import ShapeError
from structmat.projection.project import make_target

_TRIALS = 256
"""Choices of rows and columns for one rank."""

_AT_ONCE = 1 << 22
"""Entries of matrices that are held at a time."""

_EXACT = 1e-9
"""Relative errors up to this count as equal after changes; singular values up to it as zero."""


@dataclass(frozen=True)
class Rigidity:
    """What :func:`rigidity` found: for each rank how many entries must change, at least and at most.

    Args:
        shape: of the matrix.
        ranks: from 0 on.
        lower: no fewer changes lower the rank to so much: proved.
        upper: so many do: found.
        rank: of the matrix itself.
    """

    shape: tuple[int, int]
    ranks: tuple[int, ...]
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    rank: int

    def numbers(self, rank: int) -> int:
        """The fewest numbers, ``rank * (out + in) + changes``, with which low rank plus sparse may store the matrix."""
        return rank * sum(self.shape) + self.lower[self.ranks.index(rank)]

    def __str__(self) -> str:
        lines = [f"{self.shape[0]} x {self.shape[1]}, rank {self.rank}", "rank  changes, at least  at most"]
        for r, low, high in zip(self.ranks, self.lower, self.upper, strict=True):
            lines.append(f"{r:4d}  {low:17d}  {high:7d}")
        return "\n".join(lines)

    def plot(self, axes: Any = None) -> Any:
        """Draw changed entries against rank, both bounds. Needs matplotlib (``pip install structmat[plot]``).

        Args:
            axes: of matplotlib; a new figure's by default.

        Returns:
            The axes.
        """
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(6, 4), layout="constrained").subplots()
        axes.fill_between(self.ranks, self.lower, self.upper, alpha=0.2, step=None)
        axes.plot(self.ranks, self.upper, marker="o", ms=3, label="found")
        axes.plot(self.ranks, self.lower, marker="o", ms=3, label="proved necessary")
        axes.set(
            xlabel="rank", ylabel="changed entries", title=f"Rigidity of a {self.shape[0]} x {self.shape[1]} matrix"
        )
        axes.legend()
        return axes


def rigidity(matrix: Tensor, ranks: Sequence[int] | None = None, *, seed: int = 0) -> Rigidity:
    """For each rank, how many entries of a matrix must change so that no more than this rank is left (Valiant 1977).

    Below: disjoint submatrices need changes of their own, each at least its rank less r, so that for every grid of
    blocks the sum over the blocks is a bound; the best of the grids of all sizes is taken. For the Hadamard matrix that
    is ``n^2 / (4 r)`` for r a power of two (Midrijanis 2005). Above: alternating projections on matrices of the rank
    and on sparse changes (Zhou and Tao 2011), with the number of changes lowered as far as it goes, and changing what
    lies outside of r rows and columns at most. The truth lies between; finding it is NP-hard.

    Args:
        matrix: (out, in), real or complex.
        ranks: from 0 to the smaller size, in any order; all (up to 16 of them evenly spaced) if None.
        seed: of the random choices.

    Cost: some hundred products of the size of the matrix for each rank, and the singular values of all its blocks.

    Raises:
        ShapeError: the matrix has not two axes, or a rank is none that it can have.
        DataError: an entry is NaN or infinite.
    """
    weight = make_target(matrix).weight
    rows, columns = weight.shape
    least = min(rows, columns)
    given: Sequence[object] = () if ranks is None else ranks
    wrong = [rank for rank in given if not (isinstance(rank, int) and 0 <= rank <= least)]
    if wrong:
        raise ShapeError(f"Ranks of a {rows} x {columns} matrix are integers from 0 to {least}; got {wrong}.")
    values = torch.linalg.svdvals(weight)
    own = int((values > _EXACT * float(values[0])).sum()) if float(values[0]) > 0 else 0
    if ranks is None:
        step = max(1, -(-least // 16))
        ranks = [*range(0, least, step), least]
    ranks = sorted(set(ranks))
    blocks = _block_ranks(weight, float(values[0]))
    lower, upper = [], []
    for rank in ranks:
        bound = max((sum(max(0, r - rank) for r in held) for held in blocks), default=0)
        high = _changes(weight, rank, own, seed)
        lower.append(bound if rank else int((weight != 0).sum()))
        upper.append(high)
    # Lower ranks need no fewer changes, whatever was found for each by itself.
    for i in range(1, len(upper)):
        upper[i] = min(upper[i], upper[i - 1])
    for i in range(len(lower) - 2, -1, -1):
        lower[i] = max(lower[i], lower[i + 1])
    return Rigidity((rows, columns), tuple(ranks), tuple(lower), tuple(upper), own)


def _block_ranks(weight: Tensor, scale: float) -> list[list[int]]:
    """The ranks of the blocks of grids of squares of every size, what does not fill a square being left out."""
    found = []
    size = min(weight.shape)
    while size >= 1:
        kept = weight[: weight.shape[0] // size * size, : weight.shape[1] // size * size]
        grid = kept.reshape(kept.shape[0] // size, size, kept.shape[1] // size, size).permute(0, 2, 1, 3)
        values = torch.linalg.svdvals(grid.reshape(-1, size, size))
        found.append([int(v) for v in (values > _EXACT * scale).sum(-1)])
        if size == 1:
            break
        size = size // 2 if size <= 4 or size % 2 == 0 else size - 1
    return found


def _changes(weight: Tensor, rank: int, own: int, seed: int) -> int:
    """A number of changes with which the rank is at most ``rank``: found by construction."""
    if rank >= own:
        return 0
    nonzeros = int((weight != 0).sum())
    if rank == 0:
        return nonzeros
    # What lies outside of the fullest rows, or columns, can be changed to nothing.
    by_rows = (weight != 0).sum(1).sort(descending=True).values
    by_columns = (weight != 0).sum(0).sort(descending=True).values
    best = min(nonzeros - int(by_rows[:rank].sum()), nonzeros - int(by_columns[:rank].sum()))
    return min(best, _crossed(weight, rank, seed))


def _crossed(weight: Tensor, rank: int, seed: int) -> int:
    """Changes that make a matrix the one of this rank that some of its rows and columns determine: the best of those
    that pivoting chooses and of random ones, of which one soon misses all entries that are out of place."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.rand(_TRIALS, count, generator=generator).argsort(1)[:, :rank] for count in (rows, columns)]
    dense = weight.numpy()
    first = qr(dense.conj().T, mode="economic", pivoting=True)[2][:rank]
    second = qr(dense[first], mode="economic", pivoting=True)[2][:rank]
    for picked, pivots in zip(chosen, (first, second), strict=True):
        picked[0] = torch.from_numpy(np.asarray(pivots, dtype=np.int64))
    floor = _EXACT * float(weight.abs().max())
    best = weight.numel()
    for at in torch.arange(_TRIALS).split(max(1, _AT_ONCE // weight.numel())):
        across, down = weight[chosen[0][at]], weight[:, chosen[1][at]].transpose(0, 1)
        core = torch.take_along_dim(across, chosen[1][at][:, None, :], 2)
        regular = torch.linalg.matrix_rank(core) == rank
        if not bool(regular.any()):
            continue
        made = down[regular] @ torch.linalg.solve(core[regular], across[regular])
        best = min(best, int(((weight - made).abs() > floor).sum((1, 2)).min()))
    return best
