"""Cauchy matrices with learned nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, final

import torch

from structmat.displacement.form import CauchyForm, Side
from structmat.program import Generated, Program
from structmat.program.generated import cauchy, cauchy_kernel
from structmat.projection.nodes import fit_cauchy
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import DENSE_GAIN, Constant, Normal, ParameterSpec, Shape, Structure

if TYPE_CHECKING:
    from structmat.matrix import StructuredMatrix


@final
@dataclass(frozen=True)
class Cauchy(Structure):
    """``W[i, j] = scale / (s[i] - t[j])`` with nodes ``s[i] = i + rows[i]`` and ``t[j] = j + columns[j]``.

    ``out + in + 1`` parameters, a fresh matrix with ``t`` half way between the ``s``. Products with the matrix written
    out, ``O(out in)``: the direct evaluation that is stable for all nodes. Two nodes that meet make an entry infinite:
    keep offsets apart when training. Projection: reciprocals of the entries are sums ``s[i] - t[j]``, which gives back
    every member, then Levenberg-Marquardt; no certificate. ``solve`` by elimination on the generators.
    Source: Golub and Van Loan, Matrix Computations, section 12.1.
    """

    by_default: ClassVar[bool] = False

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        total = float(cauchy_kernel(torch.zeros(shape[0]), torch.full((shape[1],), 0.5)).square().sum())
        return {
            "scale": ParameterSpec((1,), Normal((DENSE_GAIN * shape[0] / total) ** 0.5)),
            "rows": ParameterSpec((shape[0],), Normal(_JITTER)),
            "columns": ParameterSpec((shape[1],), Constant(0.5)),
        }

    def program(self, shape: Shape) -> Program:
        tensors = (("scale", 1), ("rows", shape[0]), ("columns", shape[1]))
        return Generated(cauchy, tensors, (), *shape, linear=("scale",), signed=("rows", "columns"))

    def project(self, target: Target) -> Fit:
        found = fit_cauchy(self.program(target.native), target)
        method = "sums fitted to the reciprocals, Levenberg-Marquardt"
        return Fit(found, Certificate.NONE, 0.0, method)

    def inversion(self, matrix: StructuredMatrix) -> CauchyForm:
        tensors, size = matrix.tensors, matrix.shape[0]
        places = torch.arange(size)
        ones = torch.ones_like(tensors["rows"])[:, None]
        nodes = places + tensors["rows"], places + tensors["columns"]
        return CauchyForm(Side.PLAIN, Side.PLAIN, tensors["scale"] * ones, ones, *nodes)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if sum(shape) + 1 <= budget:
            yield cls()


_JITTER = 0.02
"""Standard deviation of the offsets of fresh nodes: they differ by halves at least."""
