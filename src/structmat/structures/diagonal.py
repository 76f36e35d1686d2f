"""Diagonal matrices, rectangular ones too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self, final

import torch

from structmat.program import Chain, Crop, Pad, Program
from structmat.program import Diagonal as DiagonalStage
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure


@final
@dataclass(frozen=True)
class Diagonal(Structure):
    """``W[i, i] = weight[i]``, zero elsewhere: ``min(out, in)`` parameters and multiplications.

    Projection: the diagonal of the matrix; in an activation-weighted norm ``(W C)[i, i] / C[i, i]``. Optimal in both,
    since the rows are separate problems with one unknown.
    """

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        size = min(shape)
        return {"weight": ParameterSpec((size,), Normal((DENSE_GAIN * shape[0] / size) ** 0.5))}

    def program(self, shape: Shape) -> Program:
        (height, width), size = shape, min(shape)
        return Chain((Crop(width, size), DiagonalStage("weight", size), Pad(size, height)))

    def project(self, target: Target) -> Fit:
        (height, width), size = target.native, min(target.native)
        own = target.weight.diagonal().clone()
        if target.second_moment is not None:
            moment = target.second_moment.diagonal()[:size]
            reached = (target.weight[:size] * target.second_moment[:, :size].T).sum(1)
            alive = moment.real > 0  # where an input never occurs the weight itself is followed
            own = torch.where(alive, reached / torch.where(alive, moment, torch.ones_like(moment)), own)
        dense = target.weight.new_zeros(height, width)
        dense[range(size), range(size)] = own
        return Fit({"weight": own}, Certificate.OPTIMAL, target.error(dense), "diagonal of the matrix")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if min(shape) <= budget:
            yield cls()
