"""Fastfood: diagonals between Hadamard transforms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.program import Chain, Diagonal, Hadamard, Permute, Program
from structmat.projection.refine import refine, rescale
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import power_of_two
from structmat.structure import DENSE_GAIN, Constant, Normal, ParameterSpec, Shape, Structure
from structmat.structures.permutation import RandomOrder


@dataclass(frozen=True)
class _RandomSigns:
    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        ones = torch.randint(2, shape, generator=generator) * 2 - 1
        return ones.to(dtype=dtype, device=device)


@final
@dataclass(frozen=True)
class Fastfood(Structure):
    """``W = S H G P H B``: three learned diagonals, two Hadamard transforms and a fixed random permutation.

    ``signs``, ``gains`` and ``scales`` (N,) are the diagonals B, G and S, ``order`` (N,) the permutation, for the power
    of two N that holds the shape: 3 N parameters, 2 N log2 N additions. At the start B holds signs, G Gaussian numbers,
    and the rows are nearly those of a Gaussian matrix; training all three is adaptive Fastfood.

    Projection: alternating least squares from a random start; monotone, no certificate.
    Source: Le, Sarlos, Smola, "Fastfood" (ICML 2013); Yang et al., "Deep fried convnets" (ICCV 2015).
    """

    by_default: ClassVar[bool] = False

    def native_shape(self, shape: Shape) -> Shape:
        size = power_of_two(max(shape))
        return size, size

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        size = shape[0]
        return {
            "signs": ParameterSpec((size,), _RandomSigns()),
            "gains": ParameterSpec((size,), Normal(1.0)),
            "scales": ParameterSpec((size,), Constant(DENSE_GAIN**0.5 / size)),
            "order": ParameterSpec((size,), RandomOrder(), learned=False, dtype=torch.int64),
        }

    def program(self, shape: Shape) -> Program:
        size = shape[0]
        return Chain(
            (
                Diagonal("signs", size),
                Hadamard(size),
                Permute("order", size),
                Diagonal("gains", size),
                Hadamard(size),
                Diagonal("scales", size),
            )
        )

    def project(self, target: Target) -> Fit:
        program, generator = self.program(target.native), target.generator()
        tensors = {
            name: spec.init.draw(
                spec.shape,
                generator=generator,
                dtype=spec.dtype or target.weight.dtype,
                device=target.weight.device,
            )
            for name, spec in self.parameters(target.native).items()
        }
        tensors = rescale(program, tensors, "scales", target)
        tensors = refine(program, tensors, target, target.sweeps)
        return Fit(tensors, Certificate.NONE, 0.0, "alternating least squares from a random start")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if 4 * cls().native_shape(shape)[0] <= budget:
            yield cls()
