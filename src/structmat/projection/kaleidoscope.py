"""Fits of kaleidoscope matrices: good starts, then alternating least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from structmat.circuit.kaleidoscope import permutation
from structmat.program import Program, apply
from structmat.projection.chain import fit_chain
from structmat.projection.refine import refine, rescale
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import Pattern


@lru_cache(maxsize=256)
def kaleidoscope_patterns(size: int, width: int) -> tuple[Pattern, ...]:
    """The factors of ``(BB*)^width`` in order of application, neighbours of one stride merged.

    Args:
        size: a power of two.
        width: at least 1.
    """
    if size == 1:
        return ((1, 1, 1, 1),)
    falling = [size >> (level + 1) for level in range(size.bit_length() - 1)]
    strides = list(falling)
    for number in range(width):
        strides += falling[-2::-1]
        if number + 1 < width:
            strides += falling[1:]
    return tuple((size // (2 * stride), 2, 2, stride) for stride in strides)


def identity_factor(pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """The factor (a, b, b, d) that changes nothing."""
    a, b, c, d = pattern
    return torch.eye(b, c, dtype=dtype)[None, :, :, None].expand(a, b, c, d).contiguous()


def fit_kaleidoscope(target: Target, patterns: Sequence[Pattern], program: Program) -> Fit:
    """A member near the target: the best of the nearest butterfly, transposed butterfly, permutation and zero, improved
    by alternating least squares.

    Args:
        target: of a square power of two.
        patterns: of the factors, from :func:`kaleidoscope_patterns`, of the target's size or a multiple of it.
        program: that runs them between a pad and a crop.
    """
    size, dtype = target.native[0], target.weight.dtype
    inner = patterns[0][0] * patterns[0][2] * patterns[0][3]
    starts = [(name, placed(factors, patterns, inner, dtype)) for name, factors in _starts(target)]
    starts = [(name, rescale(program, start, "factor0", target)) for name, start in starts]
    eye = torch.eye(size, dtype=dtype)
    errors = [target.error(apply(program, start, eye).T) for _, start in starts]
    best = min(range(len(starts)), key=lambda i: errors[i])
    name, tensors = starts[best]
    if errors[best] > 1e-13 * target.norm():
        tensors = refine(program, tensors, target, target.sweeps)
    return Fit(tensors, Certificate.NONE, 0.0, f"from the nearest {name}, alternating least squares")


def _starts(target: Target) -> list[tuple[str, dict[int, Tensor]]]:
    """Known members: factors of the target's own size by their place in (BB*), counted from the middle stride 1."""
    size, weight = target.native[0], target.weight
    if size == 1:
        return [("scalar", {0: weight.reshape(1, 1, 1, 1)})]
    patterns = kaleidoscope_patterns(size, 1)
    middle = len(patterns) // 2
    rising = patterns[middle:]
    plain = target.replace_sweeps(0)  # the start does not depend on the sweeps, so that more of them are never worse
    up, down = fit_chain(plain, rising), fit_chain(_transposed(plain), rising)
    found = [
        ("butterfly", {i: up.tensors[f"factor{i}"] for i in range(middle + 1)}),
        ("transposed butterfly", {-i: down.tensors[f"factor{i}"].transpose(1, 2) for i in range(middle + 1)}),
    ]
    factors = monomial_factors(weight)
    if factors is not None:
        found.append(("permutation", factors))
    return found


def _transposed(target: Target) -> Target:
    """The problem of the transposed member."""
    inputs, outputs = (None if m is None else m.T.contiguous() for m in (target.output_moment, target.second_moment))
    weight = target.weight.T.contiguous()
    return Target(weight, inputs, target.shape[::-1], target.sweeps, target.seed, outputs)


def monomial_factors(weight: Tensor) -> dict[int, Tensor] | None:
    """The factors of a matrix (a power of two, square) with at most one entry in each row and column, by their place
    counted from the middle stride: switches, and the entries in the last of them. None for other matrices."""
    held = weight != 0
    if bool((held.sum(0) > 1).any() or (held.sum(1) > 1).any()):
        return None
    size = len(weight)
    order = held.to(torch.int64).argmax(1)
    empty, free = torch.nonzero(~held.any(1))[:, 0], torch.nonzero(~held.any(0))[:, 0]
    order[empty] = free  # what is read there is multiplied by zero
    values = weight[torch.arange(size), order]
    routed = permutation(order.numpy()).stages
    middle = len(routed) // 2 - 1
    factors: dict[int, Tensor] = {}
    for number, stage in enumerate(routed):  # two of them have stride 1, and are one factor here
        factor = torch.from_numpy(stage.weight.astype(float)).to(weight.dtype)
        place = number - middle if number <= middle else number - middle - 1
        factors[place] = torch.einsum("abcd,aced->abed", factor, factors[place]) if place in factors else factor
    factors[middle] = factors[middle] * values.reshape(1, 2, 1, size // 2)
    return factors


def placed(
    factors: Mapping[int, Tensor], patterns: Sequence[Pattern], inner: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Factors of a size in the first product of a larger and wider kaleidoscope, identities elsewhere."""
    levels = inner.bit_length() - 1
    middle = max(0, levels - 1)
    made = {}
    for number, pattern in enumerate(patterns):
        factor = identity_factor(pattern, dtype)
        place = number - middle
        if place in factors:
            small = factors[place]
            factor[tuple(slice(0, length) for length in small.shape)] = small
        made[f"factor{number}"] = factor
    return made
