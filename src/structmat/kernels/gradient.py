"""The native backend with gradients: one pass over tiles of the batch in each direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat.kernels.operator import run, run_backward
from structmat.kernels.text import Text
from structmat.modes import is_usual_backward
from structmat.program import Program, reference

Gradients = tuple[Tensor | None, ...]


def run_recorded(program: Program, text: Text, biased: bool, x: Tensor, given: list[Tensor]) -> Tensor:
    """What :func:`structmat.kernels.operator.run` does, recorded for the gradients of ``x`` and of the tensors.

    Args:
        program: what is run.
        text: the program as the native backend reads it.
        biased: whether the last tensor is added to each row.
        x: the input, its rows at equal distances.
        given: the tensors in the order of the text, contiguous.
    """
    result: Tensor = _Product.apply(x, program, text, biased, *given)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    # The context is an argument, and not set up by a function of its own: transforms of torch.func, which ask for that,
    # run on the reference, and it would cost as much as a small product.

    @staticmethod
    def forward(ctx: Any, x: Tensor, program: Program, text: Text, biased: bool, *given: Tensor) -> Tensor:
        ctx.save_for_backward(x, *given)
        ctx.program, ctx.text, ctx.biased = program, text, biased
        return run(x, list(given), text.biased if biased else text.plain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *given = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        found: Gradients
        if is_usual_backward(grad):
            found = _in_one_pass(ctx.text.biased if ctx.biased else ctx.text.plain, x, given, grad, wanted)
        else:
            found = _by_reference(ctx.program, ctx.text, ctx.biased, x, given, grad, wanted)
        return found[0], None, None, None, *found[1:]


def gradients(
    text: Text, biased: bool, x: Tensor, given: list[Tensor], grad: Tensor, wanted: tuple[bool, ...]
) -> Gradients:
    """The gradients of the tensors of a product that was not recorded. In one pass, also for plain products: PyTorch's
    operations would first make what was multiplied once more.

    Args:
        text, biased, given: as of :func:`run_recorded`.
        x: the rows that were multiplied (rows, in_features), contiguous.
        grad: of the outcome (rows, out_features), contiguous.
        wanted: of which tensors.
    """
    if not any(wanted):
        return (None,) * len(wanted)
    words = text.biased if biased else text.plain
    return _in_one_pass(words, x, given, grad, (False, *wanted))[1:]


def _in_one_pass(words: str, x: Tensor, given: list[Tensor], grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
    if grad.dim() != 2 or grad.stride(-1) != 1:
        grad = grad.contiguous()
    made = [torch.empty(t.shape if w else 0, dtype=x.dtype) for t, w in zip((x, *given), wanted, strict=True)]
    run_backward(x, grad, given, made[0], made[1:], words)
    return tuple(gradient if w else None for gradient, w in zip(made, wanted, strict=True))


def _by_reference(
    program: Program,
    text: Text,
    biased: bool,
    x: Tensor,
    given: list[Tensor],
    grad: Tensor,
    wanted: tuple[bool, ...],
) -> Gradients:
    """The same from PyTorch's operations: to differentiate once more, and for many gradients at a time."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Views, so that each gradient is that of one argument alone, even where arguments were computed from another.
        x, *given = (t.view_as(t) for t in (x, *given))
        tensors = dict(zip(text.names, given, strict=False))
        y = reference.affine(program, tensors, x, given[-1]) if biased else reference.apply(program, tensors, x)
        inputs = [t for t, w in zip((x, *given), wanted, strict=True) if w]
        found = iter(torch.autograd.grad(y, inputs, grad, create_graph=differentiated, allow_unused=True))
    return tuple(next(found) if w else None for w in wanted)
