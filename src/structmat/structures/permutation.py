"""Permutations, fixed and soft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.program import Permute, Program
from structmat.projection.assignment import assigned
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import ParameterSpec, Shape, Structure


@dataclass(frozen=True)
class RandomOrder:
    """A permutation of 0, 1, 2, ..., all equally likely."""

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.randperm(shape[0], generator=generator).to(dtype=dtype, device=device)


def square_only(structure: Structure, shape: Shape) -> str | None:
    """The restriction of families of square matrices."""
    if shape[0] != shape[1]:
        return f"its matrices are square. Use the shape ({shape[0]}, {shape[0]})."
    return None


@final
@dataclass(frozen=True)
class Permutation(Structure):
    """``y[i] = x[order[i]]``, square: ``order`` (n,) is fixed, nothing is learned, a product moves n numbers.

    Projection: the assignment of outputs to inputs with the largest sum of entries, which is optimal in the Frobenius
    norm (and recovers a permutation from noise); in a weighted norm the same for the whitened correlations, without a
    certificate. Learned permutations are :class:`SoftPermutation`, which hardens to this.
    Source: Kuhn 1955; Crouse 2016 for the algorithm (``scipy.optimize.linear_sum_assignment``, O(n^3)).
    """

    closed_under_scaling: ClassVar[bool] = False
    by_default: ClassVar[bool] = False

    def restriction(self, shape: Shape) -> str | None:
        return square_only(self, shape)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return {"order": ParameterSpec((shape[0],), RandomOrder(), learned=False, dtype=torch.int64)}

    def program(self, shape: Shape) -> Program:
        return Permute("order", shape[0])

    def project(self, target: Target) -> Fit:
        order = assigned(target)
        if target.second_moment is not None or target.output_moment is not None:
            return Fit({"order": order}, Certificate.NONE, 0.0, "linear assignment of weighted correlations")
        dense = torch.eye(len(order), dtype=target.weight.dtype)[order]
        return Fit({"order": order}, Certificate.OPTIMAL, target.error(dense), "linear assignment")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if shape[0] == shape[1] and shape[0] <= budget:
            yield cls()
