"""How far a network whose matrices were approximated can be from the original one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structmat.errors import ModelError
from structmat.nn.kronecker.block import KroneckerBlock
from structmat.nn.linear import StructuredLinear


@dataclass(frozen=True)
class Perturbation:
    """Distances between the outputs of two networks, for each sample.

    Args:
        measured: ``||y' - y||`` (samples,).
        bound: no distance is larger (samples,).
        size: ``||y||`` (samples,).
    """

    measured: Tensor
    bound: Tensor
    size: Tensor

    @property
    def error(self) -> float:
        """The relative distance over all samples."""
        return float(self.measured.norm() / self.size.norm())

    @property
    def bound_error(self) -> float:
        """The bound on it."""
        return float(self.bound.norm() / self.size.norm())


def lipschitz(module: nn.Module) -> float | None:
    """The Lipschitz constant of an activation that is known, else None. Dropout counts as in evaluation mode."""
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.ELU | nn.CELU):
        return max(1.0, abs(module.alpha))
    for kinds, constant in _CONSTANTS:
        if isinstance(module, kinds):
            return constant
    return None


_CONSTANTS: tuple[tuple[tuple[type[nn.Module], ...], float], ...] = (
    ((nn.Sigmoid,), 0.25),
    ((nn.GELU,), 1.13),
    ((nn.SiLU,), 1.1),
    ((nn.ReLU, nn.ReLU6, nn.Tanh, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid), 1.0),
    ((nn.Identity, nn.Dropout, nn.Flatten), 1.0),
)


@torch.no_grad()
def perturbation(
    original: nn.Sequential, changed: nn.Sequential, x: Tensor, *, frobenius: bool = False
) -> Perturbation:
    """Distances between a multi-layer perceptron and one with other matrices, and what theory allows them to be.

    With ``h_l = sigma(W_l h_(l-1) + b_l)`` and matrices ``V_l`` in place of ``W_l`` the distance d_l after layer l is
    at most ``lipschitz(sigma) (||V_l||_2 d_(l-1) + ||W_l - V_l||_2 ||h_(l-1)||)``: add and subtract ``V_l h_(l-1)``.
    Valid for every sample, and loose. Computed in float64.

    Args:
        original: linear layers and activations with a known Lipschitz constant.
        changed: the same layers, linear ones replaced by linear layers of any kind with the same bias.
        x: rows (samples, in_features).
        frobenius: with the Frobenius norm of the differences, as the theorem of the nearest sums has it.

    Raises:
        ModelError: a layer is of another kind, or the two do not match.
    """
    pairs = list(zip(_flat(original), _flat(changed), strict=False))
    if len(pairs) != len(list(_flat(original))) or len(pairs) != len(list(_flat(changed))):
        raise ModelError("The two models have different numbers of layers.")
    exact = other = x.double()
    distance = exact.new_zeros(len(x))
    for before, after in pairs:
        if isinstance(before, nn.Linear):
            weight, bias = dense_affine(before)
            used, shift = dense_affine(after)
            change = weight - used
            gap = torch.linalg.norm(change) if frobenius else torch.linalg.matrix_norm(change, 2)
            moved = 0.0 if bias is None and shift is None else _distance(bias, shift)
            distance = torch.linalg.matrix_norm(used, 2) * distance + gap * exact.norm(dim=1) + moved
            exact = nn.functional.linear(exact, weight, bias)
            other = nn.functional.linear(other, used, shift)
        elif (constant := lipschitz(before)) is not None and type(before) is type(after):
            distance = constant * distance
            if not isinstance(before, nn.Dropout):
                exact, other = before(exact), after(other)
        else:
            raise ModelError(
                f"The bound is for linear layers and activations with a known Lipschitz constant; the model has "
                f"{type(before).__name__} in place of which is {type(after).__name__}."
            )
    return Perturbation((other - exact).norm(dim=1), distance, exact.norm(dim=1))


def _flat(model: nn.Module) -> Iterator[nn.Module]:
    if isinstance(model, nn.Sequential):
        for module in model:
            yield from _flat(module)
    else:
        yield model


def _distance(bias: Tensor | None, other: Tensor | None) -> float:
    parts: Sequence[Tensor | None] = (bias, other)
    held = next(p for p in parts if p is not None)
    a, b = (torch.zeros_like(held, dtype=torch.float64) if p is None else p.double() for p in parts)
    return float((a - b).norm())


def dense_affine(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The matrix and the bias of a linear layer of any kind, in float64.

    Raises:
        ModelError: the layer is not linear.
    """
    if isinstance(layer, nn.Linear):
        given: Tensor | None = layer.bias
        return layer.weight.detach().double(), None if given is None else given.detach().double()
    if isinstance(layer, KroneckerBlock) and layer.outer is None and layer.is_linear(0.0):
        layer = layer.to_structured(0.0)
    if isinstance(layer, StructuredLinear):
        weight = layer.matrix.to(dtype=torch.float64).to_dense().detach()
        return weight, None if layer.bias is None else layer.bias.detach().double()
    raise ModelError(f"{type(layer).__name__} is not a linear layer, or its activation is not the identity.")
