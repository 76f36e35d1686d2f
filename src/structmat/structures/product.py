"""Products of two structured matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self, final

import torch

from structmat.errors import StructureError
from structmat.program import Chain, Program, build, rename
from structmat.projection.alternate import rank_bound
from structmat.projection.product import fit_product
from structmat.projection.refine_outputs import refine_outputs
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import (
    DENSE_GAIN,
    ParameterSpec,
    Shape,
    Structure,
    check_count,
    count_stored,
    largest_fitting,
    resolve,
    whole,
)
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal
from structmat.structures.parts import prefixed, scaled_specs


@final
@dataclass(frozen=True)
class Product(Structure):
    """``W = left @ right`` with ``left`` (out, inner) and ``right`` (inner, in).

    Tensors are those of the factors, named ``left_weight``, ``right_weight``, ...; parameters and operations add up. A
    fraction in a factor is of the dense parameter count of that factor. Projection: the factors in turn, each by its
    own projection in the norm that the other makes, then descent in all tensors together; monotone, without a
    certificate, but with a lower bound from the largest rank that the product can have.

    Args:
        left: applied last.
        right: applied first.
        inner: the size between them; ``min(out, in)`` if None.
    """

    left: Structure
    right: Structure
    inner: int | None = None

    def __post_init__(self) -> None:
        given: tuple[object, ...] = (self.left, self.right)
        if not all(isinstance(factor, Structure) for factor in given):
            raise StructureError(
                f"A Product has two structures as factors; got {given[0]!r} and {given[1]!r}. "
                "Use, for example, Product(BlockDiagonal(4), Dense(), inner=64)."
            )
        if self.inner is not None:
            check_count(self, "inner", self.inner)

    def _shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        inner = whole(self.inner)
        return (shape[0], inner), (inner, shape[1])

    def resolve(self, shape: Shape) -> Product:
        inner = min(shape) if self.inner is None else self.inner
        return Product(resolve(self.left, (shape[0], inner)), resolve(self.right, (inner, shape[1])), inner)

    def restriction(self, shape: Shape) -> str | None:
        if self.inner is None:
            return None
        left, right = self._shapes(shape)
        return self.left.restriction(left) or self.right.restriction(right)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        factors = (self.left, self.right)
        free = [factor for factor in factors if factor.closed_under_scaling]
        own = DENSE_GAIN ** len(free)  # a family that can't be scaled has gain one
        factor = (DENSE_GAIN / own) ** (0.5 / max(1, len(free)))
        merged: dict[str, ParameterSpec] = {}
        for name, part, size in zip(("left", "right"), factors, self._shapes(shape), strict=True):
            specs = scaled_specs(part, size, factor if part.closed_under_scaling else 1.0)
            merged |= {prefixed(name, key): spec for key, spec in specs.items()}
        return merged

    def program(self, shape: Shape) -> Program:
        left, right = self._shapes(shape)
        return Chain(
            (
                rename(build(self.right, right), lambda name: prefixed("right", name)),
                rename(build(self.left, left), lambda name: prefixed("left", name)),
            )
        )

    def project(self, target: Target) -> Fit:
        left, right = fit_product(self.left, self.right, whole(self.inner), target)
        tensors = {prefixed("left", name): tensor for name, tensor in left.tensors.items()}
        tensors |= {prefixed("right", name): tensor for name, tensor in right.tensors.items()}
        found = Fit(tensors, Certificate.NONE, 0.0, "alternating projections")
        if self.left.closed_under_scaling and self.right.closed_under_scaling:
            found = refine_outputs(self, found, target)
        rank = rank_bound(self.program(target.native))
        bound = float(torch.linalg.norm(target.whitened_svd[1][rank:])) if rank < min(target.native) else 0.0
        certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
        return Fit(found.tensors, certificate, bound, found.method)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        """Low rank whose row spaces belong to groups of outputs, or whose column spaces belong to groups of inputs."""
        found = [
            cls(left, right, inner)
            for left, right in _grouped_factors()
            if (inner := cls._largest_inner(left, right, shape, budget)) > 0
        ]
        smallest = (cls(Dense(), Dense(), 1), cls(Diagonal(), Diagonal(), min(shape)))
        yield from found or [member for member in smallest if count_stored(member, shape) <= budget][:1]

    @classmethod
    def _largest_inner(cls, left: Structure, right: Structure, shape: Shape, budget: int) -> int:
        if min(shape) < 8:
            return 0
        return 4 * largest_fitting(  # four groups, so 32 in all is on the grid
            lambda r: count_stored(cls(left, right, 4 * r), shape), budget, min(shape) // 4
        )


def _grouped_factors() -> tuple[tuple[Structure, Structure], ...]:
    return (BlockDiagonal(4), Dense()), (Dense(), BlockDiagonal(4))
