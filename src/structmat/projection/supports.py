"""Which entries a sparse matrix should keep where inputs and outputs are weighed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from structmat.projection.target import Target

_FIRST_PENALTY, _LAST_PENALTY = 0.02, 1.0
"""Of the distance between the two copies of the matrix, in units of the mean eigenvalue of the norm: it rises evenly in
its logarithm. Measured on layers of a language model, a ResNet and an LSTM at 10 to 50 % of the entries: first values
from .01 to .03 and last ones from .5 to 3 are alike."""

_RELAXATION = 1.6
"""Of the iteration: 1 is none. With 1.6 forty iterations reach what takes eighty with 1."""

_T = TypeVar("_T")

Fact = Callable[[str, Callable[[], _T]], _T]
"""``Target.input_fact`` or ``Target.output_fact``."""


@dataclass(frozen=True)
class Correlation:
    """A moment ``M`` as ``D^(1/2) U diag(values) U^H D^(1/2)`` with ``D = diag(M)``.

    Args:
        scale: ``D^(1/2)``; zero for what never occurs.
        values: of the correlation, rising.
        vectors: ``U``.
    """

    scale: Tensor
    values: Tensor
    vectors: Tensor


def correlation(moment: Tensor, fact: Fact[Correlation]) -> Correlation:
    """That of a moment, made once for all targets that have it."""

    def make() -> Correlation:
        scale = moment.diagonal().real.clamp(min=0.0).sqrt()
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
        values, vectors = torch.linalg.eigh(moment * inverse * inverse[:, None])
        return Correlation(scale, values, vectors)

    return fact("correlation", make)


def largest(scores: Tensor, count: int) -> Tensor:
    """A boolean mask of the ``count`` largest entries."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.topk(scores.reshape(-1), count, sorted=False).indices] = True
    return mask.reshape(scores.shape)


def alternating(target: Target, nonzeros: int, iterations: int) -> tuple[Tensor, Tensor]:
    """A matrix with so many entries near a target with moments, and their mask, by the alternating direction method of
    multipliers (Boyd et al. 2011, section 9.1).

    Of two copies of the matrix one is free and near the target, in closed form since the eigenvectors of the moments
    of inputs and outputs diagonalise their norm; the other has the largest entries of the first, moved by what they
    disagreed on so far. However ill-conditioned the moments are, entries that make up for each other are weighed
    together, which scores of single entries cannot do. For inputs alone this is the way of Meng et al. ("ALPS", 2024).
    Entries are scaled by the diagonals of the moments, so that the largest are those that cost most.

    The search runs in single precision; the values are near the least squares solution on their support. Cost: an
    eigendecomposition of each moment and, in each iteration, two products with each of these.

    Args:
        target: with at least one moment.
        nonzeros: how many.
        iterations: in all.
    """
    weight = target.weight
    wide = torch.complex64 if weight.is_complex() else torch.float32
    columns = _Side.of(target.second_moment, target.native[1], target.input_fact, wide)
    rows = _Side.of(target.output_moment, target.native[0], target.output_fact, wide)
    scale = torch.outer(rows.scale, columns.scale)
    norm = torch.outer(rows.values, columns.values)

    def rotated(matrix: Tensor, back: bool = False) -> Tensor:
        return columns.after(rows.before(matrix, back), back)

    sparse = (weight * scale).to(wide)
    wanted = rotated(sparse) * norm
    owed = torch.zeros_like(sparse)
    mask = torch.ones(target.native, dtype=torch.bool)
    penalty, growth = _FIRST_PENALTY, (_LAST_PENALTY / _FIRST_PENALTY) ** (1 / max(1, iterations - 1))
    for _ in range(iterations):
        free = rotated((wanted + penalty * rotated(sparse - owed)) / (norm + penalty), back=True)
        moved = _RELAXATION * free + (1 - _RELAXATION) * sparse + owed
        mask = largest(moved.abs(), nonzeros)
        sparse = torch.where(mask, moved, torch.zeros_like(moved))
        owed = (moved - sparse) / growth
        penalty *= growth
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return sparse.to(weight) * inverse, mask


@dataclass(frozen=True)
class _Side:
    """A moment in the precision of the search, or the identity."""

    scale: Tensor
    values: Tensor
    vectors: Tensor | None

    @classmethod
    def of(cls, moment: Tensor | None, size: int, fact: Fact[Correlation], dtype: torch.dtype) -> _Side:
        if moment is None:
            return cls(torch.ones(size, dtype=torch.float64), torch.ones(size), None)
        found = correlation(moment, fact)
        return cls(found.scale, found.values.clamp(min=0.0).float(), found.vectors.to(dtype))

    def before(self, matrix: Tensor, back: bool) -> Tensor:
        """``U^H matrix``, or ``U matrix``."""
        if self.vectors is None:
            return matrix
        return (self.vectors if back else self.vectors.mH) @ matrix

    def after(self, matrix: Tensor, back: bool) -> Tensor:
        """``matrix U``, or ``matrix U^H``: inputs are on the right."""
        if self.vectors is None:
            return matrix
        return matrix @ (self.vectors.mH if back else self.vectors)
