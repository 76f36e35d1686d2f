"""Matrices of small recurrence width: values of polynomials whose recurrence is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.polynomials import gauss_nodes, recurrence
from structmat.program import Generated, Program
from structmat.program.recurrence import recurrence_values
from structmat.projection.descent import descend
from structmat.projection.displacement import finished
from structmat.projection.target import Fit, Target
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure, check_count


@final
@dataclass(frozen=True)
class RecurrenceWidth(Structure):
    """``scale[i] p_j(nodes[i])`` with polynomials of a learned recurrence that reaches back ``width`` of them.

    ``p_0 = 1`` and ``p_(j+1)(x) = slopes[j] x p_j(x) + sum over k < width of steps[k, j] p_(j-k)(x)``. ``slopes`` is
    (in,), ``steps`` (width, in), ``nodes`` and ``scale`` (out,): ``2 out + (width + 1) in`` parameters. Width 2 holds
    the orthogonal polynomials; a fresh matrix has the Chebyshev polynomials at their nodes.

    Products with the matrix written out by the recurrence, ``O(width out in)``, stable where the recurrence is (forward
    and transposed products with the same matrix). For width 2 on [-1, 1] :func:`structmat.polynomials.synthesis`
    is ``O(n log^2 n)``; above it there is the recurrence alone. Projection: from the fresh recurrence by least squares
    for the rows, then descent over all tensors; no certificate.
    Source: De Sa, Gu, Puttagunta, Re and Rudra (SODA 2018).

    Args:
        width: how many polynomials the next one follows from, at least 1.
    """

    width: int = 2

    by_default: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, "width", self.width)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        fresh = _fresh(self.width, shape)
        mean = float(recurrence_values(torch.ones(shape[0], dtype=torch.float64), *fresh.values()).square().mean())
        return {
            "scale": ParameterSpec((shape[0],), Normal((DENSE_GAIN / (mean * shape[1])) ** 0.5)),
            **{name: ParameterSpec(tuple(t.shape), _Fresh(self.width, shape, name)) for name, t in fresh.items()},
        }

    def program(self, shape: Shape) -> Program:
        (height, width), t = shape, self.width
        tensors = (("scale", height), ("nodes", height), ("slopes", width), ("steps", t * width))
        return Generated(recurrence_values, tensors, (), *shape, linear=("scale",), roundings=(t + 2) * width + 4)

    def project(self, target: Target) -> Fit:
        program, fresh = self.program(target.native), _fresh(self.width, target.native)
        tensors = {name: t.to(target.weight) for name, t in fresh.items()}
        one = torch.ones(target.native[0], dtype=target.weight.dtype)
        matrix = recurrence_values(one, *tensors.values())
        seen = matrix if target.second_moment is None else matrix @ target.second_moment.mT
        size = (seen * matrix.conj()).sum(1).real
        reached = (target.weight * seen.conj()).sum(1)
        scale = torch.where(size > 0, reached / torch.where(size > 0, size, torch.ones_like(size)), one)
        start = finished(program, {"scale": scale, **tensors}, "scale", target, 0.0, "least squares for the rows")
        found = descend(program, start.tensors, target)
        method = "least squares for the rows" + (", descent over the recurrence" if target.sweeps else "")
        return Fit(found, start.certificate, 0.0, method)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        for width in (2, 3):
            if 2 * shape[0] + (width + 1) * shape[1] <= budget:
                yield cls(width)


def _fresh(width: int, shape: Shape) -> dict[str, Tensor]:
    """Nodes, slopes and steps of Chebyshev polynomials; of width 1, of the powers of x."""
    given = recurrence("chebyshev", shape[1])
    steps = torch.zeros(width, shape[1], dtype=torch.float64)
    slopes = given.slopes if width > 1 else torch.ones_like(given.slopes)
    if width > 1:
        steps[0], steps[1] = given.offsets, given.backs
        steps[1, 0] = 0.0
    return {"nodes": gauss_nodes("chebyshev", shape[0]), "slopes": slopes, "steps": steps}


@dataclass(frozen=True)
class _Fresh:
    """One tensor of :func:`_fresh`."""

    width: int
    shape: Shape
    name: str

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return _fresh(self.width, self.shape)[self.name].to(dtype=dtype, device=device)
