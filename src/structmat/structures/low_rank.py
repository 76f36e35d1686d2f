"""Low rank: the product of a tall and a wide matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

from structmat.program import Chain, Contraction, Program
from structmat.projection.low_rank import truncate
from structmat.projection.target import Certificate, Fit, Target
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
class LowRank(Structure):
    """``W = left @ right`` with ``left`` (out, rank) and ``right`` (rank, in).

    ``rank * (out + in)`` parameters and multiply-adds. Projection: truncated SVD, of the whitened matrix in an
    activation-weighted norm; optimal (Eckart and Young 1936).

    Args:
        rank: an integer of at least 1, or a fraction of the dense parameter count.
    """

    weighs_outputs: ClassVar[bool] = True

    rank: int | float

    def __post_init__(self) -> None:
        check_size(self, "rank", self.rank)

    def restriction(self, shape: Shape) -> str | None:
        if isinstance(self.rank, int) and self.rank > min(shape):
            return (
                f"its rank is at most {min(shape)}. "
                f"Use rank={min(shape)} or less, or rank=0.5 for half of the dense parameters."
            )
        return None

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        rank = whole(self.rank)
        return {
            "left": ParameterSpec((shape[0], rank), Normal((DENSE_GAIN / rank) ** 0.5)),
            "right": ParameterSpec((rank, shape[1]), Normal(shape[1] ** -0.5)),
        }

    def program(self, shape: Shape) -> Program:
        rank = whole(self.rank)
        return Chain((Contraction("right", 1, rank, shape[1], 1), Contraction("left", 1, shape[0], rank, 1)))

    def project(self, target: Target) -> Fit:
        left, right, tail = truncate(target, whole(self.rank))
        return Fit({"left": left, "right": right}, Certificate.OPTIMAL, tail, "truncated SVD")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        rank = largest_fitting(lambda r: r * sum(shape), budget, min(shape))
        if rank:
            yield cls(rank)
