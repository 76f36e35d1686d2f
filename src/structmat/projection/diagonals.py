"""Matrices that are constant along diagonals or antidiagonals, wrapped around or not: their nearest members.

They form a linear space in which every entry of a matrix belongs to one number, so that the Frobenius norm falls apart
into one problem a number, solved by the mean. In the norm ``||(W - S) C^(1/2)||`` the numbers interact: one linear
system, whose matrix ``G[k, l] = sum over i of C[j(i, k), j(i, l)]`` is made of running sums along the diagonals of C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.program.convolve import convolution_matrix
from structmat.program.toeplitz import Convolution
from structmat.projection.target import Certificate, Fit, Target

_DAMPING = 1e-13
"""Share of its mean diagonal that is added to a singular system. Its influence is removed by repeating the solution."""

_REPEATS = 4


def fit_diagonals(stage: Convolution, target: Target) -> Fit:
    """The member of the space of ``stage``'s matrices (one block, twist None or 1) nearest to a target.

    Cost: ``out * in`` additions; in a weighted norm a system of ``out + in`` equations, which a fit without sweeps
    spares itself: it is then the unweighted optimum.
    """
    weight = target.weight
    place = places(stage)
    if target.second_moment is None or target.sweeps == 0:
        found = _sums(weight, place, stage.entries) / _sums(torch.ones_like(weight), place, stage.entries)
    else:
        found = _solve(_normal(stage, target.second_moment), _sums(weight @ target.second_moment, place, stage.entries))
    if target.second_moment is not None and target.sweeps == 0:
        return Fit({stage.weight: found}, Certificate.NONE, 0.0, "means along diagonals, unweighted")
    method = "means along diagonals" if target.second_moment is None else "weighted least squares for the diagonals"
    error = target.error(convolution_matrix(stage, found))
    return Fit({stage.weight: found}, Certificate.OPTIMAL, error, method)


def places(stage: Convolution) -> Tensor:
    """Which number of the weight stands at each entry of the matrix: integers (height, width)."""
    i, j = torch.arange(stage.height)[:, None], torch.arange(stage.width)
    place = i + j if stage.hankel else i - j + (0 if stage.twist == 1.0 else stage.width - 1)
    return place % stage.period if stage.twist == 1.0 else place


def _sums(values: Tensor, place: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, place.flatten(), values.flatten())


def _normal(stage: Convolution, moment: Tensor) -> Tensor:
    """The matrix of the normal equations for the numbers of the weight."""
    height, width = stage.height, stage.width
    # By rows from the right for Toeplitz matrices: the entries of a row then are numbers in a row, as for Hankel ones.
    seen = (moment if stage.hankel else moment.flip(0, 1)).mT
    size = height + width - 1
    running = moment.new_zeros(size, size)
    running[:width, :width] = seen
    for row in range(1, size):
        running[row, 1:] += running[row - 1, :-1]
    gram = running.clone()
    gram[height:, height:] -= running[: size - height, : size - height]
    if stage.twist is None:
        return gram
    first = 0 if stage.hankel else 1 - width  # the place of the first number
    wrapped = (torch.arange(size) + first) % stage.period
    folded = moment.new_zeros(stage.period, size).index_add(0, wrapped, gram)
    return moment.new_zeros(stage.period, stage.period).index_add(1, wrapped, folded)


def _solve(gram: Tensor, wanted: Tensor) -> Tensor:
    """A solution of a positive semidefinite system, by a damped one whose residual is solved for again."""
    size = gram.shape[0]
    damping = _DAMPING * size * float(gram.diagonal().real.mean())
    factor = torch.linalg.cholesky((gram + gram.mH) / 2 + max(damping, 1e-300) * torch.eye(size, dtype=gram.dtype))
    found = torch.zeros_like(wanted)
    for _ in range(_REPEATS):
        found = found + torch.cholesky_solve((wanted - gram @ found)[:, None], factor)[:, 0]
    return found
