"""Vandermonde matrices with learned nodes: rows that are geometric sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, final

import torch

from structmat.displacement.form import CauchyForm, Side, twisted_distance
from structmat.program import Generated, Program
from structmat.program.generated import powers, vandermonde
from structmat.projection.nodes import Spread, fit_vandermonde
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure

if TYPE_CHECKING:
    from structmat.matrix import StructuredMatrix


@final
@dataclass(frozen=True)
class Vandermonde(Structure):
    """``W[i, j] = scale[i] * nodes[i]**j``: ``2 out`` parameters.

    Products with the matrix written out, ``O(out in)``: the fast algorithms are unstable for real nodes. Nodes of
    modulus above 1 make the last columns grow exponentially. Projection: each row is a problem with one unknown, the
    node, solved on a grid and by golden sections from there; no certificate. ``solve`` by elimination on the
    generators, or by LU factors if a node is nearly an n-th root of -1; a square matrix with real nodes has a condition
    number that grows exponentially with its size.
    Source: Golub and Van Loan, Matrix Computations, section 4.6; Gautschi 1975.
    """

    by_default: ClassVar[bool] = False

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        nodes = Spread(-0.7, 0.7)
        mean = float(powers(nodes.values(shape[0]), shape[1]).square().sum()) / shape[0]
        return {
            "scale": ParameterSpec((shape[0],), Normal((DENSE_GAIN / mean) ** 0.5)),
            "nodes": ParameterSpec((shape[0],), nodes),
        }

    def program(self, shape: Shape) -> Program:
        tensors = (("scale", shape[0]), ("nodes", shape[0]))
        return Generated(vandermonde, tensors, (shape[1],), *shape, linear=("scale",), roundings=shape[1] + 4)

    def project(self, target: Target) -> Fit:
        found = fit_vandermonde(target)
        return Fit(found, Certificate.NONE, 0.0, "the best node of each row, on a grid and by golden sections")

    def inversion(self, matrix: StructuredMatrix) -> CauchyForm | None:
        scale, nodes, size = matrix.tensors["scale"], matrix.tensors["nodes"], matrix.shape[0]
        apart = twisted_distance(nodes, size)
        if apart is None:
            return None
        # diag(d) V - V Z_-1 vanishes but in the last column, d^n + 1.
        right = torch.zeros_like(nodes)
        right[-1] = 1.0
        left = scale * apart
        return CauchyForm(Side.PLAIN, Side.TWISTED, left[:, None], right[:, None], nodes)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if 2 * shape[0] <= budget:
            yield cls()
