"""Vandermonde-like matrices: small displacement rank under a diagonal and a shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from structmat.displacement.form import CauchyForm, Side, twisted_distance
from structmat.program import Chain, Convolution, Generated, Program, apply, convolution
from structmat.program.generated import powers, vandermonde_krylov
from structmat.projection.displacement import finished, low_rank_factors
from structmat.projection.found_operators import vandermonde_nodes
from structmat.projection.nodes import Spread
from structmat.projection.target import Fit, Target
from structmat.structure import (
    DENSE_GAIN,
    Normal,
    ParameterSpec,
    Shape,
    whole,
)
from structmat.structures.generators import OfDisplacementRank

if TYPE_CHECKING:
    from structmat.matrix import StructuredMatrix


@final
@dataclass(frozen=True)
class VandermondeLike(OfDisplacementRank):
    """``sum of diag(left[i]) V(nodes) Z_-1(right[i])^T`` with the Vandermonde matrix ``V[k, j] = nodes[k]**j``.

    All matrices whose displacement under ``(diag(nodes), Z_-1)`` has at most that rank. ``left`` is (rank, out),
    ``right`` (rank, in), ``nodes`` (out,): ``rank (out + in) + out`` parameters. Products: Fourier transforms, then the
    Krylov matrices ``diag(left[i]) V`` written out, ``O(rank out in)``, since the fast algorithms for Vandermonde
    matrices are unstable for real nodes. Projection: for the nodes of a fresh matrix, spread evenly from -0.7 to 0.7,
    or for nodes that are found, as those of generic members with ``2 (rank + 1) <= in`` are: truncated SVD of the
    displacement, exact for members with these nodes, then alternating least squares; no certificate. ``solve`` by
    elimination on the generators, or by LU factors if a node is nearly an n-th root of -1.
    Source: Thomas et al., "Learning compressed transforms with low displacement rank" (NeurIPS 2018).

    Args:
        rank: the displacement rank, or a fraction of the dense parameter count.
    """

    rank: int | float = 2

    most_proposed: ClassVar[int | None] = 4

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        (height, width), rank = shape, whole(self.rank)
        nodes = Spread(-0.7, 0.7)
        mean = float(powers(nodes.values(height), width).square().sum()) / height
        return {
            "left": ParameterSpec((rank, height), Normal((DENSE_GAIN / (rank * mean)) ** 0.5)),
            "right": ParameterSpec((rank, width), Normal(width**-0.5)),
            "nodes": ParameterSpec((height,), nodes),
        }

    def program(self, shape: Shape) -> Program:
        return _program(whole(self.rank), shape)

    def project(self, target: Target) -> Fit:
        (height, _), rank = target.native, whole(self.rank)
        start = self._start(target.weight, Spread(-0.7, 0.7).values(height).to(target.weight))
        for smaller in range(1, rank + 1):
            nodes = vandermonde_nodes(target.weight, smaller)
            if nodes is not None:
                other = self._start(target.weight, nodes)
                program, eye = self.program(target.native), torch.eye(target.native[1], dtype=target.weight.dtype)
                errors = [target.error(apply(program, tensors, eye).T) for tensors in (start, other)]
                start = other if errors[1] < errors[0] else start
                break
        method = "truncated SVD of the displacement"
        return finished(self.program(target.native), start, "left", target, 0.0, method)

    def _start(self, weight: Tensor, nodes: Tensor) -> dict[str, Tensor]:
        # M - diag(d) M Z_-1^T = (I + diag(d)^n) (sum of left right^T): column j of M Z_-1^T is column j - 1.
        shifted = weight.roll(1, 1)
        shifted[:, 0] = -shifted[:, 0]
        displacement = (weight - nodes[:, None] * shifted) / (1 + nodes ** weight.shape[1])[:, None]
        left, right = low_rank_factors(displacement, whole(self.rank))
        return {"left": left, "right": right, "nodes": nodes}

    def inversion(self, matrix: StructuredMatrix) -> CauchyForm | None:
        nodes, size = matrix.tensors["nodes"], matrix.shape[0]
        apart = twisted_distance(nodes, size)
        if apart is None:
            return None
        left = -apart * matrix.tensors["left"]
        # Z_-1^T h: its last entry is -h[0].
        right = matrix.tensors["right"].roll(-1, 1).clone()
        right[:, -1] = -right[:, -1]
        return CauchyForm(Side.PLAIN, Side.TWISTED, left.T, right.T, nodes)

    @classmethod
    def numbers(cls, rank: int, shape: Shape) -> int:
        return rank * sum(shape) + shape[0]


def _program(rank: int, shape: Shape) -> Program:
    height, width = shape
    # Seen from its transpose, (1 block out, rank blocks in): so the weight is (rank, in).
    first: Convolution = convolution("right", 1, rank, width, width, twist=-1.0, period=width).transpose()
    tensors = (("nodes", height), ("left", rank * height))
    krylov = Generated(
        vandermonde_krylov, tensors, (width,), height, rank * width, linear=("left",), roundings=width + 4
    )
    return Chain((first, krylov))
