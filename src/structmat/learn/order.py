"""An order of hidden units in which windows find more: free at inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError


def spectral_order(affinity: Tensor) -> Tensor:
    """The order (size,) of a symmetric affinity (size, size) by its Fiedler vector: units that belong together are
    neighbours. Source: Atkins, Boman, Hendrickson, "A spectral algorithm for seriation" (1998)."""
    weights = affinity.detach().double().abs().clone()
    weights.fill_diagonal_(0.0)
    degree = weights.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1e-300).rsqrt(), 0.0)
    _, vectors = torch.linalg.eigh(torch.eye(len(weights), dtype=torch.float64) - scale[:, None] * weights * scale)
    fiedler = vectors[:, min(1, len(weights) - 1)] * scale
    # The sign of an eigenvector is arbitrary: make it that of its largest entry.
    fiedler = fiedler * torch.sign(fiedler[fiedler.abs().argmax()])
    return torch.argsort(fiedler, stable=True)


def reorder_hidden(first: nn.Linear, second: nn.Linear) -> Tensor:
    """Order the hidden units between two layers, in place, so that alike ones are neighbours.

    The rows of ``first`` (and its bias) and the columns of ``second`` move together: with an elementwise function
    between them the network computes the same. Units are alike where their rows ``|W1| |W1|^T`` and their columns are.

    Returns:
        The order (hidden,): the new unit ``i`` is the old unit ``order[i]``.

    Raises:
        ShapeError: the layers don't fit.
    """
    if first.out_features != second.in_features:
        raise ShapeError(f"The first layer has {first.out_features} outputs, the second {second.in_features} inputs.")
    with torch.no_grad():
        rows, columns = first.weight.double().abs(), second.weight.double().abs().T
        order = spectral_order(
            (rows @ rows.T) / rows.square().sum().clamp(min=1e-30)
            + (columns @ columns.T) / columns.square().sum().clamp(min=1e-30)
        )
        first.weight.copy_(first.weight[order])
        if isinstance(first.bias, Tensor):
            first.bias.copy_(first.bias[order])
        second.weight.copy_(second.weight[:, order])
    return order
