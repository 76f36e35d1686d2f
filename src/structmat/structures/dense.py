"""The dense matrix, as a family: "keep it" is always on the menu."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

from structmat.program import Contraction, Program
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure


@final
@dataclass(frozen=True)
class Dense(Structure):
    """Every matrix. ``weight`` (out, in): ``out * in`` parameters and multiply-adds."""

    weighs_outputs: ClassVar[bool] = True

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return {"weight": ParameterSpec(shape, Normal((DENSE_GAIN / shape[1]) ** 0.5))}

    def program(self, shape: Shape) -> Program:
        return Contraction("weight", 1, shape[0], shape[1], 1)

    def project(self, target: Target) -> Fit:
        return Fit({"weight": target.weight}, Certificate.OPTIMAL, 0.0, "copied")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if shape[0] * shape[1] <= budget:
            yield cls()
