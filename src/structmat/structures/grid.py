"""What the families of low-rank blocks on a grid share: its sizes, and which ranks are worth trying."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

from structmat.errors import StructureError
from structmat.sizes import round_up
from structmat.structure import Shape, Structure, check_count, check_size, largest_fitting


class OnGrid(Structure):
    """Families with fields ``blocks``, one number or (column blocks k, row blocks l), and ``rank`` of each block.

    They hold ``rank * (k * out + l * in)`` numbers, on sizes that k and l divide.
    """

    blocks: int | tuple[int, int]
    rank: int | float

    blocks_to_try: ClassVar[tuple[int, ...]] = (2, 4, 8)

    def __post_init__(self) -> None:
        if isinstance(self.blocks, tuple):
            if len(self.blocks) != 2:
                raise StructureError(
                    f"{type(self).__name__}(blocks={self.blocks!r}): blocks is an integer, or a pair of column and row "
                    "blocks."
                )
            for count in self.blocks:
                check_count(self, "blocks", count)
        else:
            check_count(self, "blocks", self.blocks)
        check_size(self, "rank", self.rank)

    @property
    def grid(self) -> tuple[int, int]:
        """(column blocks, row blocks)."""
        return self.blocks if isinstance(self.blocks, tuple) else (self.blocks, self.blocks)

    def restriction(self, shape: Shape) -> str | None:
        if max(self.grid) > max(shape):
            return f"there is nothing to put into so many blocks. Use blocks={max(shape)} or less."
        largest = _largest_rank(self.grid, shape)
        if isinstance(self.rank, int) and self.rank > largest:
            return f"with blocks={self.blocks} the rank of a block is at most {largest}. Use rank={largest} or less."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        k, l = self.grid
        return round_up(shape[0], l), round_up(shape[1], k)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        some = False
        for blocks in cls.blocks_to_try:
            if blocks > min(shape):
                break
            native = cls(blocks=blocks, rank=1).native_shape(shape)  # type: ignore[call-arg]
            # The inner widths, multiples of blocks * rank, are what lies on the machine's grid.
            rank = largest_fitting(
                lambda r, blocks=blocks, native=native: r * blocks * sum(native),
                budget,
                _largest_rank((blocks, blocks), shape),
                grid=max(1, 8 // blocks),
            )
            if rank:
                some = True
                yield cls(blocks=blocks, rank=rank)  # type: ignore[call-arg]
        if not some and sum(shape) <= budget:
            yield cls(blocks=1, rank=1)  # type: ignore[call-arg]


def _largest_rank(grid: tuple[int, int], shape: Shape) -> int:
    return min(-(-shape[0] // grid[1]), -(-shape[1] // grid[0]))
