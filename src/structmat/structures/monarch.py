"""Monarch matrices: a grid of interleaved slices of low rank each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

from structmat.errors import StructureError
from structmat.program import Chain, Contraction, Program
from structmat.projection.slices import Blocks, fit_slices, input_blocks
from structmat.projection.target import Fit, Target
from structmat.structure import (
    DENSE_GAIN,
    Normal,
    ParameterSpec,
    Shape,
    Structure,
    check_count,
    check_size,
    largest_fitting,
    whole,
)

_BLOCKS_TO_TRY = (2, 4, 8, 16)


@final
@dataclass(frozen=True)
class Monarch(Structure):
    """Two block diagonal factors with a stride permutation between them.

    Cut the columns into k blocks of neighbours and the rows into l groups of every l-th row: each of the k x l slices
    has rank at most ``rank``. With ``p = in / k`` and ``s = out / l``, ``right`` is (k, rank * l, p), ``left`` is
    (s, k * rank, l), and no permutation is ever carried out: the second stage reads with a stride.

    ``rank * (k * out + l * in)`` parameters and multiply-adds; sizes that k or l does not divide are padded.
    ``blocks=1`` is low rank; ``blocks=sqrt(n)`` with rank 1 the classical Monarch matrix; ``blocks=(n // b, b)`` the
    class M^(b, n) (Dao et al., "Monarch", ICML 2022). Projection: truncated SVD of every slice, optimal; in an
    activation-weighted norm a monotone descent from the whitened slices, see :mod:`structmat.projection.slices`.

    Args:
        blocks: k = l, or a pair (k, l).
        rank: of a slice, an integer of at least 1, or a fraction of the dense parameter count.
    """

    weighs_outputs: ClassVar[bool] = True

    blocks: int | tuple[int, int] = 4
    rank: int | float = 1

    def __post_init__(self) -> None:
        if isinstance(self.blocks, tuple):
            if len(self.blocks) != 2:
                raise StructureError(
                    f"Monarch(blocks={self.blocks!r}): blocks is an integer, or a pair of column blocks and row groups."
                )
            for count in self.blocks:
                check_count(self, "blocks", count)
        else:
            check_count(self, "blocks", self.blocks)
        check_size(self, "rank", self.rank)

    @property
    def grid(self) -> tuple[int, int]:
        """(column blocks, row groups)."""
        return self.blocks if isinstance(self.blocks, tuple) else (self.blocks, self.blocks)

    def restriction(self, shape: Shape) -> str | None:
        if max(self.grid) > max(shape):
            return f"there is nothing to put into so many blocks. Use blocks={max(shape)} or less."
        largest = _largest_rank(self.grid, shape)
        if isinstance(self.rank, int) and self.rank > largest:
            return f"with blocks={self.blocks} the rank of a slice is at most {largest}. Use rank={largest} or less."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        k, l = self.grid
        return (-(-shape[0] // l) * l, -(-shape[1] // k) * k)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        (k, l), rank = self.grid, whole(self.rank)
        s, p = shape[0] // l, shape[1] // k
        return {
            "left": ParameterSpec((s, k * rank, l), Normal((DENSE_GAIN / (k * rank)) ** 0.5)),
            "right": ParameterSpec((k, rank * l, p), Normal(p**-0.5)),
        }

    def program(self, shape: Shape) -> Program:
        (k, l), rank = self.grid, whole(self.rank)
        s, p = shape[0] // l, shape[1] // k
        return Chain((Contraction("right", k, rank * l, p, 1), Contraction("left", 1, s, k * rank, l)))

    def project(self, target: Target) -> Fit:
        (k, l), rank = self.grid, whole(self.rank)
        s, p = target.native[0] // l, target.native[1] // k
        slices = target.weight.reshape(s, l, k, p).permute(1, 2, 0, 3)
        moment, outputs = target.output_moment, None
        if moment is not None:  # in the order of the row groups
            grouped = moment.reshape(s, l, s, l).permute(1, 0, 3, 2).reshape(s * l, s * l)
            outputs = target.output_fact(("strided blocks", l), lambda: Blocks(grouped, l))
        found = fit_slices(slices, input_blocks(target, k), outputs, rank, target.sweeps)
        tensors = {
            "left": found.left.permute(2, 1, 3, 0).reshape(s, k * rank, l),  # from (l, k, s, rank)
            "right": found.right.permute(1, 2, 0, 3).reshape(k, rank * l, p),  # from (l, k, rank, p)
        }
        return Fit(tensors, found.certificate, found.lower_bound, found.method)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        some = False
        for blocks in _BLOCKS_TO_TRY:
            if blocks > min(shape):
                break
            native = cls(blocks).native_shape(shape)
            # The inner widths, multiples of blocks * rank, are what lies on the machine's grid.
            rank = largest_fitting(
                lambda r, blocks=blocks, native=native: r * blocks * sum(native),
                budget,
                _largest_rank((blocks, blocks), shape),
                grid=max(1, 8 // blocks),
            )
            if rank:
                some = True
                yield cls(blocks, rank)
        if not some and sum(shape) <= budget:
            yield cls(1, 1)


def _largest_rank(grid: tuple[int, int], shape: Shape) -> int:
    return min(-(-shape[0] // grid[1]), -(-shape[1] // grid[0]))
