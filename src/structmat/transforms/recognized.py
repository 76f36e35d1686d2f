"""Fourier transforms among members of the families that hold them: a library's transform is faster than any chain."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from structmat.program import Chain, Diagonal, Fourier, Program
from structmat.projection.orders import digit_reversal
from structmat.structure import Shape, Structure
from structmat.structures.permuted_butterfly import PermutedButterfly
from structmat.transforms.fast_fourier import roots

SCALE = "scale"
"""The tensor of a transform that carries another factor than its program has."""


def fourier_program(
    structure: Structure, shape: Shape, tensors: Mapping[str, Tensor]
) -> tuple[Program, dict[str, Tensor]] | None:
    """The program of a Fourier transform, forward or inverse, times a number, if that is what these tensors are.

    All factors and both orders are compared with those of the transform, entry by entry, up to the rounding of their
    dtype: trained factors are not it any more. The number is looked for in the last factor, where
    :func:`structmat.transforms.dft` puts it.

    Returns:
        A program and its tensors, or None.
    """
    size = shape[0]
    if not isinstance(structure, PermutedButterfly) or shape[1] != size or structure.native_shape(shape) != shape:
        return None
    factors = [tensors[f"factor{i}"] for i in range(sum(name.startswith("factor") for name in tensors))]
    if not factors or not all(f.is_complex() and f.shape[1] == f.shape[2] for f in factors):
        return None
    radices = tuple(f.shape[1] for f in factors)
    order = digit_reversal(size, radices)
    if not torch.equal(tensors["columns"].cpu(), order) or not torch.equal(tensors["rows"].cpu(), torch.arange(size)):
        return None
    scale = complex(factors[-1][0, 0, 0, 0])
    near = 8 * torch.finfo(factors[0].dtype).eps
    for inverse in (False, True):
        if scale != 0 and _are_stages([*factors[:-1], factors[-1] / scale], radices, inverse, near):
            # The inverse transform of the program is divided by its size.
            left = scale * size if inverse else scale
            program: Program = Fourier(size, inverse)
            if abs(left - 1) <= near:
                return program, {}
            scales = factors[0].new_full((size,), left)
            return Chain((program, Diagonal(SCALE, size))), {SCALE: scales}
    return None


def _are_stages(factors: list[Tensor], radices: tuple[int, ...], inverse: bool, near: float) -> bool:
    span = 1
    for factor, radix in zip(factors, radices, strict=True):
        row, column, offset = torch.arange(radix), torch.arange(radix), torch.arange(span)
        exponent = column[None, :, None] * (row[:, None, None] * span + offset[None, None, :])
        wanted = roots(exponent, span * radix, torch.complex128)
        wanted = wanted.conj() if inverse else wanted
        if factor.shape[3] != span or bool((factor.cpu().to(torch.complex128) - wanted).abs().max() > near):
            return False
        span *= radix
    return True
