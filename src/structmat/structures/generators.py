"""What the families of a displacement rank share: members of a larger rank hold those of a smaller one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Self

from structmat.structure import Shape, Structure, check_size, largest_fitting


class OfDisplacementRank(Structure):
    """Families with a field ``rank``, the number of generators: an integer, or a fraction of the dense count."""

    rank: int | float

    by_default: ClassVar[bool] = False
    most_proposed: ClassVar[int | None] = None
    """A limit for families whose Krylov matrices are written out, of so many times the dense matrix's size."""

    def __post_init__(self) -> None:
        check_size(self, "rank", self.rank)

    def restriction(self, shape: Shape) -> str | None:
        if isinstance(self.rank, int) and self.rank > min(shape):
            return f"already rank={min(shape)} gives every matrix. Use rank={min(shape)} or less."
        return None

    @classmethod
    @abstractmethod
    def numbers(cls, rank: int, shape: Shape) -> int:
        """Parameters of a member of that rank."""

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        most = max(1, min(shape) // 4)  # with more, the parameters are nearly those of a dense matrix
        most = most if cls.most_proposed is None else min(most, cls.most_proposed)
        rank = largest_fitting(lambda r: cls.numbers(r, shape), budget, most, grid=1)
        if rank:
            yield cls(rank=rank)  # type: ignore[call-arg]
