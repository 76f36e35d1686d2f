"""Sums of structured matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self, final

import torch

from structmat.errors import StructureError
from structmat.program import Program, build, rename
from structmat.program import Sum as SumProgram
from structmat.projection.alternate import fit_sum, rank_bound, separation
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import ParameterSpec, Shape, Structure, count_stored, largest_fitting, resolve
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.low_rank import LowRank
from structmat.structures.parts import prefixed, scaled_specs
from structmat.structures.sparse import Sparse


@final
@dataclass(frozen=True, init=False)
class Sum(Structure):
    """``W = W0 + W1 + ...`` with a member of each part: ``Sum(LowRank(8), BlockDiagonal(4))``.

    Tensors are those of the parts, named ``term0_left``, ``term1_weight``, ...; parameters and operations add up. A
    fraction in a part is of the dense parameter count of the whole matrix. Projection: all parts jointly, by
    alternating projections of the residual, monotone and never worse than the best single part, for a low rank and a
    sparse part from robust principal component analysis too; no certificate (even low rank plus sparse is NP-hard), but
    a lower bound from the largest rank that the sum can have.

    Args:
        parts: the structures of the terms, at least one; sums and products too.
    """

    parts: tuple[Structure, ...]

    def __init__(self, *terms: Structure, parts: tuple[Structure, ...] = ()) -> None:
        object.__setattr__(self, "parts", (*terms, *parts))
        given: tuple[object, ...] = self.parts
        wrong = [part for part in given if not isinstance(part, Structure)]
        if wrong or not self.parts:
            raise StructureError(
                f"A Sum has at least one part, all of them structures; got {wrong or 'none'}. "
                "Use, for example, Sum(LowRank(8), Sparse(density=0.1))."
            )

    def resolve(self, shape: Shape) -> Sum:
        return Sum(*(resolve(part, shape) for part in self.parts))

    def restriction(self, shape: Shape) -> str | None:
        reasons = (part.restriction(shape) for part in self.parts)
        return next((reason for reason in reasons if reason is not None), None)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        merged: dict[str, ParameterSpec] = {}
        for index, part in enumerate(self.parts):
            # Independent terms of 1/k of the variance each; a part that can't be scaled keeps its own.
            factor = len(self.parts) ** -0.5 if part.closed_under_scaling else 1.0
            for name, spec in scaled_specs(part, shape, factor).items():
                merged[prefixed(_term(index), name)] = spec
        return merged

    def program(self, shape: Shape) -> Program:
        return SumProgram(
            tuple(
                rename(build(part, shape), lambda name, index=index: prefixed(_term(index), name))  # type: ignore[misc]
                for index, part in enumerate(self.parts)
            )
        )

    def project(self, target: Target) -> Fit:
        members = fit_sum(self.parts, target)
        tensors = {
            prefixed(_term(index), name): tensor
            for index, member in enumerate(members)
            for name, tensor in member.tensors.items()
        }
        rank = rank_bound(self.program(target.native))
        bound = float(torch.linalg.norm(target.whitened_svd[1][rank:])) if rank < min(target.native) else 0.0
        certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
        separated = separation(self.parts, target)
        method = "alternating projections"
        if separated is not None:
            method = f"robust principal component analysis, {method}: {separated.verdict}"
        return Fit(tensors, certificate, bound, method)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        seen: set[Structure] = set()
        for share in (8, 4, 2):  # the share of the second part is 1/8, 1/4, 1/2
            for second in (Sparse, BlockDiagonal):
                for part in second.configurations(shape, budget // share):
                    rank = largest_fitting(lambda r: r * sum(shape), budget - count_stored(part, shape), min(shape))
                    found = cls(LowRank(rank), part) if rank else None
                    if found is not None and found not in seen:
                        seen.add(found)
                        yield found
        if not seen and budget >= sum(shape) + 2:  # the cheapest pair: rank one and a single entry
            yield cls(LowRank(1), Sparse(nonzeros=1))


def SparsePlusLowRank(rank: int | float = 2, density: float = 0.1) -> Sum:
    """``Sum(LowRank(rank), Sparse(density=density))``: what robust principal component analysis looks for.

    Projection in the plain norm, up to 1024 x 1024: robust principal component analysis, then alternation for the given
    sizes. Its guarantee and conditions (incoherence, rank and density) are those of
    :func:`structmat.projection.robust.robust_pca`: where they hold and the sizes are large enough the parts come back
    exactly. Where it fails the projection's method says so and the result is that of the alternation, no worse than
    either part alone, with no guarantee. In weighted norms and above that size: alternation alone.

    Args:
        rank: an integer, or a fraction of the dense parameter count.
        density: the fraction of the entries that are nonzero in the sparse part.
    """
    return Sum(LowRank(rank), Sparse(density=density))


def _term(index: int) -> str:
    return f"term{index}"
