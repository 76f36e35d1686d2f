"""The fit of a chain of contractions: hierarchical factorization, then block coordinate descent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.chains import chain_program
from structmat.projection.hierarchical import dense_product, factorize, factorize_by_crosses, split_errors, sweep
from structmat.projection.refine import refine, rescale
from structmat.projection.slices import Blocks
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import Pattern

EXACT = 1e-13
"""Relative errors up to this are rounding: the matrix is a member, and nothing is left to bound or to improve."""

EXACTLY = "hierarchical factorization, exact"
"""The method of such a fit."""

_MET = 1e-14
"""Below this relative error nothing is to be gained from whole singular value decompositions."""

_PROGRESS = 1e-3
"""The descent ends when a sweep lowers the squared error by less than this share."""


def fit_chain(target: Target, patterns: Sequence[Pattern]) -> Fit:
    """The nearest member of a chain that hierarchical factorization and descent find.

    In the Frobenius norm one or two factors are optimal (Le, Riccietti, Gribonval 2022); more have the lower bound
    ``max E_s`` of :func:`split_errors`. In a weighted norm the factorization is that of ``D_B^(1/2) W D_C^(1/2)``, with
    the blocks of the moments that the outer factors can absorb, and is refined in the whole norm.
    """
    if target.second_moment is not None or target.output_moment is not None:
        return _fit_weighted(target, patterns)
    weight = target.weight
    if len(patterns) > 2:  # a member is met by a few of its entries, and one comparison with all of them proves it
        crossed = factorize_by_crosses(weight, patterns)
        if crossed is not None:
            error = float(torch.linalg.norm(weight - dense_product(crossed, patterns)))
            if error <= _MET * target.norm():
                return Fit(_named(crossed), Certificate.BOUND, 0.0, EXACTLY, error)
    factors = factorize(weight, patterns)
    if len(patterns) <= 2:
        errors = split_errors(weight, patterns)
        return Fit(_named(factors), Certificate.OPTIMAL, max(errors), "truncated SVD of every block")
    error = float(torch.linalg.norm(weight - dense_product(factors, patterns)))
    if error <= EXACT * float(torch.linalg.norm(weight)):
        return Fit(_named(factors), Certificate.BOUND, 0.0, EXACTLY, error)
    errors = split_errors(weight, patterns)
    spent = 0
    for _ in range(target.sweeps):
        better = sweep(weight, factors, patterns)
        reduced = float(torch.linalg.norm(weight - dense_product(better, patterns)))
        if not reduced < error:
            break
        factors, before, error, spent = better, error, reduced, spent + 1
        if before**2 - error**2 <= _PROGRESS * before**2:
            break
    method = f"hierarchical factorization, {spent} sweeps of block coordinate descent"
    return Fit(_named(factors), Certificate.BOUND, max(errors), method)


def _fit_weighted(target: Target, patterns: Sequence[Pattern]) -> Fit:
    a, b, c, d = patterns[0]
    inputs = outputs = None
    weight, share = target.weight, 1.0
    if (moment := target.second_moment) is not None:
        inputs = target.input_fact(("absorbed", a, c, d), lambda: _Absorbed(moment, a, c, d))
        weight, share = inputs.multiply(weight, inputs.blocks.root), inputs.blocks.smallest_share
    e, f, g, h = patterns[-1]
    if (weights := target.output_moment) is not None:
        outputs = target.output_fact(("absorbed", e, f, h), lambda: _Absorbed(weights, e, f, h))
        weight = outputs.multiply(weight.mH, outputs.blocks.root).mH
        share *= outputs.blocks.smallest_share
    bound = max(split_errors(weight, patterns)) * share**0.5
    factors = factorize(weight, patterns)
    if inputs is not None:
        grid = factors[0].permute(0, 3, 1, 2).reshape(a * d, b, c) @ inputs.blocks.inverse_root
        factors[0] = grid.reshape(a, d, b, c).permute(0, 2, 3, 1)
    if outputs is not None:
        grid = outputs.blocks.inverse_root @ factors[-1].permute(0, 3, 1, 2).reshape(e * h, f, g)
        factors[-1] = grid.reshape(e, h, f, g).permute(0, 2, 3, 1)
    program = chain_program(patterns)
    tensors = rescale(program, _named(factors), "factor0", target)
    tensors = refine(program, tensors, target, target.sweeps)
    certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
    return Fit(tensors, certificate, float(bound), "whitened hierarchical factorization, alternating least squares")


class _Absorbed:
    """The part of a moment of vectors (a, n, d) that lies in the n x n blocks of a contraction's groups (a, d)."""

    def __init__(self, moment: Tensor, a: int, n: int, d: int) -> None:
        self.sizes = (a, n, d)
        grouped = moment.reshape(a, n, d, a, n, d).permute(0, 2, 1, 3, 5, 4).reshape(a * n * d, a * n * d)
        self.blocks = Blocks(grouped, a * d)

    def multiply(self, matrix: Tensor, blocks: Tensor) -> Tensor:
        """``matrix`` (rows, a * n * d) times the block diagonal matrix of (a * d, n, n) blocks."""
        a, n, d = self.sizes
        rows = matrix.shape[0]
        grouped = matrix.reshape(rows, a, n, d).permute(1, 3, 0, 2).reshape(a * d, rows, n) @ blocks
        return grouped.reshape(a, d, rows, n).permute(2, 0, 3, 1).reshape(rows, a * n * d)


def _named(factors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"factor{i}": factor for i, factor in enumerate(factors)}
