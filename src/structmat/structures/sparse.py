"""Sparse matrices with a fixed number of nonzeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.errors import ShapeError, StructureError
from structmat.places import stored_places
from structmat.program import Program
from structmat.program import Sparse as SparseStage
from structmat.projection.sparse import entries, lower_bound, sparsify
from structmat.projection.target import Certificate, Fit, Target
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


@dataclass(frozen=True)
class _EvenPlaces:
    """Ascending places of entries: all rows hold equally many up to one, their columns drawn without repetition."""

    height: int
    width: int

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        rows = torch.arange(shape[0]) * self.height // shape[0]
        counts = torch.bincount(rows, minlength=self.height)
        order = torch.rand(self.height, self.width, generator=generator).argsort(dim=1)
        mask = torch.zeros(self.height, self.width, dtype=torch.bool)
        mask.scatter_(1, order, torch.arange(self.width) < counts[:, None])
        return torch.nonzero(mask.reshape(-1))[:, 0].to(dtype=dtype, device=device)


@final
@dataclass(frozen=True)
class Sparse(Structure):
    """A fixed number of nonzeros: ``values`` (nonzeros,) at fixed ``places`` (nonzeros,): row * in + column, ascending.

    ``nonzeros`` parameters and multiply-adds. A file holds the support as one bit for each entry of the matrix, or as a
    list of places where that is shorter; both count as stored numbers (32 bits to a number). The support stays where it
    was put by initialisation or projection. Projection: the largest entries, optimal in the Frobenius norm; in a
    weighted norm (where the problem is NP-hard in general) the support that alternating directions find, and least
    squares on it, with a lower bound (:mod:`structmat.projection.supports`).

    Args:
        density: a fraction of the entries, strictly between 0 and 1.
        nonzeros: their exact number, instead of the density.
    """

    weighs_outputs: ClassVar[bool] = True

    density: float | None = None
    nonzeros: int | None = None

    def __post_init__(self) -> None:
        if (self.density is None) == (self.nonzeros is None):
            raise StructureError(
                f"Sparse(density={self.density!r}, nonzeros={self.nonzeros!r}): exactly one of the two is given. "
                "Use Sparse(density=0.1), or Sparse(nonzeros=1000)."
            )
        if self.nonzeros is not None:
            check_count(self, "nonzeros", self.nonzeros)
            return
        check_size(self, "density", self.density)
        if isinstance(self.density, int):
            raise StructureError(
                f"Sparse(density={self.density!r}): a density lies strictly between 0 and 1. "
                f"Use Sparse(nonzeros={self.density}) for a number of entries."
            )

    def resolve(self, shape: Shape) -> Sparse:
        if self.density is None:
            return self
        count = int(self.density * shape[0] * shape[1] + 1e-6)  # 0.03 * 3000 is 89.99... in floating point
        if count < 1:
            raise ShapeError(
                f"{self} of a matrix of shape {shape} is less than one of its {shape[0] * shape[1]} entries. "
                "Use nonzeros=1 or a larger density."
            )
        return Sparse(nonzeros=count)

    def restriction(self, shape: Shape) -> str | None:
        entries_in_all = shape[0] * shape[1]
        if self.nonzeros is not None and self.nonzeros > entries_in_all:
            return f"it has {entries_in_all} entries in all. Use nonzeros={entries_in_all} or less, or density=0.5."
        return None

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        (height, width), count = shape, whole(self.nonzeros)
        return {
            "values": ParameterSpec((count,), Normal((DENSE_GAIN * height / count) ** 0.5)),
            "places": ParameterSpec(
                (count,), _EvenPlaces(height, width), learned=False, dtype=torch.int64, places_in=height * width
            ),
        }

    def program(self, shape: Shape) -> Program:
        return SparseStage("values", "places", shape[0], shape[1], whole(self.nonzeros))

    def project(self, target: Target) -> Fit:
        count = whole(self.nonzeros)
        dense, mask = sparsify(target, count, target.sweeps)
        if target.second_moment is None and target.output_moment is None:
            return Fit(entries(dense, mask), Certificate.OPTIMAL, target.error(dense), "largest entries")
        bound = lower_bound(target, count)
        certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
        return Fit(entries(dense, mask), certificate, bound, "alternating directions")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        size = shape[0] * shape[1]
        count = largest_fitting(lambda k: k + stored_places(k, size), budget, size)
        if count:
            yield cls(nonzeros=count)
