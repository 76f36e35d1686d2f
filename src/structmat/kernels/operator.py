"""The operators ``structmat::multiply`` and ``structmat::multiply_backward`` as PyTorch sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from structmat.kernels.text import Text


def define_fakes() -> None:
    """What the operators do for tensors without data (meta, tracing)."""

    def outcome(x: Tensor, tensors: list[Tensor], program: str) -> Tensor:
        return x.new_empty(*x.shape[:-1], int(program.split(maxsplit=2)[1]))

    def nothing(
        x: Tensor, grad: Tensor, tensors: list[Tensor], grad_x: Tensor, grads: list[Tensor], program: str
    ) -> None:
        return None

    torch.library.register_fake("structmat::multiply")(outcome)
    torch.library.register_fake("structmat::multiply_backward")(nothing)


def arguments(text: Text, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The input and the tensors as the operators take them."""
    given = [tensors[name].contiguous() for name in text.names]
    if bias is not None:
        given.append(bias.contiguous())
    if x.dim() != 2 or x.stride(-1) != 1:
        x = x.contiguous()
    return x, given


def run(x: Tensor, given: list[Tensor], words: str) -> Tensor:
    """Rows (..., in_features) to (..., out_features) in one pass over the batch. No gradient is recorded.

    Args:
        x: the input, its rows at equal distances.
        given: the tensors in the order of the text, contiguous.
        words: the text, with or without a bias.
    """
    result: Tensor = _multiply()(x, given, words)
    return result


def run_backward(x: Tensor, grad: Tensor, given: list[Tensor], grad_x: Tensor, grads: list[Tensor], words: str) -> None:
    """Write the gradients of the input and of the tensors, given that of the outcome, in one pass over the batch.

    Args:
        x, given, words: what :func:`run` was called with.
        grad: the gradient of what it returned, its rows at equal distances.
        grad_x, grads: what is written: as many numbers as in ``x`` and in each tensor, contiguous; or none, for a
            gradient that is not wanted.
    """
    _multiply_backward()(x, grad, given, grad_x, grads, words)


@cache
def _multiply() -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = torch.ops.structmat.multiply.default
    return found


@cache
def _multiply_backward() -> Callable[..., None]:
    found: Callable[..., None] = torch.ops.structmat.multiply_backward.default
    return found
