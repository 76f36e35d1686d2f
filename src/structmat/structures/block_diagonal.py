"""Block diagonal matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self, final

import torch

from structmat.program import Contraction, Program
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import round_up
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure, check_count


@final
@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """``blocks`` dense blocks along the diagonal: ``weight`` (blocks, out / blocks, in / blocks).

    ``out * in / blocks`` parameters and multiply-adds; sizes that ``blocks`` does not divide are padded. Projection:
    in the Frobenius norm the blocks of the matrix itself; in the activation-weighted norm the least squares solution
    ``W[rows, :] C[:, columns] C[columns, columns]^+`` block by block. Optimal in both.
    """

    blocks: int

    def __post_init__(self) -> None:
        check_count(self, "blocks", self.blocks)

    def restriction(self, shape: Shape) -> str | None:
        if self.blocks > max(shape):
            return f"there is nothing to put into so many blocks. Use blocks={max(shape)} or less."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        return (round_up(shape[0], self.blocks), round_up(shape[1], self.blocks))

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        rows, columns = shape[0] // self.blocks, shape[1] // self.blocks
        return {"weight": ParameterSpec((self.blocks, rows, columns), Normal((DENSE_GAIN / columns) ** 0.5))}

    def program(self, shape: Shape) -> Program:
        return Contraction("weight", self.blocks, shape[0] // self.blocks, shape[1] // self.blocks, 1)

    def project(self, target: Target) -> Fit:
        (out_features, in_features), k = target.native, self.blocks
        p, q = out_features // k, in_features // k
        if target.second_moment is None:
            grid = target.weight.reshape(k, p, k, q)
            weight = torch.stack([grid[i, :, i] for i in range(k)])
        else:
            moment = target.second_moment.reshape(k, q, k, q)
            own = torch.stack([moment[i, :, i] for i in range(k)])
            reached = (target.weight @ target.second_moment).reshape(k, p, k, q)
            wanted = torch.stack([reached[i, :, i] for i in range(k)])
            weight = wanted @ torch.linalg.pinv(own, rtol=1e-12, hermitian=True)
        blocks = torch.block_diag(*weight)
        distance = target.squared(target.weight - blocks) ** 0.5
        return Fit({"weight": weight}, Certificate.OPTIMAL, distance, "blocks of the matrix")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        most = min(shape)
        fitting = (k for k in range(2, most + 1) if round_up(shape[0], k) * round_up(shape[1], k) // k <= budget)
        fewest = next(fitting, None)
        if fewest is None:
            return
        exact = [k for k in range(fewest, min(most, 4 * fewest) + 1) if math.gcd(*shape) % k == 0]
        yield cls(exact[0] if exact else fewest)
