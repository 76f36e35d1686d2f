"""A member of a family on the way to a fit: what alternating projections pass from one part to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from structmat.matrix import StructuredMatrix
from structmat.projection.project import fit
from structmat.projection.target import Target
from structmat.structure import Structure


@dataclass(frozen=True)
class Member:
    """One part of a sum, or one factor of a product.

    Args:
        tensors: by name.
        dense: the matrix (out, in).
    """

    tensors: Mapping[str, Tensor]
    dense: Tensor


def nearest(structure: Structure, target: Target) -> Member:
    """The fit of a resolved structure to a target; see :func:`structmat.projection.project.fit`."""
    tensors = fit(structure, target).tensors
    return Member(tensors, StructuredMatrix(structure, target.shape, tensors).to_dense())
