"""The shallow approximation of a tensor: a CP fit, and how good any could be.

Alternating least squares finds the neighborhood and then creeps: where terms nearly cancel, one factor alone can hardly
move. Damped Gauss-Newton steps on all factors together go on from there; their normal equations need no Jacobian, only
the small Gram matrices of the factors (Tomasi and Bro 2006).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structmat.errors import DataError
from structmat.nn.convac.expand import matricize
from structmat.nn.convac.formats import CP

LARGEST_SYSTEM = 2100
"""Unknowns of a Gauss-Newton step: its Cholesky decomposition takes their number cubed / 3."""


@dataclass(frozen=True)
class CPFit:
    """A CP tensor near a given one.

    Args:
        tensor: the best of all starts.
        error: relative, in the Frobenius norm. Sets of tensors of bounded CP rank are not closed, so that the error may
            creep down for thousands of sweeps: the truth lies between ``lower`` and this.
        lower: the Eckart-Young bound of the partition even | odd, relative: no CP tensor of that many terms is nearer.
    """

    tensor: CP
    error: float
    lower: float


def fit_cp(
    tensor: Tensor,
    terms: int,
    *,
    sweeps: int = 60,
    starts: int = 4,
    steps: int = 50,
    seed: int = 0,
    part: Sequence[int] | None = None,
) -> CPFit:
    """Alternating least squares from random starts, then damped Gauss-Newton steps from the best.

    Cost ``2 M^N Z`` for each mode of a sweep; a step as much as a sweep, and ``(N M Z)^3 / 3``.

    Args:
        tensor: (M_0, .., M_{N-1}), not zero.
        terms: Z.
        sweeps: over all modes.
        starts: the best is kept.
        steps: of Gauss and Newton, at most; none beyond 2,100 numbers N M Z.
        seed: of the starts.
        part: the partition of the bound, by default even | odd.

    Raises:
        DataError: the tensor is zero or not finite, or ``terms`` < 1.
    """
    norm = float(tensor.norm())
    if terms < 1 or not 0 < norm < float("inf"):
        raise DataError(
            f"A CP fit needs a finite tensor that is not zero and terms >= 1; got norm {norm}, terms {terms}."
        )
    scaled = tensor / norm
    found = [_alternate(scaled, terms, sweeps, seed + start) for start in range(starts)]
    error, best = min(found, key=lambda pair: pair[0])
    if terms * sum(tensor.shape) <= LARGEST_SYSTEM:
        error, best = _refine(scaled, error, best, steps)
    return CPFit(CP(best.weights * norm, best.factors), error, eckart_young(scaled, terms, part))


def eckart_young(tensor: Tensor, rank: int, part: Sequence[int] | None = None) -> float:
    """``sqrt(sum of sigma_i^2 for i >= rank)`` of a matricisation, by default even | odd: no CP tensor is nearer."""
    chosen = range(0, tensor.dim(), 2) if part is None else part
    values = torch.linalg.svdvals(matricize(tensor, list(chosen)))
    return float(values[rank:].square().sum().sqrt())


def _alternate(tensor: Tensor, terms: int, sweeps: int, seed: int) -> tuple[float, CP]:
    # NumPy's numbers: published curves start from them, and they do not depend on PyTorch's version.
    rng = np.random.default_rng(seed)
    drawn = [torch.from_numpy(rng.standard_normal((size, terms))).to(tensor.dtype) for size in tensor.shape]
    factors = [f / f.norm(dim=0) for f in drawn]
    weights = torch.ones(terms, dtype=tensor.dtype)
    unfolded = [tensor.movedim(mode, 0) for mode in range(tensor.dim())]
    best, error = (float("inf"), CP(weights, tuple(factors))), float("inf")
    for sweep in range(sweeps):
        for mode in range(tensor.dim()):
            gram = torch.ones(terms, terms, dtype=tensor.dtype)
            for other, factor in enumerate(factors):
                if other != mode:
                    gram = gram * (factor.T @ factor)
            # A small multiple of the identity: terms that nearly coincide make the system singular.
            ridge = 1e-10 * float(gram.trace()) / terms
            right = _contracted(unfolded[mode], [f for other, f in enumerate(factors) if other != mode])
            solved = torch.linalg.solve(gram + ridge * torch.eye(terms, dtype=tensor.dtype), right.T).T
            weights = solved.norm(dim=0)
            factors[mode] = solved / torch.where(weights > 0, weights, 1.0)
        if sweep % 10 == 9 or sweep == sweeps - 1:
            current = CP(weights, tuple(factors))
            previous, error = error, float((current.to_tensor() - tensor).norm())
            best = min(best, (error, current), key=lambda pair: pair[0])
            if error < 1e-14 or abs(previous - error) < 1e-12:
                break
    return best


def _refine(tensor: Tensor, error: float, start: CP, steps: int) -> tuple[float, CP]:
    """Levenberg and Marquardt's method: the damping follows how well the quadratic model predicts each step."""
    share = start.weights ** (1 / len(start.factors))
    factors, damping, growth = [f * share for f in start.factors], math.nan, 2.0
    for _ in range(steps):
        if error < 1e-14:
            break
        gram, gradient = _normal_equations(tensor, factors)
        damping = 1e-3 * float(gram.diagonal().amax()) if math.isnan(damping) else damping
        previous = error
        while damping < 1e12 and error == previous:
            damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype)
            triangle, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed):
                step = -torch.cholesky_solve(gradient[:, None], triangle).squeeze(1)
                moved = [f + d.reshape(f.shape) for f, d in zip(factors, _split(step, factors), strict=True)]
                reached = float((_written_out(moved) - tensor).norm())
                if reached < error:
                    gain = (error**2 - reached**2) / float(step @ (damping * step - gradient))
                    factors, error = moved, reached
                    damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
                    break
            damping, growth = damping * growth, 2 * growth
        if error > previous * (1 - 1e-9):
            break
    norms = [f.norm(dim=0) for f in factors]
    units = tuple(f / torch.where(n > 0, n, 1.0) for f, n in zip(factors, norms, strict=True))
    return error, CP(torch.stack(norms).prod(0), units)


