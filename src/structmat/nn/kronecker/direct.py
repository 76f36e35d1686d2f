"""Two factors of one order with a common activation: forward and backward written out, with nothing copied in vain.

The meaning is that of the generic way (:mod:`structmat.nn.kronecker.recompute`), which also differentiates once more.
Here activations overwrite what they activate, biases are added by the products, and a backward pass has four products
and no graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from structmat.kernels.choice import is_usual
from structmat.modes import is_compiling, is_usual_backward
from structmat.nn.kronecker.activation import Activation
from structmat.nn.kronecker.recompute import Run, gradients

RECTIFIERS = (torch.relu, F.relu)
TANH = (torch.tanh, F.tanh)


@dataclass(frozen=True)
class Direct:
    """What :func:`run_direct` computes.

    Args:
        left_first: the order.
        m, n, p, q: sizes of the factors (m, n) and (q, p).
        terms: that have this order.
        inner: tanh, ReLU or None.
        inside: shape of the values between the stages, (m, terms, p) or (n, terms, q).
        biased: whether there is a bias between the stages.
    """

    left_first: bool
    m: int
    n: int
    p: int
    q: int
    terms: int
    inner: Activation | None
    inside: tuple[int, ...]
    biased: bool


def is_direct(inner: Activation | None) -> bool:
    """Whether the derivative of an activation is known from its values."""
    return inner is None or inner in RECTIFIERS or inner in TANH


def takes_direct(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are such that the direct way serves: plain, on the CPU, recorded once."""
    if not torch.is_grad_enabled() or is_compiling() or not is_usual():
        return False
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    return x.numel() > 0 and any(t.requires_grad for t in (x, *tensors)) and all(t.dtype == x.dtype for t in tensors)


def run_direct(plan: Direct, run: Run, x: Tensor, tensors: Sequence[Tensor], *, recompute: bool) -> Tensor:
    """``run(x, tensors)``, with the gradients of ``x`` and of the tensors.

    Args:
        plan: what it computes.
        run: the same in differentiable operations, for gradients of gradients.
        x: rows (..., n p).
        tensors: both factors, then the inner and the outer bias if there are any.
        recompute: keep only ``x``.
    """
    rows = x.reshape(-1, x.shape[-1])
    made: Tensor = _Direct.apply(plan, run, recompute, rows, *tensors)  # type: ignore[no-untyped-call]
    return made.reshape(*x.shape[:-1], made.shape[-1])


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Direct, run: Run, recompute: bool, x: Tensor, *tensors: Tensor) -> Tensor:
        x = x.contiguous()
        hidden = _hidden(plan, x, tensors)
        ctx.plan, ctx.run, ctx.count = plan, run, len(tensors)
        ctx.save_for_backward(x, *tensors, *(() if recompute else (hidden,)))
        return _outcome(plan, hidden, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *others = ctx.saved_tensors
        tensors, kept = others[: ctx.count], others[ctx.count :]
        wanted = ctx.needs_input_grad[3:]
        if not is_usual_backward(grad):
            return None, None, None, *gradients(ctx.run, (x, *tensors), wanted, grad)
        hidden = kept[0] if kept else _hidden(ctx.plan, x, tensors)
        return None, None, None, *_backward(ctx.plan, x, tensors, hidden, grad.contiguous(), wanted)


def _hidden(plan: Direct, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """What leaves the activation, (rows, numbers inside)."""
    batch, terms = len(x), plan.terms
    bias = tensors[2].expand(plan.inside) if plan.biased else None
    if plan.left_first:
        weight = tensors[0].reshape(plan.m * terms, plan.n).expand(batch, -1, -1)
        given = x.view(batch, plan.n, plan.p)
        if bias is None:
            made = torch.bmm(weight, given)
        else:
            made = torch.baddbmm(bias.reshape(plan.m * terms, plan.p), weight, given)
    else:
        made = torch.mm(x.view(batch * plan.n, plan.p), tensors[1].reshape(terms * plan.q, plan.p).T)
        if bias is not None:
            made.view(batch, -1).add_(bias.reshape(-1))
    if plan.inner in TANH:
        made.tanh_()
    elif plan.inner is not None:
        made.relu_()
    return made.view(batch, -1)


def _outcome(plan: Direct, hidden: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    batch, terms = len(hidden), plan.terms
    outer = tensors[-1] if len(tensors) > 2 + plan.biased else None
    if plan.left_first:
        made = torch.mm(hidden.view(batch * plan.m, terms * plan.p), tensors[1].reshape(plan.q, terms * plan.p).T)
        made = made.view(batch, plan.m * plan.q)
        return made if outer is None else made.add_(outer)
    weight = tensors[0].reshape(plan.m, plan.n * terms).expand(batch, -1, -1)
    given = hidden.view(batch, plan.n * terms, plan.q)
    if outer is None:
        return torch.bmm(weight, given).view(batch, -1)
    return torch.baddbmm(outer.view(plan.m, plan.q), weight, given).view(batch, -1)


def _backward(
    plan: Direct, x: Tensor, tensors: Sequence[Tensor], hidden: Tensor, grad: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the input and of the tensors; the five formulas of back-propagation."""
    batch, terms = len(x), plan.terms
    left, right = tensors[0], tensors[1]
    found: list[Tensor | None] = [None] * (1 + len(tensors))
    if len(tensors) > 2 + plan.biased and wanted[-1]:
        found[-1] = grad.sum(0)
    if plan.left_first:
        du = grad.view(batch * plan.m, plan.q)
        if wanted[2]:
            found[2] = torch.mm(du.T, hidden.view(batch * plan.m, terms * plan.p)).view(right.shape)
        inside = torch.mm(du, right.reshape(plan.q, terms * plan.p))
    else:
        du = grad.view(batch, plan.m, plan.q)
        if wanted[1]:
            between = hidden.view(batch, plan.n * terms, plan.q)
            found[1] = torch.bmm(du, between.transpose(1, 2)).sum(0).view(left.shape)
        inside = torch.bmm(left.reshape(plan.m, plan.n * terms).T.expand(batch, -1, -1), du)
    inside = inside.view(batch, -1)
    if plan.inner in TANH:
        torch.ops.aten.tanh_backward.grad_input(inside, hidden, grad_input=inside)
    elif plan.inner is not None:
        inside = torch.ops.aten.threshold_backward(inside, hidden, 0)
    if plan.biased and wanted[3]:
        found[3] = inside.sum(0).view(plan.inside).sum_to_size(tensors[2].shape)
    if plan.left_first:
        ds = inside.view(batch, plan.m * terms, plan.p)
        if wanted[1]:
            found[1] = torch.bmm(ds, x.view(batch, plan.n, plan.p).transpose(1, 2)).sum(0).view(left.shape)
        if wanted[0]:
            turned = left.reshape(plan.m * terms, plan.n).T.expand(batch, -1, -1)
            found[0] = torch.bmm(turned, ds).view(batch, -1)
    else:
        rows = inside.view(batch * plan.n, terms * plan.q)
        if wanted[2]:
            found[2] = torch.mm(rows.T, x.view(batch * plan.n, plan.p)).view(right.shape)
        if wanted[0]:
            found[0] = torch.mm(rows, right.reshape(terms * plan.q, plan.p)).view(batch, -1)
    return found
