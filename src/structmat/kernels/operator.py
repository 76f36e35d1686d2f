"""The operator ``structmat::multiply`` as PyTorch sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from structmat.kernels.text import Text


def define_fake() -> None:
    """What the operator returns for tensors without data (meta, tracing)."""

    def outcome(x: Tensor, tensors: list[Tensor], program: str) -> Tensor:
        return x.new_empty(*x.shape[:-1], int(program.split(maxsplit=2)[1]))

    torch.library.register_fake("structmat::multiply")(outcome)


def multiply(text: Text, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """Rows (..., in_features) to (..., out_features) in one pass over the batch.

    No gradient is recorded: callers see to it that none is wanted.
    """
    given = [tensors[name].contiguous() for name in text.names]
    if bias is not None:
        given.append(bias.contiguous())
    if x.dim() != 2 or x.stride(-1) != 1:
        x = x.contiguous()
    return run(x, given, text.plain if bias is None else text.biased)


def run(x: Tensor, given: list[Tensor], words: str) -> Tensor:
    """Call the operator, which must be there: its tensors contiguous, the rows of the input at equal distances."""
    result: Tensor = _operator()(x, given, words)
    return result


@cache
def _operator() -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = torch.ops.structmat.multiply.default
    return found
