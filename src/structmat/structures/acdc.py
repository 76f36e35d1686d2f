"""ACDC and AFDF: cascades of diagonals and cosine, or Fourier, transforms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.program import Chain, Cosine, Crop, Diagonal, Fourier, Pad, Pairs, Permute, Program
from structmat.projection.refine import refine, rescale
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import DENSE_GAIN, ParameterSpec, Shape, Structure, check_count
from structmat.structures.permutation import RandomOrder


@dataclass(frozen=True)
class _NearOne:
    """Numbers near ``mean``; with ``pairs`` complex ones near it, as a last axis of 2."""

    mean: float
    deviation: float
    pairs: bool

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        noise = torch.randn(shape, generator=generator, dtype=wide) * (self.mean * self.deviation)
        if self.pairs:
            noise[..., 0] += self.mean
        else:
            noise += self.mean
        return noise.to(dtype=dtype, device=device)


@final
@dataclass(frozen=True)
class ACDC(Structure):
    """Layers ``C^-1 D C A`` with diagonals ``A`` and ``D`` and the cosine transform ``C``.

    ``a0``, ``d0``, ``a1``, ... (N,) for N the larger of the two sizes; ``order1``, ... are fixed permutations between
    the layers. 2 N parameters and two transforms a layer. With ``fourier`` the transform is that of Fourier and the
    diagonals are complex, ``(N, 2)``: 4 N parameters a layer, the real part at the end (AFDF); N such layers make any
    linear map. The start is near a multiple of the identity, without which deep cascades do not train. Real layers.

    Projection: alternating least squares from such a start; monotone, no certificate.
    Source: Moczulski, Denil, Appleyard, de Freitas, "ACDC: a structured efficient linear layer" (ICLR 2016).

    Args:
        layers: how many.
        fourier: AFDF in place of ACDC.
    """

    supports_complex: ClassVar[bool] = False
    by_default: ClassVar[bool] = False

    layers: int = 1
    fourier: bool = False

    def __post_init__(self) -> None:
        check_count(self, "layers", self.layers)

    def native_shape(self, shape: Shape) -> Shape:
        return max(shape), max(shape)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        size, found = shape[0], {}
        numbers = (size, 2) if self.fourier else (size,)
        for layer in range(self.layers):
            if layer:
                found[f"order{layer}"] = ParameterSpec((size,), RandomOrder(), learned=False, dtype=torch.int64)
            found[f"a{layer}"] = ParameterSpec(numbers, _NearOne(1.0, _SPREAD, self.fourier))
            last = DENSE_GAIN**0.5 if layer == self.layers - 1 else 1.0
            found[f"d{layer}"] = ParameterSpec(numbers, _NearOne(last, _SPREAD, self.fourier))
        return found

    def program(self, shape: Shape) -> Program:
        size = shape[0]
        steps: list[Program] = []
        for layer in range(self.layers):
            if layer:
                steps.append(_on(self.fourier, Permute(f"order{layer}", size)))
            steps.append(_on(self.fourier, Diagonal(f"a{layer}", size)))
            steps.append(Pairs(Fourier(size)) if self.fourier else Cosine(size))
            steps.append(_on(self.fourier, Diagonal(f"d{layer}", size)))
            steps.append(Pairs(Fourier(size, inverse=True)) if self.fourier else Cosine(size, inverse=True))
        if self.fourier:
            steps = [Pad(size, 2 * size), *steps, Crop(2 * size, size)]
        return Chain(tuple(steps))

    def project(self, target: Target) -> Fit:
        program, generator = self.program(target.native), target.generator()
        tensors = {
            name: spec.init.draw(
                spec.shape,
                generator=generator,
                dtype=spec.dtype or torch.float64,
                device=target.weight.device,
            )
            for name, spec in self.parameters(target.native).items()
        }
        tensors = rescale(program, tensors, f"d{self.layers - 1}", target)
        tensors = refine(program, tensors, target, target.sweeps)
        return Fit(tensors, Certificate.NONE, 0.0, "alternating least squares from near the identity")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if 2 * max(shape) <= budget:
            yield cls()


_SPREAD = 0.1
"""Relative standard deviation of the diagonals at the start."""


def _on(pairs: bool, stage: Diagonal | Permute) -> Diagonal | Permute | Pairs:
    return Pairs(stage) if pairs else stage
