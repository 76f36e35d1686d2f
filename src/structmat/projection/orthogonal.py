"""Fits of products of orthogonal factors: coordinate descent, every step a Procrustes problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.program import Contraction, apply
from structmat.projection.hierarchical import restrict
from structmat.projection.kaleidoscope import identity_factor, monomial_factors, placed
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import Pattern

_PROGRESS = 1e-4
"""The descent ends when a sweep lowers the squared error by less than this share."""

_STARTING_SWEEPS = 3


def fit_orthogonal(target: Target, patterns: Sequence[Pattern]) -> Fit:
    """The nearest product of orthogonal 2 x 2 factors that coordinate descent finds, as rotations and phases.

    ``||W - X w Y||^2`` with orthogonal ``X`` and ``Y`` is a constant less ``2 Re <X^H W Y^H, w>``, so that the best
    block of a factor is the orthogonal polar factor of its 2 x 2 block there (Schoenemann 1966). Cost of a sweep: the
    program on n vectors, twice.
    """
    size, dtype = target.native[0], target.weight.dtype
    factors = _start(target.weight, patterns)
    gain = -float("inf")
    for _ in range(_STARTING_SWEEPS + target.sweeps if patterns else 0):
        factors, reached = _sweep(target.weight, factors, patterns)
        before, gain = gain, reached
        if gain - before <= _PROGRESS * max(abs(gain), 1e-300):
            break
    tensors, phases = _rotations(factors, patterns, size, dtype)
    if not patterns:
        phases = target.weight.diagonal().clone()
        phases = torch.where(phases == 0, torch.ones_like(phases), phases).sgn()
    return Fit({**tensors, "phases": phases}, Certificate.NONE, 0.0, "coordinate descent by polar factors")


def _start(weight: Tensor, patterns: Sequence[Pattern]) -> list[Tensor]:
    """Identities; or the switches of a permutation with factors, if the patterns hold them and the matrix is one."""
    size, levels = len(weight), len(weight).bit_length() - 1
    routed = (
        monomial_factors(weight.sgn()) if len(patterns) >= 2 * levels - 1 > 0 and bool(weight.any(1).all()) else None
    )
    if routed is None or levels == 1:
        return [identity_factor(pattern, weight.dtype) for pattern in patterns]
    return list(placed(routed, patterns, size, weight.dtype).values())


def _sweep(weight: Tensor, factors: list[Tensor], patterns: Sequence[Pattern]) -> tuple[list[Tensor], float]:
    """One pass from the input to the output; what was reached: ``Re <W, product>``."""
    count = len(patterns)
    stages = [Contraction("w", *pattern) for pattern in patterns]
    left = weight  # X^H W for the factors after the current one
    after = [weight] * count
    for i in range(count - 1, 0, -1):
        after[i] = left
        left = apply(stages[i].transpose(), {"w": factors[i].conj().resolve_conj()}, left.T).T
    after[0] = left
    moved = torch.eye(weight.shape[1], dtype=weight.dtype)  # Y^T: the rows of the identity through the factors before
    found, reached = list(factors), 0.0
    for i in range(count):
        gradient = restrict(after[i] @ moved.conj(), patterns[i])
        blocks = gradient.permute(0, 3, 1, 2)
        u, s, vh = torch.linalg.svd(blocks)
        # Where a block says nothing the present one is kept.
        kept = factors[i].permute(0, 3, 1, 2)
        polar = torch.where((s[..., :1] > 0)[..., None], u @ vh, kept)
        found[i] = polar.permute(0, 2, 3, 1).contiguous()
        reached = float(s.sum())
        moved = apply(stages[i], {"w": found[i]}, moved)
    return found, reached


def _rotations(
    factors: Sequence[Tensor], patterns: Sequence[Pattern], size: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """The same product as rotations, its signs (or phases) carried to the output."""
    phases = torch.ones(size, dtype=dtype)
    tensors = {}
    for i, ((a, _, c, d), factor) in enumerate(zip(patterns, factors, strict=True)):
        blocks = factor * phases.reshape(a, 1, c, d)
        # diag(1, det) [[c, -conj s], [s, conj c]] is any unitary block.
        cosine, sine = blocks[:, 0, 0], -blocks[:, 0, 1].conj()
        determinant = blocks[:, 0, 0] * blocks[:, 1, 1] - blocks[:, 0, 1] * blocks[:, 1, 0]
        tensors[f"factor{i}"] = torch.stack([cosine, sine.resolve_conj()], 1).contiguous()
        phases = torch.stack([torch.ones_like(determinant), determinant], 1).reshape(size)
    return tensors, phases.sgn()
