"""Functions that write out matrices with displacement structure: what ``Generated`` stages are made with.

Each takes tensors and plain numbers and gives a matrix, differentiable any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.program.combinators import Chain, Program
from structmat.program.stages import Diagonal
from structmat.program.toeplitz import convolution

# ------------------------------------------------------------------------------------------------------------- Cauchy


def cauchy(scale: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``scale / (s[i] - t[j])`` with ``s[i] = i + rows[i]`` and ``t[j] = j + columns[j]``."""
    return scale * cauchy_kernel(rows, columns)


def cauchy_like(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``(left[:, i] . right[:, j]) / (s[i] - t[j])``."""
    return (left.T @ right) * cauchy_kernel(rows, columns)


def cauchy_kernel(rows: Tensor, columns: Tensor) -> Tensor:
    """``1 / (s[i] - t[j])``. Differences of places are exact, so that nodes may be told apart by their offsets in any
    precision."""
    i = torch.arange(rows.shape[0], device=rows.device)[:, None]
    j = torch.arange(columns.shape[0], device=columns.device)
    return 1.0 / ((i - j) + (rows[:, None] - columns))


# -------------------------------------------------------------------------------------------------------- Vandermonde


def vandermonde(scale: Tensor, nodes: Tensor, width: int) -> Tensor:
    """``scale[i] * nodes[i]**j``, (nodes, width)."""
    return scale[:, None] * powers(nodes, width)


def vandermonde_krylov(nodes: Tensor, left: Tensor, width: int) -> Tensor:
    """Krylov matrices of ``diag(nodes)`` side by side: ``left[k, i] * nodes[i]**j`` in column ``k * width + j``."""
    blocks = left.T[:, :, None] * powers(nodes, width)[:, None, :]
    return blocks.reshape(nodes.shape[0], left.shape[0] * width)


def powers(nodes: Tensor, width: int) -> Tensor:
    """``nodes[i]**j``, (nodes, width), by doubling: differentiable any number of times, at 0 too."""
    columns, power = (1.0 + 0.0 * nodes)[:, None], nodes  # so that a single column has a gradient, of zeros
    while (known := columns.shape[1]) < width:
        columns = torch.cat([columns, power[:, None] * columns[:, : width - known]], 1)
        power = power * power
    return columns


# ------------------------------------------------------------------------------------------------------------- Krylov


def subdiagonal_krylov(operator: Tensor, vectors: Tensor, count: int) -> Tensor:
    """Krylov matrices ``[v, A v, .., A^(count - 1) v]`` of several vectors side by side, (n, rank * count).

    A has ``operator[:-1]`` below its diagonal and ``operator[-1]`` in the upper right corner, so that
    ``(A^j v)[i] = v[i - j] * operator[i - 1] * .. * operator[i - j]``, places taken modulo n: products of neighbors,
    never divided. By doubling: a power of A is such a product, too.

    Args:
        operator: (n,).
        vectors: (rank, n).
        count: columns for each vector, at most n.
    """
    # (A^k v)[i] = reach[i] v[i - k], with k columns known. A single column has a gradient in the operator, of zeros.
    columns, reach = (vectors + 0.0 * operator)[:, :, None], operator.roll(1)
    while (known := columns.shape[2]) < count:
        columns = torch.cat([columns, reach[:, None] * columns[:, :, : count - known].roll(known, 1)], 2)
        reach = reach * reach.roll(known)
    return columns.transpose(0, 1).reshape(vectors.shape[1], vectors.shape[0] * count)


_MOST_SPREAD = {torch.float32: 1e5, torch.float64: 1e12, torch.complex64: 1e5, torch.complex128: 1e12}
"""The largest ratio of entries of the scaling D with which the transforms leave enough digits."""


def subdiagonal_by_transforms(
    operator: Tensor, vectors: Tensor, count: int
) -> tuple[Program, dict[str, Tensor]] | None:
    """The same by Fourier transforms, where that is stable: ``A = D Z_f D^-1`` with the running products of the
    operator in D, hence ``K(A, v) = D Z_f(v / D)``. None if the entries of D differ too much, or the precision is low.
    """
    size = operator.shape[0]
    running = torch.cumprod(operator[:-1].to(_wide(operator)), 0)
    scaling = torch.cat([torch.ones_like(running[:1]) if size > 1 else running.new_ones(1), running])
    moduli = scaling.abs()
    smallest, largest = float(moduli.min()), float(moduli.max())
    limit = _MOST_SPREAD.get(operator.dtype, 0.0)
    if not (smallest > 0 and largest < limit * smallest):
        return None
    twist = operator[-1] * scaling[-1]
    if twist.is_complex():
        return None
    stage = convolution("v", 1, vectors.shape[0], size, count, twist=float(twist), period=size)
    if not stage.transform:
        return None
    tensors = {"v": (vectors / scaling).to(operator.dtype), "d": scaling.to(operator.dtype)}
    return Chain((stage, Diagonal("d", size))), tensors


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def tridiagonal_krylov(operator: Tensor, vectors: Tensor, count: int) -> Tensor:
    """The same for a tridiagonal A with corners, by one product with A after the other.

    Args:
        operator: (3, n): below the diagonal with the upper right corner at the end, the diagonal, above it with the
            lower left corner at the end.
        vectors: (rank, n).
        count: columns for each vector.
    """
    below, diagonal, above = operator[0].roll(1), operator[1], operator[2]
    columns = [vectors + 0.0 * diagonal]  # so that a single column has a gradient in the operator, of zeros
    for _ in range(count - 1):
        last = columns[-1]
        columns.append(below * last.roll(1, 1) + diagonal * last + above * last.roll(-1, 1))
    stacked = torch.stack(columns, -1)  # (rank, n, count)
    return stacked.transpose(0, 1).reshape(vectors.shape[1], vectors.shape[0] * count)
