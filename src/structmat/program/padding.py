"""What padding takes from the variance of a fresh matrix, and how to give it back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from structmat.program.build import build
from structmat.program.combinators import Chain, Program, Sum, stages
from structmat.program.derived import Derived, derive
from structmat.program.fixed import Cosine, Hadamard
from structmat.program.pairs import Pairs, unsigned
from structmat.program.reference import apply
from structmat.program.scaling import scaling_cut
from structmat.program.stage import Stage
from structmat.program.stages import Complex, Crop, Diagonal, Fourier, Pad, Real
from structmat.program.toeplitz import Convolution
from structmat.program.written_out import Call, Generated
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure, resolve, specs

_SAMPLE = 1 << 14
"""Numbers drawn to estimate a variance: its relative error is then about 1 %."""

_MOST_DRAWS = 256
"""Of tensors with few numbers."""

_TOLERANCE = 0.05
"""Smaller deviations are left alone, so that a structure that padding does not touch is not touched either."""


@lru_cache(maxsize=4096)
def padding_factor(structure: Structure, shape: Shape) -> tuple[float, frozenset[str]]:
    """By how much to multiply which fresh tensors, so that the mean output variance is that of a dense layer.

    A family initialises for its native shape. Where inputs are padded with zeros and outputs cropped, the sums that are
    kept have fewer terms. For independent weights of mean zero the variances obey the same linear circuit with every
    weight replaced by its mean square, so one product gives the output variances. Nothing is done for families that are
    not closed under scaling or are averages, nor for programs with Fourier transforms or functions of the user.

    Cost: one more draw and one product with a vector, once for each structure and shape.
    """
    structure = resolve(structure, shape)
    program = build(structure, shape)
    if (
        not structure.closed_under_scaling
        or not structure.keeps_variance
        or not any(isinstance(s, Pad | Crop) for s in stages(program))
    ):
        return 1.0, frozenset()
    cut = scaling_cut(program)
    if cut is None or any(map(_has_no_squares, stages(program))):
        return 1.0, frozenset()
    gain = _gain(*_mean_squares(program, specs(structure, shape)))
    if gain <= 0 or abs(gain / DENSE_GAIN - 1) <= _TOLERANCE:
        return 1.0, frozenset()
    return math.sqrt(DENSE_GAIN / gain), cut


def _has_no_squares(stage: Stage) -> bool:
    """Whether the squares of the stage's entries are no linear function of those of its tensors."""
    if isinstance(stage, Convolution):
        return stage.twist not in (None, 1.0)
    return isinstance(stage, Fourier | Complex | Real | Call | Generated) or (
        isinstance(stage, Diagonal) and stage.spectrum
    )


def _mean_squares(program: Program, declared: Mapping[str, ParameterSpec]) -> tuple[Program, dict[str, Tensor]]:
    """The program without functions of tensors, and the mean squares of what it reads.

    The mean is taken tensor by tensor, and not of the products: a product of several Gaussian numbers is mostly small
    and seldom very large, so that its mean would take far more draws.
    """
    is_derived = any(isinstance(stage, Derived) for stage in stages(program))
    squares: dict[str, Tensor] = {}
    if not is_derived:
        for name, spec in declared.items():
            if spec.learned and isinstance(spec.init, Normal):
                squares[name] = torch.full(spec.shape, spec.init.std**2, dtype=torch.float64)
    drawn = {name: spec for name, spec in declared.items() if name not in squares}
    numbers = sum(spec.numel for spec in drawn.values() if spec.learned)
    draws = min(_MOST_DRAWS, math.ceil(_SAMPLE / numbers)) if numbers else 1
    generator, made = torch.Generator().manual_seed(0), program
    for draw in range(draws):
        tensors = {name: _drawn(spec, generator) for name, spec in drawn.items()}
        if is_derived:
            made, tensors = derive(program, tensors)
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                squares[name] = tensor
            else:
                square = tensor.square() / draws
                squares[name] = squares[name] + square if draw else square
    return made, squares


def _drawn(spec: ParameterSpec, generator: torch.Generator) -> Tensor:
    dtype = spec.dtype or torch.float64
    return spec.init.draw(spec.shape, generator=generator, dtype=dtype, device=torch.device("cpu"))


def _gain(program: Program, squares: Mapping[str, Tensor]) -> float:
    return float(_spread(unsigned(program), squares, torch.ones(1, program.in_features, dtype=torch.float64)).mean())


def _spread(program: Program, squares: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The variances that leave a program whose weights have these mean squares."""
    if isinstance(program, Chain):
        for step in program.steps:
            x = _spread(step, squares, x)
        return x
    if isinstance(program, Sum):
        return torch.stack([_spread(part, squares, x) for part in program.parts]).sum(0)
    if isinstance(program, Hadamard):  # all squares of its entries are 1
        return x.sum(-1, keepdim=True).expand(-1, program.size)
    if isinstance(program, Cosine):  # orthonormal, and nearly even
        return x.mean(-1, keepdim=True).expand(-1, program.size)
    if isinstance(program, Pairs) and isinstance(program.stage, Fourier):
        # What is transformed forth and back stays real, but for what lies between.
        total = x.sum(-1, keepdim=True) / (program.stage.size**2 if program.stage.inverse else 1)
        return torch.cat([total.expand(-1, program.stage.size), total.new_zeros(len(x), program.stage.size)], 1)
    return apply(program, squares, x)
