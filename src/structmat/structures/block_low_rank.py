"""Two-level block low rank: a grid of blocks of low rank each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from structmat.program import Chain, Contraction, Program, Shuffle
from structmat.projection.slices import fit_slices, input_blocks, output_blocks
from structmat.projection.target import Fit, Target
from structmat.structure import (
    DENSE_GAIN,
    Normal,
    ParameterSpec,
    Shape,
    whole,
)
from structmat.structures.grid import OnGrid


@final
@dataclass(frozen=True)
class BlockLowRank(OnGrid):
    """A grid of blocks, each of low rank: ``W[i, j] = U[i, j] V[i, j]`` with blocks of neighboring rows and columns.

    With k column blocks of width p and l row blocks of height s, ``right`` is (k, l * rank, p) and ``left``
    (l, s, k * rank). ``rank * (k * out + l * in)`` parameters and multiply-adds, as a Monarch matrix, whose row groups
    are interleaved instead; sizes that k or l does not divide are padded. Projection: truncated SVD of every block,
    optimal; in an activation-weighted norm a monotone descent from the whitened blocks, see
    :mod:`structmat.projection.slices`.
    Source: Amestoy et al., "Improving multifrontal methods by means of block low-rank representations" (SISC 2015).

    Args:
        blocks: k = l, or a pair (k, l).
        rank: of a block, an integer of at least 1, or a fraction of the dense parameter count.
    """

    weighs_outputs: ClassVar[bool] = True
    by_default: ClassVar[bool] = False

    blocks: int | tuple[int, int] = 4
    rank: int | float = 1

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        (k, l), rank = self.grid, whole(self.rank)
        s, p = shape[0] // l, shape[1] // k
        return {
            "left": ParameterSpec((l, s, k * rank), Normal((DENSE_GAIN / (k * rank)) ** 0.5)),
            "right": ParameterSpec((k, l * rank, p), Normal(p**-0.5)),
        }

    def program(self, shape: Shape) -> Program:
        (k, l), rank = self.grid, whole(self.rank)
        s, p = shape[0] // l, shape[1] // k
        regroup = Shuffle((k, l, rank), (1, 0, 2))
        return Chain((Contraction("right", k, l * rank, p, 1), regroup, Contraction("left", l, s, k * rank, 1)))

    def project(self, target: Target) -> Fit:
        (k, l), rank = self.grid, whole(self.rank)
        s, p = target.native[0] // l, target.native[1] // k
        slices = target.weight.reshape(l, s, k, p).transpose(1, 2)
        found = fit_slices(slices, input_blocks(target, k), output_blocks(target, l), rank, target.sweeps)
        tensors = {
            "left": found.left.transpose(1, 2).reshape(l, s, k * rank),  # from (l, k, s, rank)
            "right": found.right.transpose(0, 1).reshape(k, l * rank, p),  # from (l, k, rank, p)
        }
        return Fit(tensors, found.certificate, found.lower_bound, found.method)
