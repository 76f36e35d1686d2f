"""Fits of sums of products of Krylov matrices, and where they start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.program import Program
from structmat.projection.descent import descend
from structmat.projection.displacement import finished, low_rank_factors
from structmat.projection.target import Fit, Target
from structmat.structure import DENSE_GAIN, Shape


@dataclass(frozen=True)
class Shift:
    """An operator that is the plain shift: ones below the diagonal, all else zero, corners included."""

    def values(self, size: int) -> Tensor:
        """What stands below the diagonal, and the corner."""
        values = torch.ones(size, dtype=torch.float64)
        values[-1] = 0.0
        return values

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        drawn = torch.zeros(shape, dtype=torch.float64)
        drawn.reshape(-1, shape[-1])[0] = self.values(shape[-1])
        return drawn.to(dtype=dtype, device=device)


def krylov_scales(shape: Shape, rank: int) -> tuple[float, float]:
    """Standard deviations of the left and right vectors that give a fresh matrix the variance of a dense layer's.

    For the plain shift, entry (i, j) is a sum of ``min(i, j) + 1`` products a term.
    """
    height, width = shape
    i, j = torch.arange(height)[:, None], torch.arange(width)
    terms = rank * float((torch.minimum(i, j) + 1).sum()) / height
    product = math.sqrt(DENSE_GAIN / terms)
    return math.sqrt(product), math.sqrt(product)


def fit_krylov(program: Program, operators: Mapping[str, Tensor], target: Target, rank: int) -> Fit:
    """A member near a target: generators for the plain shift, then descent over the operators too.

    With A and B^T the shift, ``M - A M B`` is ``sum of left[i] right[i]^T``, whatever the shape: its truncated SVD
    gives back every member with these operators.
    """
    weight = target.weight
    displacement = weight.clone()
    displacement[1:, 1:] -= weight[:-1, :-1]
    left, right = low_rank_factors(displacement, rank)
    tensors = {"left": left, "right": right, **{name: t.to(weight) for name, t in operators.items()}}
    start = finished(program, tensors, "left", target, 0.0, "truncated SVD of the displacement")
    found = descend(program, start.tensors, target)
    method = f"{start.method}, descent over the operators" if target.sweeps else start.method
    return Fit(found, start.certificate, 0.0, method)
