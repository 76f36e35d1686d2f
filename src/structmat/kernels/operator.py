"""The operator ``structmat::multiply`` as PyTorch sees it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from structmat.kernels.text import Text


def define_fake() -> None:
    """What the operator returns for tensors without data (meta, tracing)."""

    def outcome(x: Tensor, tensors: list[Tensor], program: str) -> Tensor:
        return x.new_empty(x.shape[0], int(program.split(maxsplit=2)[1]))

    torch.library.register_fake("structmat::multiply")(outcome)


def multiply(text: Text, tensors: Mapping[str, Tensor], rows: Tensor, bias: Tensor | None) -> Tensor:
    """Rows (batch, in_features) to (batch, out_features) in one pass over the batch.

    No gradient is recorded: callers see to it that none is wanted.
    """
    given = [tensors[name].contiguous() for name in text.names]
    if bias is not None:
        given.append(bias.contiguous())
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    program = text.plain if bias is None else text.biased
    result: Tensor = torch.ops.structmat.multiply.default(rows, given, program)
    return result
