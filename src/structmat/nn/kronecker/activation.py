"""Activations of Kronecker blocks: any elementwise function, and one that starts as the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
"""An elementwise function such as ``torch.tanh``, or a module such as ``nn.GELU()``.

A function may be called again in the backward pass, so it must give the same each time; what is random or has a state
is a module.
"""

_NODES = 64


@dataclass(frozen=True)
class Slopes:
    """A parametric rectifier with one learned slope a term: ``max(z, 0) + a min(z, 0)``.

    With the slope 1 it is the identity: a block that starts there equals a linear sum of Kronecker products, and what
    it makes of its freedom is learned.

    Args:
        start: the slope at the start.
        learned: whether it is a parameter, or a buffer that a schedule moves (:func:`set_slopes`).
    """

    start: float = 1.0
    learned: bool = True

    def __call__(self, z: Tensor) -> Tensor:
        return rectify(z, torch.tensor(self.start, dtype=z.dtype, device=z.device))


def rectify(z: Tensor, slope: Tensor) -> Tensor:
    """``max(z, 0) + slope min(z, 0)``: exactly ``z`` for a slope of 1."""
    return torch.where(z > 0, z, slope * z)  # with the derivative of nn.PReLU at 0, which clamps would count twice


def gain(activation: Activation | None) -> float:
    """By how much an activation divides the mean square of a standard normal value: 2 for ReLU, 1 for the identity.

    ``1 / E[phi(z)^2]``, by Gauss-Hermite quadrature of 64 nodes. He et al., "Delving deep into rectifiers" (2015), for
    any function.
    """
    if activation is None:
        return 1.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    with torch.no_grad():
        z = torch.from_numpy(nodes)
        if isinstance(activation, nn.Module):
            held = next(iter(activation.parameters()), None)
            z = z if held is None else z.to(held)
        made = activation(z).double().numpy()
    return float(1.0 / max(1e-12, (weights * made**2).sum() / weights.sum()))


def is_pure(activation: Activation | None) -> TypeGuard[Activation | None]:
    """Whether the backward pass may call it again: not a module, which may be random or keep a state."""
    return not isinstance(activation, nn.Module)


def name_of(activation: Activation | None) -> str:
    """What to show of it."""
    if activation is None:
        return "identity"
    if isinstance(activation, nn.Module | Slopes):
        return str(activation)
    return getattr(activation, "__name__", type(activation).__name__)
