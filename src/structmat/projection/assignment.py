"""Permutations by linear assignment."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from structmat.projection.target import Target


def assigned(target: Target) -> Tensor:
    """The permutation ``p`` with the largest ``sum_i Re G[i, p[i]]``, ``G = B W C`` for the moments of the target.

    ``||W - P||^2 = ||W||^2 + n - 2 Re <W, P>``, so that in the Frobenius norm nothing is nearer. In a weighted norm the
    size of the member depends on the permutation too: there the better of this one and the plain one is taken.
    """
    plain = assignment(target.weight)
    correlations = target.weight if target.second_moment is None else target.weight @ target.second_moment
    correlations = correlations if target.output_moment is None else target.output_moment @ correlations
    if correlations is target.weight:
        return plain
    eye = torch.eye(len(plain), dtype=target.weight.dtype)
    return min((plain, assignment(correlations)), key=lambda order: target.error(eye[order]))


def assignment(scores: Tensor) -> Tensor:
    """``p`` (n,) that maximises the sum of ``scores[i, p[i]]`` (real parts)."""
    wide = scores.real if scores.is_complex() else scores
    columns = linear_sum_assignment(wide.detach().cpu().to(torch.float64).numpy(), maximize=True)[1]
    return torch.from_numpy(columns)
