"""BLAST: block-level adaptive structured matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self, final

from structmat.errors import StructureError
from structmat.program import Chain, Contraction, Program
from structmat.projection.blast import blast, lower_bound
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import round_up
from structmat.structure import (
    DENSE_GAIN,
    Normal,
    ParameterSpec,
    Shape,
    Structure,
    check_size,
    largest_fitting,
    whole,
)


@final
@dataclass(frozen=True)
class BLAST(Structure):
    """Blocks ``W_ij = U_i diag(s_ij) V_j^T``: bases shared along block rows and columns, a coupling of its own each.

    Tensors ``left`` (b1, out / b1, rank), ``coupling`` (b1, b2, rank) and ``right`` (b2, in / b2, rank);
    ``rank * (out + in + b1 * b2)`` parameters and multiply-adds; sizes that the blocks do not divide are padded. Holds
    low rank matrices of the same rank (all couplings one) and, for ``rank = b * t``, any blocks of rank ``t``.
    Projection: alternating least squares that never get worse, from the best low rank matrix and other starts; with a
    lower bound from the rank of a block row.
    Source: Lee et al., "BLAST: Block-Level Adaptive Structured Matrices for Efficient Deep Neural Network Inference"
    (NeurIPS 2024).

    Args:
        blocks: along each side, or a pair ``(b1, b2)`` along the outputs and the inputs.
        rank: an integer of at least 1 (more than the size of a block is allowed), or a fraction of the dense parameter
            count.
    """

    blocks: int | tuple[int, int] = 4
    rank: int | float = 8

    def __post_init__(self) -> None:
        given: object = self.blocks
        pair = given if isinstance(given, tuple) else (given, given)
        if len(pair) != 2 or not all(isinstance(b, int) and not isinstance(b, bool) and b >= 1 for b in pair):
            raise StructureError(
                f"BLAST(blocks={self.blocks!r}): blocks is an integer of at least 1, or a pair of them "
                "(along the outputs, along the inputs)."
            )
        check_size(self, "rank", self.rank)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along the outputs and along the inputs."""
        return self.blocks if isinstance(self.blocks, tuple) else (self.blocks, self.blocks)

    def restriction(self, shape: Shape) -> str | None:
        if self.grid[0] > shape[0] or self.grid[1] > shape[1]:
            return f"there are at most {shape[0]} x {shape[1]} blocks. Use blocks={min(shape)} or less."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        return round_up(shape[0], self.grid[0]), round_up(shape[1], self.grid[1])

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        (b1, b2), rank = self.grid, whole(self.rank)
        p, q = shape[0] // b1, shape[1] // b2
        return {
            "left": ParameterSpec((b1, p, rank), Normal((DENSE_GAIN / rank) ** 0.5)),
            "coupling": ParameterSpec((b1, b2, rank), Normal(b2**-0.5)),
            "right": ParameterSpec((b2, q, rank), Normal(q**-0.5)),
        }

    def program(self, shape: Shape) -> Program:
        (b1, b2), rank = self.grid, whole(self.rank)
        p, q = shape[0] // b1, shape[1] // b2
        return Chain(
            (
                Contraction("right", b2, rank, q, 1, transposed=True),
                Contraction("coupling", 1, b1, b2, rank),
                Contraction("left", b1, p, rank, 1),
            )
        )

    def project(self, target: Target) -> Fit:
        rank = whole(self.rank)
        found = blast(target, self.grid, rank)
        bound = lower_bound(target, self.grid, rank)
        certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
        tensors = {"left": found.u, "coupling": found.s, "right": found.v}
        return Fit(tensors, certificate, bound, "alternating least squares")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        found = [member for blocks in (4, 8, 16) if (member := cls._largest(blocks, shape, budget)) is not None]
        if not found:
            found = [member for blocks in (2, 1) if (member := cls._largest(blocks, shape, budget)) is not None][:1]
        yield from found

    @classmethod
    def _largest(cls, blocks: int, shape: Shape, budget: int) -> Self | None:
        if blocks > 1 and 2 * blocks > min(shape):
            return None
        native = cls(blocks, 1).native_shape(shape)
        rank = largest_fitting(lambda r: r * (sum(native) + blocks * blocks), budget, min(shape))
        return cls(blocks, rank) if rank else None
