"""Monarch matrices: a grid of interleaved slices of low rank each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from structmat.program import Chain, Contraction, Program
from structmat.projection.slices import Blocks, fit_slices, input_blocks
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
class Monarch(OnGrid):
    """Two block diagonal factors with a stride permutation between them.

    Cut the columns into k blocks of neighbours and the rows into l groups of every l-th row: each of the k x l slices
    has rank at most ``rank``. With ``p = in / k`` and ``s = out / l``, ``right`` is (k, rank * l, p), ``left`` is
    (s, k * rank, l), and no permutation is ever carried out: the second stage reads with a stride.

    ``rank * (k * out + l * in)`` parameters and multiply-adds; sizes that k or l does not divide are padded.
    ``blocks=1`` is low rank; ``blocks=sqrt(n)`` with rank 1 the classical Monarch matrix; ``blocks=(n // b, b)`` the
    class M^(b, n) (Dao et al., "Monarch", ICML 2022). Projection: truncated SVD of every slice, optimal; in an
    activation-weighted norm a monotone descent from the whitened slices, see :mod:`structmat.projection.slices`.

    Args:
        blocks: k = l, or a pair (k, l).
        rank: of a slice, an integer of at least 1, or a fraction of the dense parameter count.
    """

    weighs_outputs: ClassVar[bool] = True
    blocks_to_try: ClassVar[tuple[int, ...]] = (2, 4, 8, 16)

    blocks: int | tuple[int, int] = 4
    rank: int | float = 1

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        (k, l), rank = self.grid, whole(self.rank)
        s, p = shape[0] // l, shape[1] // k
        return {
            "left": ParameterSpec((s, k * rank, l), Normal((DENSE_GAIN / (k * rank)) ** 0.5)),
            "right": ParameterSpec((k, rank * l, p), Normal(p**-0.5)),
        }

    def program(self, shape: Shape) -> Program:
        (k, l), rank = self.grid, whole(self.rank)
        s, p = shape[0] // l, shape[1] // k
        return Chain((Contraction("right", k, rank * l, p, 1), Contraction("left", 1, s, k * rank, l)))

    def project(self, target: Target) -> Fit:
        (k, l), rank = self.grid, whole(self.rank)
        s, p = target.native[0] // l, target.native[1] // k
        slices = target.weight.reshape(s, l, k, p).permute(1, 2, 0, 3)
        moment, outputs = target.output_moment, None
        if moment is not None:  # in the order of the row groups
            grouped = moment.reshape(s, l, s, l).permute(1, 0, 3, 2).reshape(s * l, s * l)
            outputs = target.output_fact(("strided blocks", l), lambda: Blocks(grouped, l))
        found = fit_slices(slices, input_blocks(target, k), outputs, rank, target.sweeps)
        tensors = {
            "left": found.left.permute(2, 1, 3, 0).reshape(s, k * rank, l),  # from (l, k, s, rank)
            "right": found.right.permute(1, 2, 0, 3).reshape(k, rank * l, p),  # from (l, k, rank, p)
        }
        return Fit(tensors, found.certificate, found.lower_bound, found.method)
