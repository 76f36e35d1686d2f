"""Transforms by orthogonal polynomials, with a learned diagonal on either side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.polynomials import check_kind, gauss_nodes
from structmat.program import Generated, Program
from structmat.program.recurrence import node_unit, orthonormal_values
from structmat.projection.displacement import finished
from structmat.projection.target import Fit, Target
from structmat.structure import DENSE_GAIN, Constant, Normal, ParameterSpec, Shape, Structure


@final
@dataclass(frozen=True)
class OrthogonalPolynomial(Structure):
    """``left[i] P[i, j] right[j]`` with the orthonormal polynomials ``p_j`` at Gauss nodes,
    ``P[i, j] = p_j(x_i) sqrt(weight_i)``.

    P is orthogonal: of ``max(out, in)`` nodes and degrees a rectangle keeps the first degrees, or evenly spread nodes.
    Chebyshev polynomials give the cosine transform. ``out + in`` parameters. Products with the matrix written out by
    the three-term recurrence, ``O(out in)``, in the basis of the orthonormal polynomials themselves, which is stable
    for all kinds; :func:`structmat.polynomials.synthesis` is the ``O(n log^2 n)`` algorithm for those on [-1, 1],
    faster for thousands of nodes only. Projection: alternating least squares for the two diagonals; no certificate.
    ``RecurrenceWidth`` has learned recurrences. Source: De Sa et al. (SODA 2018); Golub and Welsch 1969.

    Args:
        kind: ``"chebyshev"``, ``"legendre"``, ``"jacobi"``, ``"hermite"`` or ``"laguerre"``.
        exponents: (alpha, beta), above -1, of Jacobi polynomials; alpha is that of generalised Laguerre ones.
    """

    kind: str = "legendre"
    exponents: tuple[float, float] = (0.0, 0.0)

    by_default: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given: object = self.exponents
        if not (isinstance(given, tuple) and len(given) == 2):
            raise StructureError(f"OrthogonalPolynomial(exponents={given!r}): exponents is a pair (alpha, beta).")
        check_kind(self.kind, *self.exponents)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        height, width = shape
        return {
            "left": ParameterSpec((height,), Normal((DENSE_GAIN * max(shape) / width) ** 0.5)),
            "right": ParameterSpec((width,), Constant(1.0)),
            "nodes": ParameterSpec((height,), self._nodes(shape), learned=False, dtype=torch.int64),
        }

    def _nodes(self, shape: Shape) -> GaussNodes:
        return GaussNodes(self.kind, max(shape), *map(float, self.exponents))

    def program(self, shape: Shape) -> Program:
        height, width = shape
        return Generated(
            orthonormal_values,
            (("left", height), ("right", width)),
            (self.kind, max(shape), *map(float, self.exponents)),
            height,
            width,
            fixed=("nodes",),
            linear=("left", "right"),
        )

    def project(self, target: Target) -> Fit:
        height, width = target.native
        nodes = self._nodes(target.native).values(height)
        one = torch.ones(height, dtype=target.weight.dtype)
        across = torch.ones(width, dtype=target.weight.dtype)
        matrix = orthonormal_values(one, across, nodes, self.kind, max(target.native), *map(float, self.exponents))
        # Each row's own factor is a problem of its own.
        seen = matrix if target.second_moment is None else matrix @ target.second_moment.mT
        size = (seen * matrix.conj()).sum(1).real
        reached = (target.weight * seen.conj()).sum(1)
        left = torch.where(size > 0, reached / torch.where(size > 0, size, torch.ones_like(size)), one)
        tensors = {"left": left, "right": across, "nodes": nodes}
        return finished(self.program(target.native), tensors, "left", target, 0.0, "least squares for the rows")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if 2 * shape[0] + shape[1] <= budget:
            for kind in ("chebyshev", "legendre", "hermite", "laguerre"):
                yield cls(kind)


@dataclass(frozen=True)
class GaussNodes:
    """Zeros of the polynomial of degree ``size``, evenly spread ones of them, in units of ``node_unit(kind)``."""

    kind: str
    size: int
    alpha: float
    beta: float

    def values(self, count: int) -> Tensor:
        nodes = gauss_nodes(self.kind, self.size, alpha=self.alpha, beta=self.beta)
        kept = torch.arange(count) if count == self.size else ((2 * torch.arange(count) + 1) * self.size) // (2 * count)
        return (nodes[kept] / node_unit(self.kind)).round().to(torch.int64)

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return self.values(shape[0]).to(dtype=dtype, device=device)
