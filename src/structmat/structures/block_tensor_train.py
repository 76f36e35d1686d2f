"""Block tensor trains: a grid of contiguous blocks of low rank each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

from structmat.errors import StructureError
from structmat.program import Chain, Contraction, Program, Shuffle
from structmat.projection.slices import fit_slices, input_blocks, output_blocks
from structmat.projection.target import Fit, Target
from structmat.sizes import even_factors
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


@final
@dataclass(frozen=True)
class BlockTensorTrain(Structure):
    """Block tensor train with two cores: with out = m1 * m2 and in = n2 * n1, every contiguous m2 x n1 block has
    rank at most ``rank``.

    ``right`` is (n2, m1 * rank, n1), ``left`` (m1, m2, n2 * rank): two batched products with one transposition of
    axes between them. ``rank * (n1 * n2 * m1 + m1 * m2 * n2)`` parameters and multiply-adds. Sizes without even
    factors are padded. Rank 1 is a Monarch matrix up to the order of the outputs. Projection: truncated SVD of every
    block, optimal; in an activation-weighted norm a monotone descent, see :mod:`structmat.projection.slices`.
    Source: Qiu et al., "Compute Better Spent: Replacing Dense Layers with Structured Matrices" (ICML 2024).

    Args:
        rank: of a block, an integer of at least 1, or a fraction of the dense parameter count.
        out_factors: (m1, m2); chosen as even as possible where not given.
        in_factors: (n2, n1); likewise.
    """

    weighs_outputs: ClassVar[bool] = True

    rank: int | float = 2
    out_factors: tuple[int, int] | None = None
    in_factors: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_size(self, "rank", self.rank)
        for name, factors in (("out_factors", self.out_factors), ("in_factors", self.in_factors)):
            if factors is None:
                continue
            if len(factors) != 2:
                raise StructureError(f"BlockTensorTrain({name}={factors!r}): there are two cores, so give two factors.")
            for factor in factors:
                check_count(self, name, factor)

    def resolve(self, shape: Shape) -> Self:
        rows, columns = self.out_factors, self.in_factors
        if rows is None:
            rows = _pair(shape[0])
        if columns is None:
            columns = _pair(shape[1])
        return replace(self, out_factors=rows, in_factors=columns)

    def restriction(self, shape: Shape) -> str | None:
        m1, m2, n2, n1 = self._factors
        if m1 * m2 < shape[0] or n1 * n2 < shape[1]:
            return f"its factors make a matrix of shape {(m1 * m2, n1 * n2)}. Use larger factors, or leave them out."
        if isinstance(self.rank, int) and self.rank > min(m2, n1):
            return f"the rank of a {m2} x {n1} block is at most {min(m2, n1)}. Use rank={min(m2, n1)} or less."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        m1, m2, n2, n1 = self._factors
        return (m1 * m2, n2 * n1)

    @property
    def _factors(self) -> tuple[int, int, int, int]:
        assert self.out_factors is not None, f"unresolved {self}"
        assert self.in_factors is not None, f"unresolved {self}"
        return (*self.out_factors, *self.in_factors)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        (m1, m2, n2, n1), rank = self._factors, whole(self.rank)
        return {
            "left": ParameterSpec((m1, m2, n2 * rank), Normal((DENSE_GAIN / (n2 * rank)) ** 0.5)),
            "right": ParameterSpec((n2, m1 * rank, n1), Normal(n1**-0.5)),
        }

    def program(self, shape: Shape) -> Program:
        (m1, m2, n2, n1), rank = self._factors, whole(self.rank)
        return Chain(
            (
                Contraction("right", n2, m1 * rank, n1, 1),
                Shuffle((n2, m1, rank), (1, 0, 2)),
                Contraction("left", m1, m2, n2 * rank, 1),
            )
        )

    def project(self, target: Target) -> Fit:
        (m1, m2, n2, n1), rank = self._factors, whole(self.rank)
        slices = target.weight.reshape(m1, m2, n2, n1).permute(0, 2, 1, 3)
        found = fit_slices(slices, input_blocks(target, n2), output_blocks(target, m1), rank, target.sweeps)
        tensors = {
            "left": found.left.permute(0, 2, 1, 3).reshape(m1, m2, n2 * rank),  # from (m1, n2, m2, rank)
            "right": found.right.permute(1, 0, 2, 3).reshape(n2, m1 * rank, n1),  # from (m1, n2, rank, n1)
        }
        return Fit(tensors, found.certificate, found.lower_bound, found.method)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        rows, columns = _pair(shape[0]), _pair(shape[1])
        (m1, m2), (n2, n1) = rows, columns
        rank = largest_fitting(lambda r: r * (n1 * n2 * m1 + m1 * m2 * n2), budget, min(m2, n1))
        if rank:
            yield cls(rank, rows, columns)


def _pair(size: int) -> tuple[int, int]:
    first, second = even_factors(size, 2)
    return first, second
