"""What a matrix may be named after, and the numbers that say how structured it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from structmat.projection.target import Target

NEAR = 0.02
"""A matrix is nearly what it is within this relative error of."""


@dataclass(frozen=True, eq=False)
class Trait:
    """One thing that a matrix is, or is near to.

    Args:
        name: with an article: ``"a banded matrix of bandwidth 2"``.
        error: relative, in the Frobenius norm.
        numbers: that describe it.
        rows, columns: the orders that show it, ``W[rows][:, columns]``; None for the given ones.
        family: of the library whose member it is, by name; empty where none holds it as it is.
    """

    name: str
    error: float
    numbers: int
    rows: Tensor | None = None
    columns: Tensor | None = None
    family: str = ""


@dataclass(frozen=True)
class Measures:
    """Numbers that say how structured a matrix is, to the tolerance of its dtype.

    Args:
        rank: singular values that are not rounding.
        block_ranks: the largest rank of a block, by the number of blocks of a side (2, 4, 8).
        kronecker_rank: the least number of Kronecker products over shapes of factors, and the shape of the left one.
        density: share of the entries that are not zero.
        bandwidth: the largest distance from the diagonal of an entry that is not zero.
        reordered_bandwidth: the same after reordering rows and columns alike (Cuthill and McKee); None if not square.
        butterfly, monarch: relative errors of the nearest ones, in the given order.
        permuted_butterfly, permuted_monarch: the same in the best of the usual orders.
        reordered_butterfly, reordered_monarch: the same with rows and columns put in the order that quotients of rows
            suggest; None if they suggest none.
        displacement: ranks of the displacement under each pair of operators, by its name; nodes are those of a fresh
            matrix of the family.
    """

    rank: int
    block_ranks: dict[int, int]
    kronecker_rank: tuple[int, tuple[int, int]] | None
    density: float
    bandwidth: int
    reordered_bandwidth: int | None
    butterfly: float | None
    monarch: float | None
    permuted_butterfly: float | None
    permuted_monarch: float | None
    reordered_butterfly: float | None
    reordered_monarch: float | None
    displacement: Mapping[str, int]

    @property
    def sentence(self) -> str:
        """All of them in words."""
        said = [f"rank {self.rank}"]
        said += [f"blocks of a {count} x {count} grid of rank {rank}" for count, rank in self.block_ranks.items()]
        if self.kronecker_rank is not None:
            (rank, (rows, columns)) = self.kronecker_rank
            said.append(f"Kronecker rank {rank} with {rows} x {columns} factors")
        said += [f"{self.density:.1%} of the entries", f"bandwidth {self.bandwidth}"]
        if self.reordered_bandwidth is not None and self.reordered_bandwidth < self.bandwidth:
            said.append(f"{self.reordered_bandwidth} reordered")
        for name, error in (
            ("butterfly", self.butterfly),
            ("butterfly in a usual order", self.permuted_butterfly),
            ("butterfly reordered", self.reordered_butterfly),
            ("Monarch", self.monarch),
            ("Monarch in a usual order", self.permuted_monarch),
            ("Monarch reordered", self.reordered_monarch),
        ):
            if error is not None:
                said.append(f"{name} error {error:.2g}")
        if self.displacement:
            said.append(
                "displacement ranks " + ", ".join(f"{rank} ({name})" for name, rank in self.displacement.items())
            )
        return ", ".join(said) + "."


@dataclass(frozen=True)
class Subject:
    """A matrix with what all detectors need of it."""

    target: Target
    tolerance: float
    measures: Measures

    @property
    def weight(self) -> Tensor:
        return self.target.weight

    @property
    def norm(self) -> float:
        return self.target.norm()


Detector = Callable[[Subject], Iterator[Trait]]
