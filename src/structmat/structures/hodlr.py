"""Hierarchically off-diagonal low rank matrices, with nested bases as an option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

from structmat.errors import StructureError
from structmat.program import Chain, Contraction, Crop, Pad, Program, Shuffle, Sum
from structmat.projection.halves import fit_nested, fit_separate
from structmat.projection.target import Fit, Target
from structmat.sizes import round_up
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
class HODLR(Structure):
    """Halved again and again along the diagonal: what lies off the diagonal of a halving has low rank.

    At level t the diagonal falls into ``2^t`` blocks; the two blocks beside each pair of them are
    ``lower_left{t} lower_right{t}`` and ``upper_left{t} upper_right{t}`` (first axis: the pair), of rank at most
    ``rank``. ``leaf`` holds the diagonal blocks of the last level. ``rank (out + in)`` parameters and multiply-adds a
    level and ``out in / 2^levels`` for the leaves.

    With ``nested`` bases (hierarchically semiseparable matrices) each off-diagonal block of a level is
    ``left basis x (rank, rank) coupling x right basis``, and the bases of a level are made of those of the next one by
    transfers: parameters no longer grow with the number of levels. Sizes that ``2^levels`` does not divide are padded.

    Projection: truncated SVD of each off-diagonal block, optimal; nested, by orthonormal bases from the last level up,
    with that as a lower bound. In an activation-weighted norm refined by alternating least squares.
    Source: Ambikasaran and Darve (Journal of Scientific Computing 2013); nested: Chandrasekaran, Gu and Pals (SIMAX
    2006), Xia et al. (2010).

    Args:
        levels: number of halvings.
        rank: of an off-diagonal block, or a fraction of the dense parameter count; less where a block is smaller.
        nested: whether bases are nested.
    """

    levels: int = 2
    rank: int | float = 1
    nested: bool = False

    by_default: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, "levels", self.levels)
        check_size(self, "rank", self.rank)
        if not isinstance(self.nested, bool):
            raise StructureError(f"HODLR(nested={self.nested!r}): nested is True or False.")

    def restriction(self, shape: Shape) -> str | None:
        most = max(1, min(shape)).bit_length() - 1
        if self.levels > max(1, most):
            return f"{min(shape)} can be halved {most} times. Use levels={max(1, most)} or less."
        height, width = self._block(self.native_shape(shape), self.levels if self.nested else 1)
        if isinstance(self.rank, int) and self.rank > min(height, width):
            return (
                f"the {'smallest' if self.nested else 'largest'} off-diagonal blocks have rank {min(height, width)} or "
                f"less. Use rank={min(height, width)} or less."
            )
        return None

    def native_shape(self, shape: Shape) -> Shape:
        count = 2**self.levels
        return round_up(shape[0], count), round_up(shape[1], count)

    def _block(self, shape: Shape, level: int) -> Shape:
        return shape[0] >> level, shape[1] >> level

    def _rank(self, shape: Shape, level: int) -> int:
        return min(whole(self.rank), *self._block(shape, level))

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        # Every entry has the variance of a dense matrix's.
        variance = DENSE_GAIN / shape[1]
        height, width = self._block(shape, self.levels)
        found = {"leaf": ParameterSpec((2**self.levels, height, width), Normal(variance**0.5))}
        if self.nested:
            return {**found, **self._nested_parameters(shape, variance)}
        for level in range(1, self.levels + 1):
            (height, width), rank, pairs = self._block(shape, level), self._rank(shape, level), 2 ** (level - 1)
            for side in ("lower", "upper"):
                left = Normal((variance * width / rank) ** 0.5)
                found[f"{side}_left{level}"] = ParameterSpec((pairs, height, rank), left)
                found[f"{side}_right{level}"] = ParameterSpec((pairs, rank, width), Normal(width**-0.5))
        return found

    def _nested_parameters(self, shape: Shape, variance: float) -> dict[str, ParameterSpec]:
        (height, width), rank = self._block(shape, self.levels), whole(self.rank)
        count = 2**self.levels
        found = {
            "left_basis": ParameterSpec((count, height, rank), Normal(rank**-0.5)),
            "right_basis": ParameterSpec((count, rank, width), Normal(rank**-0.5)),
        }
        # A basis entry has mean square 1 / rank at each level: transfers sum rank products of mean square 1 / rank^2.
        for level in range(1, self.levels + 1):
            pairs = 2 ** (level - 1)
            for side in ("lower", "upper"):
                found[f"{side}{level}"] = ParameterSpec((pairs, rank, rank), Normal(variance**0.5))
            if level > 1:
                found[f"left_transfer{level}"] = ParameterSpec((pairs, 2 * rank, rank), Normal(rank**-0.5))
                found[f"right_transfer{level}"] = ParameterSpec((pairs, rank, 2 * rank), Normal(rank**-0.5))
        return found

    def program(self, shape: Shape) -> Program:
        height, width = self._block(shape, self.levels)
        leaves = Contraction("leaf", 2**self.levels, height, width, 1)
        if self.nested:
            rank, count = whole(self.rank), 2**self.levels
            inner = self._nested_inner(self.levels)
            down = Contraction("right_basis", count, rank, width, 1)
            return Sum((leaves, Chain((down, inner, Contraction("left_basis", count, height, rank, 1)))))
        parts: list[Program] = [leaves]
        for level in range(1, self.levels + 1):
            (height, width), rank, pairs = self._block(shape, level), self._rank(shape, level), 2 ** (level - 1)
            for side in ("lower", "upper"):
                factors = (
                    Contraction(f"{side}_right{level}", pairs, rank, width, 1),
                    Contraction(f"{side}_left{level}", pairs, height, rank, 1),
                )
                parts.append(_beside(side, pairs, height, width, factors))
        return Sum(tuple(parts))

    def _nested_inner(self, level: int) -> Program:
        """From the coefficients of the right bases of a level to those of the left ones."""
        rank, pairs = whole(self.rank), 2 ** (level - 1)
        parts: list[Program] = []
        for side in ("lower", "upper"):
            coupling = (Contraction(f"{side}{level}", pairs, rank, rank, 1),)
            parts.append(_beside(side, pairs, rank, rank, coupling))
        if level > 1:
            down = Contraction(f"right_transfer{level}", pairs, rank, 2 * rank, 1)
            up = Contraction(f"left_transfer{level}", pairs, 2 * rank, rank, 1)
            parts.append(Chain((down, self._nested_inner(level - 1), up)))
        return Sum(tuple(parts))

    def project(self, target: Target) -> Fit:
        program = self.program(target.native)
        if self.nested:
            return fit_nested(program, target, self.levels, whole(self.rank))
        ranks = [self._rank(target.native, level) for level in range(1, self.levels + 1)]
        return fit_separate(program, target, ranks)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        for leaf in (64, 16, 2):
            levels = max(1, (max(1, min(shape) // leaf)).bit_length() - 1)
            if levels > max(1, min(shape).bit_length() - 1) or min(shape) < 2:
                continue
            some = False
            for nested in (False, True):
                if nested and levels < 2:
                    continue
                height, width = cls(levels).native_shape(shape)
                most = min(height, width) >> (levels if nested else 1)
                rank = largest_fitting(
                    lambda r, levels=levels, nested=nested: _stored(cls(levels, r, nested), shape), budget, most
                )
                if rank:
                    some = True
                    yield cls(levels, rank, nested)
            if some:
                return


def _stored(structure: HODLR, shape: Shape) -> int:
    return sum(spec.numel for spec in structure.parameters(structure.native_shape(shape)).values())


def _beside(side: str, pairs: int, height: int, width: int, factors: tuple[Contraction, ...]) -> Program:
    """The lower left or upper right quarter of each of ``pairs`` diagonal blocks of twice (height, width)."""
    read, write = (0, 1) if side == "lower" else (1, 0)
    return Chain(
        (
            Shuffle((pairs, 2, width), (1, 0, 2)),
            Crop(2 * pairs * width, pairs * width, read * pairs * width),
            *factors,
            Pad(pairs * height, 2 * pairs * height, write * pairs * height),
            Shuffle((2, pairs, height), (1, 0, 2)),
        )
    )
