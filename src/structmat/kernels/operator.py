"""The operator ``structmat::multiply`` as PyTorch sees it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from structmat.kernels.text import Text


def define_fake() -> None:
    """What the operator returns for tensors without data (meta, tracing)."""

    def shape_of(x: Tensor, tensors: list[Tensor], program: str) -> Tensor:
        return x.new_empty(x.shape[0], out_features(program))

    torch.library.register_fake("structmat::multiply")(shape_of)


def out_features(program: str) -> int:
    """Of a program's text: what its last stage puts out."""
    return _Reader(program.split()[1:]).out()


class _Reader:
    """Sizes of a program from its text."""

    def __init__(self, words: list[str]) -> None:
        self.words = iter(words)

    def out(self) -> int:
        kind = next(self.words)
        if kind in ("chain", "sum"):
            outs = [self.out() for _ in range(self.number())]
            return outs[-1]
        if kind == "shuffle":
            axes = self.number()
            sizes = [self.number() for _ in range(2 * axes)][:axes]
            product = 1
            for size in sizes:
                product *= size
            return product
        count = {"contract": 8, "diagonal": 2, "permute": 3, "sparse": 6, "interpolate": 5, "windowed": 9}.get(kind, 3)
        n = [self.number() for _ in range(count)]
        if kind == "contract":
            return n[0] * n[1] * n[3]
        if kind in ("diagonal", "permute"):
            return n[0]
        if kind == "sparse":
            return n[1] if n[3] else n[0]
        if kind == "interpolate":
            return n[1] if n[2] else n[0]
        if kind == "windowed":
            return n[1] if n[5] else n[0]
        return n[1]  # pad, crop

    def number(self) -> int:
        return int(next(self.words))


def multiply(text: Text, tensors: Mapping[str, Tensor], rows: Tensor, bias: Tensor | None) -> Tensor:
    """Rows (batch, in_features) to (batch, out_features) in one pass over the batch.

    No gradient is recorded: callers see to it that none is wanted.
    """
    given = [tensors[name].contiguous() for name in text.names]
    if bias is not None:
        given.append(bias.contiguous())
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    head = "rows " if bias is None else "rows+bias "
    result: Tensor = torch.ops.structmat.multiply.default(rows, given, head + text.words)
    return result
