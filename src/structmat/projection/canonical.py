"""Sums of outer products of vectors (canonical polyadic decompositions), for Kronecker sums of many factors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Factors = list[Tensor]
"""One tensor (terms, size_i) an axis: ``sum over t of outer(factors[0][t], factors[1][t], ...)``."""

_RIDGE = 1e-10
_GRADIENT_STEPS = 4
_PATIENCE = 1e-7
_POWER_STEPS = 6


def compose(factors: Factors) -> Tensor:
    """The full tensor."""
    left, right = factors[0], factors[1]
    for factor in factors[2:]:
        right = (right[:, :, None] * factor[:, None, :]).flatten(1)
    return (left.T @ right).reshape([f.shape[1] for f in factors])


def _others(factors: Factors, axis: int) -> Tensor:
    """(terms, product of the other sizes): rows of the Khatri-Rao product of all factors but one."""
    terms = factors[0].shape[0]
    rows = factors[0].new_ones(terms, 1)
    for i, factor in enumerate(factors):
        if i != axis:
            rows = (rows[:, :, None] * factor[:, None, :]).flatten(1)
    return rows


def _contracted(tensor: Tensor, factors: Factors, axis: int) -> Tensor:
    """(terms, size of the axis): the tensor contracted with the conjugates of all factors but one."""
    return _others(factors, axis).conj() @ tensor.movedim(axis, 0).flatten(1).T


def _gram(factors: Factors, axis: int) -> Tensor:
    gram = factors[0].new_ones(factors[0].shape[0], factors[0].shape[0])
    for i, factor in enumerate(factors):
        if i != axis:
            gram = gram * (factor.conj() @ factor.T)
    return gram


def sweep(tensor: Tensor, factors: Factors) -> Factors:
    """Alternating least squares, one exact (slightly ridged towards the present) solve an axis: monotone."""
    factors = list(factors)
    for axis in range(len(factors)):
        gram = _gram(factors, axis)
        pull = _contracted(tensor, factors, axis) - gram @ factors[axis]
        ridge = _RIDGE * float(gram.diagonal().real.mean())
        factor, info = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
        if ridge > 0 and not bool(info.any()):
            factors[axis] = factors[axis] + torch.cholesky_solve(pull, factor)
    return factors


def leading(tensor: Tensor, axis: int, count: int) -> Tensor:
    """Leading left singular vectors of an unfolding, (count, size)."""
    u: Tensor = torch.linalg.svd(tensor.movedim(axis, 0).flatten(1), full_matrices=False)[0]
    return u[:, :count].T


class Deflation:
    """Rank-one terms one after the other, each from the leading singular vectors and a few power steps. A longer sum
    goes on from a shorter one, so that one deflation serves all numbers of terms.

    Args:
        tensor: to be approximated.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._rest, self._found = tensor, list[Factors]()

    def terms(self, count: int) -> Factors:
        """The first terms, (count, size) for each axis."""
        while len(self._found) < count:
            self._more()
        return [torch.cat([term[axis] for term in self._found[:count]]) for axis in range(self._rest.dim())]

    def _more(self) -> None:
        rest = self._rest
        factors = [_first(rest, axis) for axis in range(rest.dim())]
        for _ in range(_POWER_STEPS):
            for axis in range(rest.dim()):
                vector = _contracted(rest, factors, axis)
                factors[axis] = vector / torch.linalg.norm(vector).clamp(min=1e-300)
        factors[0] = _contracted(rest, factors, 0)
        self._found.append(factors)
        self._rest = rest - compose(factors)


def _first(tensor: Tensor, axis: int) -> Tensor:
    """The leading left singular vector of an unfolding, (1, size), from the smaller of its Gram matrices: a start of
    power steps need not be more exact."""
    unfolded = tensor.movedim(axis, 0).flatten(1)
    size = float(unfolded.abs().max())
    unfolded = unfolded / size if size > 0 else unfolded
    vector: Tensor
    if unfolded.shape[0] <= unfolded.shape[1]:
        vector = torch.linalg.eigh(unfolded @ unfolded.mH)[1][:, -1:]
        return vector.T
    vector = unfolded @ torch.linalg.eigh(unfolded.mH @ unfolded)[1][:, -1:]
    vector = (vector / torch.linalg.norm(vector).clamp(min=1e-300)).T
    return vector


def random(tensor: Tensor, terms: int, generator: torch.Generator) -> Factors:
    """Gaussian factors of the tensor's size."""
    size = float(torch.linalg.norm(tensor)) / math.sqrt(tensor.numel() * terms)
    scale = size ** (1 / tensor.dim())
    return [scale * torch.randn(terms, n, generator=generator, dtype=tensor.dtype) for n in tensor.shape]


