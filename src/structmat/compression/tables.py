"""Moments of tables: an embedding takes rows of its matrix ``W``, and output heads tied to it multiply by it.

For a change ``D`` of the table the predicted rise of the loss is ``1/2 tr(G D C D^T)`` times the number of rows, for
either use: of a head with the second moments ``C`` of what it reads and ``G`` of the gradients in its logits; of the
embedding with ``C`` the second moment of the gradients in what it puts out and ``G`` the diagonal of how often each row
is taken. Fits know one such product. Both uses together are a sum of two, of which the product with the same partial
traces is taken: ``C`` is the sum of the uses' own, each weighed by its number of rows and the trace of its ``G``, and
``G`` likewise. So a table serves each use as far as the loss feels it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.structure import Shape

LARGE_TABLE = 2048
"""Rows of a table from which on ``G`` is known by its trace alone: all rows weigh the same then."""


@dataclass(frozen=True)
class Use:
    """One use of a table (out, in).

    Args:
        inner: ``C`` (in, in).
        outer: ``G`` (out, out), or its mean eigenvalue where the table is large; None where no gradient arrives.
        trace: of ``G``.
        rows: how often it is used.
    """

    inner: Tensor
    outer: Tensor | None
    trace: float
    rows: int


def looked_up(gradients: Tensor | None, counts: Tensor, shape: Shape) -> Use:
    """The embedding's.

    Args:
        gradients: (in, in), the sum of ``g g^T`` of the gradients in its outputs, or None.
        counts: (out,), how often each row was taken.
        shape: of the table.
    """
    rows = int(counts.sum())
    if gradients is None:
        return Use(torch.eye(shape[1], dtype=torch.float64), None, 0.0, rows)
    shares = counts / rows
    outer = torch.diag(shares) if shape[0] <= LARGE_TABLE else shares.mean()
    return Use(gradients / rows, outer, 1.0, rows)


def multiplied(inputs: Tensor, gradients: Tensor | None, rows: int, shape: Shape) -> Use:
    """A head's.

    Args:
        inputs: (in, in), the sum of ``x x^T``.
        gradients: (out, out), the sum of ``g g^T``, or of a large table its trace, or None.
        rows: how many there were.
        shape: of the table.
    """
    if gradients is None:
        return Use(inputs / rows, None, 0.0, rows)
    if gradients.dim() == 0:
        return Use(inputs / rows, gradients / rows / shape[0], float(gradients) / rows, rows)
    return Use(inputs / rows, gradients / rows, float(gradients.trace()) / rows, rows)


def together(uses: Sequence[Use], rows: int) -> tuple[Tensor, Tensor | None]:
    """``C`` and ``G`` such that so many rows of their product are all uses; without gradients, ``C`` of the last use,
    which is a head's if there is one."""
    known = [(use, use.outer) for use in uses if use.outer is not None]
    total = sum(use.rows * use.trace * float(use.inner.trace()) for use, _ in known)
    if total <= 0:
        return uses[-1].inner, uses[-1].outer
    inner = sum((use.rows * use.trace * use.inner for use, _ in known), torch.zeros_like(known[0][0].inner))
    outer = sum((use.rows * float(use.inner.trace()) * own for use, own in known), torch.zeros_like(known[0][1]))
    return inner / total, outer / rows
