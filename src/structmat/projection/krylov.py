"""Fits of sums of products of Krylov matrices, and where they start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.program import Program, apply
from structmat.projection.descent import descend
from structmat.projection.displacement import finished, low_rank_factors
from structmat.projection.found_operators import corners, subdiagonals
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
    gives back every member with these operators. So it does for subdiagonal operators that are found
    (:func:`structmat.projection.found_operators.subdiagonals`), which generic members of small ranks have.
    """
    weight = target.weight
    given = {name: t.to(weight) for name, t in operators.items()}
    (rows, columns), shift = target.native, Shift()
    plain = _with_subdiagonals(weight, given, shift.values(rows).to(weight), shift.values(columns).to(weight), rank)
    start = finished(program, plain, "left", target, 0.0, "truncated SVD of the displacement")
    for smaller in range(1, rank + 1):
        found = subdiagonals(weight, smaller)
        if found is not None:
            ends = corners(weight, *found, smaller) if rows == columns else (0.0, 0.0)
            below, beside = (torch.cat([t, t.new_tensor([end])]) for t, end in zip(found, ends, strict=True))
            own = _with_subdiagonals(weight, given, below, beside, rank)
            if member_error(program, own, target) < member_error(program, start.tensors, target):
                start = Fit(own, start.certificate, 0.0, "subdiagonals found, truncated SVD of the displacement")
            break
    tensors = descend(program, start.tensors, target)
    method = f"{start.method}, descent over the operators" if target.sweeps else start.method
    return Fit(tensors, start.certificate, 0.0, method)


def member_error(program: Program, tensors: Mapping[str, Tensor], target: Target) -> float:
    """How far the matrix of a program with these tensors is from a target, in its norm."""
    eye = torch.eye(target.native[1], dtype=target.weight.dtype)
    return target.error(apply(program, tensors, eye).T)


def _with_subdiagonals(
    weight: Tensor, operators: Mapping[str, Tensor], below: Tensor, beside: Tensor, rank: int
) -> dict[str, Tensor]:
    """All tensors for operators with these numbers below their diagonals and, last, in their corners, else zero.

    ``M - A M B`` is ``(1 - f) sum of left[i] right[i]^T``, f being the product of all these numbers: corners are those
    of square matrices.
    """
    displacement = weight - below.roll(1)[:, None] * beside.roll(1) * weight.roll((1, 1), (0, 1))
    left, right = low_rank_factors(displacement, rank)
    tensors = {"left": left / (1 - below.prod() * beside.prod()), "right": right}
    for name, values in (("left_operator", below), ("right_operator", beside)):
        tensors[name] = torch.zeros_like(operators[name])
        tensors[name].reshape(-1, len(values))[0] = values
    return tensors