def spanned(tensor: Tensor, terms: int, generator: torch.Generator) -> Factors:
    """Factors drawn in the leading singular subspaces of the unfoldings (truncated higher-order SVD)."""
    size = float(torch.linalg.norm(tensor)) / math.sqrt(tensor.numel() * terms)
    result = []
    for axis in range(tensor.dim()):
        basis = leading(tensor, axis, terms)
        mixed = torch.randn(terms, len(basis), generator=generator, dtype=tensor.dtype) @ basis
        result.append(mixed * size ** (1 / tensor.dim()))
    return result


def decompose(
    tensor: Tensor, terms: int, sweeps: int, generator: torch.Generator, deflation: Deflation | None = None
) -> Factors:
    """A sum of ``terms`` outer products near the tensor: the best of several starts after alternating least squares.

    Starts: greedy deflation, leading singular subspaces, and random ones. A best sum need not exist for two terms or
    more (degenerate sequences); the ridge keeps factors bounded. With 0 sweeps it is the greedy start.

    Args:
        tensor: to be approximated.
        terms: of the sum.
        sweeps: of each start, half of them at first.
        generator: of the random starts.
        deflation: of the tensor, if there is one.
    """
    first = (deflation or Deflation(tensor)).terms(terms)
    if sweeps == 0:
        return first
    starts = [first, spanned(tensor, terms, generator), *(random(tensor, terms, generator) for _ in range(3))]
    quick = max(1, sweeps // 2) if len(starts) > 1 else sweeps
    trials = [run(tensor, start, quick) for start in starts]
    best = min(trials, key=lambda trial: trial[1])
    return run(tensor, best[0], 10 * sweeps)[0]


def run(tensor: Tensor, factors: Factors, sweeps: int) -> tuple[Factors, float]:
    """Sweep until nothing is gained; the factors and the error."""
    error = float(torch.linalg.norm(tensor - compose(factors)))
    for _ in range(sweeps):
        other = sweep(tensor, factors)
        before, found = error, float(torch.linalg.norm(tensor - compose(other)))
        if found > before:
            break
        factors, error = other, found
        if before - error <= _PATIENCE * before:
            break
    return factors, error


def descend(wanted: Tensor, factors: Factors, norm: Callable[[Tensor], Tensor], sweeps: int) -> Factors:
    """Alternating conjugate gradient steps in a quadratic norm; monotone.

    Args:
        wanted: the tensor to approximate.
        factors: the start.
        norm: the positive semidefinite map ``M`` of tensors in the squared error ``<d, M d>``.
        sweeps: how often every axis is updated, each by a few conjugate gradient steps on its own linear problem.
    """
    factors = list(factors)
    squared = math.inf
    for _ in range(sweeps):
        left = wanted - compose(factors)
        before, squared = squared, float((norm(left) * left.conj()).real.sum())
        if before - squared <= _PATIENCE * squared:
            break
        for axis in range(len(factors)):
            factors[axis] = _conjugate_gradients(wanted - compose(factors), factors, axis, norm)
    return factors


def _conjugate_gradients(left: Tensor, factors: Factors, axis: int, norm: Callable[[Tensor], Tensor]) -> Tensor:
    current = factors[axis]
    residual = _contracted(norm(left), factors, axis)
    # Terms are nearly parallel in hard problems: the Gram matrix of the other factors takes that away.
    gram = _gram(factors, axis)
    inverse = torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)
    direction = scaled = inverse @ residual
    size = float((residual.conj() * scaled).real.sum())
    for _ in range(_GRADIENT_STEPS):
        moved = [direction if i == axis else f for i, f in enumerate(factors)]
        image = _contracted(norm(compose(moved)), factors, axis)
        curvature = float((direction.conj() * image).real.sum())
        if curvature <= 0 or size <= 0:
            break
        current = current + (size / curvature) * direction
        residual = residual - (size / curvature) * image
        scaled = inverse @ residual
        before, size = size, float((residual.conj() * scaled).real.sum())
        direction = scaled + (size / before) * direction
    return current


def balance(factors: Factors) -> Factors:
    """The same sum with factors of equal norms in each term."""
    norms = torch.stack([torch.linalg.norm(f, dim=1) for f in factors])
    alive = (norms > 0).all(0)
    mean = norms.clamp(min=1e-300).log().mean(0).exp()
    return [
        torch.where(alive[:, None], f * (mean / n.clamp(min=1e-300))[:, None], torch.zeros_like(f))
        for f, n in zip(factors, norms, strict=True)
    ]
