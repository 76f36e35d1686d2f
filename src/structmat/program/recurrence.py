"""Values of polynomials by their recurrences: matrices whose columns follow from those before.

Forwards, ``O(t n)`` operations a point, and stable where the wanted solution is not dominated by others: for the
orthogonal polynomials on the interval of their weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def node_unit(kind: str) -> float:
    """Fixed nodes are kept as integers in this unit, so that they are exact, or nearly so for those that spread over
    the line, whatever the dtype of a layer."""
    return 2.0**-44 if kind in ("hermite", "laguerre") else 2.0**-61


def recurrence_values(scale: Tensor, nodes: Tensor, slopes: Tensor, steps: Tensor) -> Tensor:
    """``scale[i] * p_j(nodes[i])``, (points, n), with ``p_0 = 1`` and, for j from 0 to n - 2,
    ``p_(j+1)(x) = slopes[j] x p_j(x) + sum over k of steps[k, j] p_(j-k)(x)``.

    Args:
        scale, nodes: (points,).
        slopes: (n,), of which the last is not used.
        steps: (t, n), likewise; t is the recurrence width.
    """
    idle = slopes[-1] + steps[:, -1].sum()  # takes part, with a gradient of zero
    columns = [torch.ones_like(nodes) + 0.0 * (nodes + idle)]
    for j in range(slopes.shape[0] - 1):
        following = slopes[j] * nodes * columns[j]
        for k in range(min(steps.shape[0], j + 1)):
            following = following + steps[k, j] * columns[j - k]
        columns.append(following)
    # Where p_(j-k) would come before the first, the coefficient is not used either.
    return scale[:, None] * torch.stack(columns, 1)


def jacobi_coefficients(
    kind: str, count: int, alpha: float, beta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``a`` (count,) and ``b`` (count,) of the orthonormal recurrence
    ``b[j] p_j = (x - a[j - 1]) p_(j-1) - b[j - 1] p_(j-2)``, with ``b[0] = 0``, in float64.

    Source: Gautschi, Orthogonal Polynomials: Computation and Approximation, table 1.1.
    """
    j = torch.arange(count, dtype=torch.float64, device=device)
    zero = torch.zeros_like(j)
    if kind == "hermite":
        return zero, (j / 2).sqrt()
    if kind == "laguerre":
        return 2 * j + 1 + alpha, (j * (j + alpha)).sqrt()
    if kind == "chebyshev":
        alpha = beta = -0.5
    elif kind == "legendre":
        alpha = beta = 0.0
    total = alpha + beta
    # For j = 0 and 1 factors cancel that may be zero.
    later = torch.where(j > 0, (2 * j + total) * (2 * j + total + 2), torch.ones_like(j))
    a = torch.where(j > 0, (beta**2 - alpha**2) / later, zero + (beta - alpha) / (total + 2))
    from_two = torch.where(j > 1, (2 * j + total) ** 2 * ((2 * j + total) ** 2 - 1), torch.ones_like(j))
    squares = 4 * j * (j + alpha) * (j + beta) * (j + total) / from_two
    first = 4 * (1 + alpha) * (1 + beta) / ((2 + total) ** 2 * (3 + total))
    squares = torch.where(j > 1, squares, torch.where(j > 0, zero + first, zero))
    return a, squares.sqrt()


def orthonormal_values(
    left: Tensor, right: Tensor, nodes: Tensor, kind: str, size: int, alpha: float, beta: float
) -> Tensor:
    """``left[i] * P[i, j] * right[j]`` with the values ``P[i, j] = p_j(x_i) sqrt(weight_i)`` of the orthonormal
    polynomials: rows of the orthogonal matrix of ``size`` Gauss nodes.

    The recurrence runs in float64 with a scale for each row that is taken out at every step, since the values of
    Hermite and Laguerre polynomials leave the range of numbers; a row is brought to its length by the sum over all
    ``size`` columns.

    Args:
        left: (points,).
        right: (n,), n at most ``size``.
        nodes: (points,) integers, in units of :func:`node_unit`.
        kind: of the polynomials.
        size: of the whole matrix.
        alpha, beta: of Laguerre and Jacobi polynomials.
    """
    x = nodes.to(torch.float64) * node_unit(kind)
    a, b = jacobi_coefficients(kind, size, alpha, beta, x.device)
    last, current, exponent = torch.zeros_like(x), torch.ones_like(x), torch.zeros_like(x)
    columns, exponents = [current], [exponent]
    for j in range(1, size):
        following = ((x - a[j - 1]) * current - b[j - 1] * last) / b[j]
        size_now = torch.maximum(following.abs(), current.abs())
        size_now = torch.where(size_now > 0, size_now, torch.ones_like(x))
        last, current = current / size_now, following / size_now
        exponent = exponent + size_now.log()
        columns.append(current)
        exponents.append(exponent)
    powers = torch.stack(exponents, 1)
    values = torch.stack(columns, 1) * torch.exp(powers - powers.amax(1, keepdim=True))
    values = values / torch.linalg.vector_norm(values, dim=1, keepdim=True)
    wide = values[:, : right.shape[0]].to(torch.promote_types(left.dtype, torch.float32))
    matrix: Tensor = left[:, None] * wide * right
    return matrix