def _split(step: Tensor, factors: list[Tensor]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = step.split([f.numel() for f in factors])
    return parts


def _written_out(factors: list[Tensor]) -> Tensor:
    return CP(factors[0].new_ones(factors[0].shape[1]), tuple(factors)).to_tensor()


def _normal_equations(tensor: Tensor, factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``J^T J`` and the gradient ``J^T (T_CP - T)`` of all entries of all factors, one factor after the other."""
    grams = [f.T @ f for f in factors]
    count, terms = len(factors), factors[0].shape[1]

    def others(*left_out: int) -> Tensor:
        result = grams[0].new_ones(terms, terms)
        for mode, gram in enumerate(grams):
            if mode not in left_out:
                result = result * gram
        return result

    rows, gradient = list[Tensor](), list[Tensor]()
    for mode, factor in enumerate(factors):
        own = others(mode)
        rest = [f for other, f in enumerate(factors) if other != mode]
        gradient.append((factor @ own - _contracted(tensor.movedim(mode, 0), rest)).flatten())
        blocks = list[Tensor]()
        for other in range(count):
            if other == mode:
                blocks.append(torch.kron(torch.eye(len(factor), dtype=factor.dtype), own))
                continue
            # Of entry (a, z) of this factor and (b, w) of the other: A[a, w] B[b, z] times the Grams of the rest.
            block = torch.einsum("zw,aw,bz->azbw", others(mode, other), factor, factors[other])
            blocks.append(block.reshape(factor.numel(), -1))
        rows.append(torch.cat(blocks, 1))
    return torch.cat(rows), torch.cat(gradient)


def _contracted(tensor: Tensor, factors: list[Tensor]) -> Tensor:
    """The tensor (M, ..) contracted with a column of each factor, for all columns: (M, Z)."""
    result = tensor.unsqueeze(-1)
    for factor in reversed(factors):
        if result.shape[-1] == 1 and factor.shape[1] >= 1 and result.dim() == len(factors) + 2:
            result = result.squeeze(-1) @ factor
        else:
            result = (result * factor).sum(-2)
    return result
