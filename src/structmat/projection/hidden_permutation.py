"""A permutation from a few noisy pairs of its inputs and outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.errors import DataError, ShapeError
from structmat.matrix import StructuredMatrix
from structmat.projection.assignment import assignment
from structmat.structures.permutation import Permutation


@dataclass(frozen=True, eq=False)
class HiddenPermutation:
    """What :func:`recover_permutation` found.

    Args:
        order: (n,) with ``outputs[:, i]`` near ``inputs[:, order[i]]``.
        noise: standard deviation of what is left.
        doubt: an upper bound, for Gaussian noise of that size, of the expected number of pairs of places whose exchange
            would have fitted better than the truth. Well below 1: the order is right. 1 or more: some of it is not.
    """

    order: Tensor
    noise: float
    doubt: float

    @property
    def matrix(self) -> StructuredMatrix:
        """The member of :class:`Permutation`."""
        size = len(self.order)
        return StructuredMatrix(Permutation(), (size, size), {"order": self.order})


def recover_permutation(inputs: Tensor, outputs: Tensor) -> HiddenPermutation:
    """The permutation P behind pairs ``y = P x + noise``.

    Each pair tells one number of every place, and the squared distance of all outputs from their inputs is a sum over
    places: the permutation of maximum likelihood for Gaussian noise is a linear assignment, the exact optimum. About
    ``4 log(n) noise^2`` pairs suffice for inputs of unit variance, much fewer than n.

    Args:
        inputs: (pairs, n), a row each, real or complex.
        outputs: (pairs, n).

    Raises:
        ShapeError: the two are not of one shape with two axes.
        DataError: there is no pair, or an entry is NaN or infinite.

    Cost: ``O(n^3)`` at most, in practice little more than the product ``outputs^T inputs``.
    Source: Kuhn 1955; Crouse 2016 for the algorithm.
    """
    if inputs.dim() != 2 or inputs.shape != outputs.shape:
        raise ShapeError(
            f"Pairs are two tensors (pairs, n) of one shape; got {tuple(inputs.shape)} and {tuple(outputs.shape)}."
        )
    if inputs.shape[0] == 0 or not bool(torch.isfinite(inputs).all() and torch.isfinite(outputs).all()):
        raise DataError(f"Of {inputs.shape[0]} pairs none is there or some hold NaN or infinite numbers.")
    dtype = torch.complex128 if inputs.is_complex() or outputs.is_complex() else torch.float64
    x, y = (t.detach().to(device="cpu", dtype=dtype) for t in (inputs, outputs))
    order = assignment(y.mH @ x)
    noise = float(torch.linalg.norm(y - x[:, order])) / math.sqrt(x.numel())
    squares = x.abs().square().sum(0)
    apart = (squares[:, None] + squares - 2 * (x.mH @ x).real).clamp(min=0)
    upper = torch.triu_indices(len(order), len(order), 1)
    distances = apart[upper[0], upper[1]].sqrt()
    # An exchange of two places wins where noise along their difference, of deviation sqrt(2) noise, exceeds it. The
    # noise of complex numbers is in two directions, of which one counts.
    deviation = noise if dtype.is_complex else math.sqrt(2) * noise
    if deviation > 0:
        doubt = float(0.5 * torch.special.erfc(distances / (deviation * math.sqrt(2))).sum())
    else:
        doubt = float((distances == 0).sum()) / 2
    return HiddenPermutation(order, noise, doubt)
