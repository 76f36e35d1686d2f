"""The shallow approximation of a tensor: a CP fit by alternating least squares, and how good any could be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structmat.errors import DataError
from structmat.nn.convac.expand import matricize
from structmat.nn.convac.formats import CP


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
    tensor: Tensor, terms: int, *, sweeps: int = 200, starts: int = 3, seed: int = 0, part: Sequence[int] | None = None
) -> CPFit:
    """Alternating least squares from random starts; cost ``2 M^N Z`` for each mode of a sweep.

    Args:
        tensor: (M_0, .., M_{N-1}), not zero.
        terms: Z.
        sweeps: over all modes.
        starts: the best is kept.
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


def _contracted(tensor: Tensor, factors: list[Tensor]) -> Tensor:
    """The tensor (M, ..) contracted with a column of each factor, for all columns: (M, Z)."""
    result = tensor.unsqueeze(-1)
    for factor in reversed(factors):
        if result.shape[-1] == 1 and factor.shape[1] >= 1 and result.dim() == len(factors) + 2:
            result = result.squeeze(-1) @ factor
        else:
            result = (result * factor).sum(-2)
    return result
