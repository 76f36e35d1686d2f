"""A function of which only the input is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.modes import is_followed

Run = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""A pure function of an input and of tensors."""


def recomputed(run: Run, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """``run(x, tensors)``; what is made on the way is made again in the backward pass instead of being kept.

    Differentiable any number of times. Under compilation and the transforms of torch.func, which know better what to
    keep, it is a plain call.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))
    if not wanted or is_followed():
        return run(x, tensors)
    result: Tensor = _Recomputed.apply(run, x, *tensors)  # type: ignore[no-untyped-call]
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.run = run
        return run(x, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *gradients(ctx.run, ctx.saved_tensors, ctx.needs_input_grad[1:], grad)


def gradients(run: Run, saved: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Gradients of what ``run(saved[0], saved[1:])`` makes, themselves differentiable where that is asked for.

    Args:
        run: is called once more.
        saved: its input and its tensors.
        wanted: which of them want a gradient.
        grad: of the outcome.
    """
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Views, so that each gradient is that of one argument alone, even where arguments were computed from another.
        held = [t.view_as(t) for t in saved]
        made = run(held[0], held[1:])
        inputs = [t for t, w in zip(held, wanted, strict=True) if w]
        found = iter(torch.autograd.grad(made, inputs, grad, create_graph=differentiated, allow_unused=True))
    return [next(found) if w else None for w in wanted]
