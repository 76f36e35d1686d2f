"""Checks of derivatives: first and second order, in inputs and every parameter, and for each sample apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, grad, vmap

from structmat.testing.case import Case, allowed_gradient_errors

EXHAUSTIVE_LIMIT = 1 << 10
"""With more numbers than this, derivatives are compared along random directions instead of one by one."""


def _function(layer: nn.Module) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], list[str]]:
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        result: Tensor = functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return result

    return run, tuple(p.detach().clone().requires_grad_() for p in layer.parameters()), names


def check_gradients(case: Case) -> None:
    """Derivatives in the input and in every parameter agree with finite differences (``torch.autograd.gradcheck``)."""
    layer = case.layer(torch.float64)
    run, parameters, names = _function(layer)
    x = case.rows(2, dtype=torch.float64).requires_grad_()
    many = x.numel() + sum(p.numel() for p in parameters) > EXHAUSTIVE_LIMIT
    with torch.random.fork_rng(devices=[]):  # the directions of the fast mode
        torch.manual_seed(case.seed)
        try:
            torch.autograd.gradcheck(run, (x, *parameters), fast_mode=many)
        except GradcheckError as error:
            case.require(False, f"gradcheck in the input and {names}: {error}")
    total = run(x, *parameters).sum()
    grads = torch.autograd.grad(total, (x, *parameters), allow_unused=True)
    for name, value in zip(["the input", *names], grads, strict=True):
        case.require(value is not None, f"{name} gets no gradient.")


def check_double_backward(case: Case) -> None:
    """Second derivatives agree with finite differences (``torch.autograd.gradgradcheck`` along random directions)."""
    layer = case.layer(torch.float64)
    run, parameters, names = _function(layer)
    x = case.rows(2, dtype=torch.float64).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        try:
            torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)
        except GradcheckError as error:
            case.require(False, f"gradgradcheck in the input and {names}: {error}")


def check_gradient_per_sample(case: Case) -> None:
    """``vmap(grad(loss))`` gives, for each sample, the gradient that this sample alone gives."""
    layer = case.layer(torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    samples = case.rows(3, dtype=torch.float64)
    weights = case.gaussian(case.shape[0], dtype=torch.float64, draw=2)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = (functional_call(layer, values, (x,)) * weights).sum()
        return result

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, samples)
    for number, x in enumerate(samples):
        single = grad(loss)(parameters, x)
        _, allowed = allowed_gradient_errors(
            layer.matrix.program, layer.tensors(), x[None], weights[None], torch.float64
        )
        for name in parameters:
            limit = allowed.get(name, 0.0)
            case.compare(
                f"the gradient of {name} for sample {number} under vmap", together[name][number], single[name], limit
            )
