"""Orthogonal polynomials: nodes, recurrences, and fast transforms in the Chebyshev basis.

A sum ``f = sum of w[j] p_j`` of polynomials with a three-term recurrence is a product of 2 x 2 matrices of polynomials,
which a tree multiplies in ``O(n log^2 n)``. In which basis polynomials are held decides whether that is of any use:
with powers of x all digits are lost at n = 60, with Chebyshev coefficients and products by cosine transforms n = 4096
keeps seven. It is for polynomials on [-1, 1]; Hermite and Laguerre polynomials, and longer recurrences, have the
``O(n^2)`` recurrence alone. Source: De Sa, Gu, Puttagunta, Re and Rudra, "A two-pronged progress in structured dense
matrix vector multiplication" (SODA 2018); Driscoll, Healy and Rockmore (SIAM Journal on Computing 1997).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structmat.errors import DataError, ShapeError, StructureError
from structmat.program.recurrence import jacobi_coefficients
from structmat.sizes import power_of_two

KINDS = ("chebyshev", "hermite", "jacobi", "laguerre", "legendre")


@dataclass(frozen=True, eq=False)
class Recurrence:
    """``p_0 = 1`` and ``p_(j+1)(x) = (slopes[j] x + offsets[j]) p_j(x) + backs[j] p_(j-1)(x)``.

    Args:
        slopes, offsets, backs: (n,) in float64; ``backs[0]`` and the last of each are not used.
    """

    slopes: Tensor
    offsets: Tensor
    backs: Tensor

    @property
    def count(self) -> int:
        """n: how many polynomials are meant."""
        return len(self.slopes)


def check_kind(kind: str, alpha: float, beta: float) -> None:
    """Raise unless there are such polynomials.

    Raises:
        StructureError: the kind is unknown, or a parameter is -1 or less.
    """
    if kind not in KINDS:
        raise StructureError(f"There are no {kind!r} polynomials here. Known are {', '.join(KINDS)}.")
    if not (alpha > -1 and beta > -1):
        raise StructureError(f"The parameters alpha={alpha} and beta={beta} of {kind} polynomials are above -1.")


def recurrence(kind: str, count: int, *, alpha: float = 0.0, beta: float = 0.0) -> Recurrence:
    """The recurrence of classical polynomials in their usual normalisation (that of ``scipy.special``).

    Args:
        kind: ``"chebyshev"`` (first kind), ``"legendre"``, ``"jacobi"``, ``"hermite"`` (weight ``exp(-x^2)``) or
            ``"laguerre"``.
        count: how many polynomials.
        alpha, beta: of Jacobi polynomials; alpha of generalised Laguerre ones.

    Raises:
        StructureError: the kind is unknown, or a parameter is -1 or less.
    """
    check_kind(kind, alpha, beta)
    j = torch.arange(count, dtype=torch.float64)
    zero, one = torch.zeros_like(j), torch.ones_like(j)
    if kind == "hermite":
        return Recurrence(2 * one, zero, -2 * j)
    if kind == "laguerre":
        return Recurrence(-1 / (j + 1), (2 * j + 1 + alpha) / (j + 1), -(j + alpha) / (j + 1))
    if kind == "chebyshev":
        return Recurrence(torch.where(j == 0, one, 2 * one), zero, -one)
    if kind == "legendre":
        return Recurrence((2 * j + 1) / (j + 1), zero, -j / (j + 1))
    total = alpha + beta
    safe = torch.where(j == 0, one, j)
    common = 2 * (safe + 1) * (safe + total + 1) * (2 * safe + total)
    slopes = (2 * safe + total + 1) * (2 * safe + total + 2) * (2 * safe + total) / common
    offsets = (2 * safe + total + 1) * (alpha**2 - beta**2) / common
    backs = -2 * (safe + alpha) * (safe + beta) * (2 * safe + total + 2) / common
    slopes[:1], offsets[:1], backs[:1] = (total + 2) / 2, (alpha - beta) / 2, 0.0
    return Recurrence(slopes, offsets, backs)


def gauss_nodes(kind: str, count: int, *, alpha: float = 0.0, beta: float = 0.0) -> Tensor:
    """The ``count`` zeros of the polynomial of that degree, ascending, in float64: eigenvalues of a tridiagonal matrix.

    Raises:
        StructureError: the kind is unknown, or a parameter is -1 or less.

    Source: Golub and Welsch, Mathematics of Computation 1969.
    """
    check_kind(kind, alpha, beta)
    if kind == "chebyshev":
        return torch.cos((2 * torch.arange(count, dtype=torch.float64).flip(0) + 1) * (math.pi / (2 * count)))
    from scipy.linalg import eigvalsh_tridiagonal

    a, b = jacobi_coefficients(kind, count, alpha, beta, torch.device("cpu"))
    return torch.from_numpy(np.ascontiguousarray(eigvalsh_tridiagonal(a.numpy(), b.numpy()[1:])))


# ------------------------------------------------------------------------------------------------ products in O(n^2)


def clenshaw(given: Recurrence, weights: Tensor, x: Tensor) -> Tensor:
    """``sum over j of weights[..., j] p_j(x[i])``, (..., points), by Clenshaw's algorithm: ``O(n)`` a point.

    Args:
        given: the recurrence.
        weights: (..., n).
        x: (points,).
    """
    after, later = torch.zeros_like(weights[..., :1] * x), torch.zeros_like(weights[..., :1] * x)
    for j in range(given.count - 1, -1, -1):
        back = given.backs[j + 1] if j + 1 < given.count else 0.0
        after, later = weights[..., j, None] + (given.slopes[j] * x + given.offsets[j]) * after + back * later, after
    return after


# ------------------------------------------------------------------------------------------- products in O(n log^2 n)


def synthesis(given: Recurrence, weights: Tensor) -> Tensor:
    """Chebyshev coefficients (..., n) of ``sum over j of weights[..., j] p_j``, in ``O(n log^2 n)``.

    A balanced tree: a block of neighbors gives ``s1 p_first + s2 p_(first-1)`` with polynomials s1 and s2, and two
    blocks are joined by the product of the second's with the transition matrix of the first. All polynomials are held
    by Chebyshev coefficients and multiplied at Chebyshev points, by cosine transforms.

    Args:
        given: of polynomials that are bounded on [-1, 1], such as all Jacobi polynomials.
        weights: (..., n), float64.

    Raises:
        ShapeError: there are not as many weights as polynomials.
        DataError: they are complex.
    """
    count = given.count
    if weights.is_complex():
        raise DataError("Weights of polynomials are real here. Give the real and the imaginary parts one by one.")
    if weights.shape[-1] != count:
        raise ShapeError(f"{count} polynomials take {count} weights; got {weights.shape[-1]}.")
    size = power_of_two(count)
    missing = size - count
    pad = torch.nn.functional.pad
    slopes, offsets, backs = (
        pad(given.slopes, (0, missing)),
        pad(given.offsets, (0, missing)),
        pad(given.backs, (0, missing)),
    )
    batch = weights.shape[:-1]
    # (batch, blocks, 2, coefficients) and (blocks, 2, 2, coefficients)
    sums = pad(pad(weights, (0, missing)).reshape(-1, size, 1, 1), (0, 0, 0, 1))
    transitions = torch.zeros(size, 2, 2, 2, dtype=torch.float64)
    transitions[:, 0, 0, 0], transitions[:, 0, 0, 1] = offsets, slopes
    transitions[:, 0, 1, 0], transitions[:, 1, 0, 0] = backs, 1.0
    length = 1
    while length < size:
        points = 4 * length  # more than the degree of every product
        first, second = sums[:, 0::2], sums[:, 1::2]
        step = cosine_values(transitions, points)
        moved = torch.einsum("zkap,kabp->zkbp", cosine_values(second, points), step[0::2])
        sums = pad(first, (0, length)) + cosine_coefficients(moved)[..., : 2 * length]
        joined = torch.einsum("kacp,kcbp->kabp", step[1::2], step[0::2])
        transitions = cosine_coefficients(joined)[..., : 2 * length + 1]
        length *= 2
    return sums[:, 0, 0, :count].reshape(*batch, count)


def analysis(given: Recurrence, coefficients: Tensor) -> Tensor:
    """The adjoint of :func:`synthesis`, exactly: the same tree run backwards (the transposition principle).

    Args:
        given: the recurrence.
        coefficients: (..., n), float64.

    Raises:
        ShapeError: there are not as many coefficients as polynomials.
        DataError: they are complex.
    """
    shape = coefficients.shape
    rows = coefficients.reshape(-1, shape[-1])
    start = torch.zeros_like(rows)
    result: Tensor = torch.func.vjp(lambda w: synthesis(given, w), start)[1](rows)[0]
    return result.reshape(shape)


def cosine_values(coefficients: Tensor, points: int) -> Tensor:
    """Values (..., points) at ``cos(pi (k + 1/2) / points)`` of Chebyshev series (..., m), m at most ``points``."""
    turned = coefficients * _turns(coefficients.shape[-1], points)
    values: Tensor = torch.fft.ifft(turned, 2 * points)[..., :points].real * (2 * points)
    return values


def cosine_coefficients(values: Tensor) -> Tensor:
    """Chebyshev coefficients (..., points) of the polynomial with these values: undoes :func:`cosine_values`."""
    points = values.shape[-1]
    transformed = torch.fft.fft(values, 2 * points)[..., :points]
    found: Tensor = (transformed * _turns(points, points).conj()).real * (2.0 / points)
    return torch.cat([found[..., :1] / 2, found[..., 1:]], -1)


def _turns(count: int, points: int) -> Tensor:
    """``exp(i pi j / (2 points))``."""
    angle = torch.arange(count, dtype=torch.float64) * (math.pi / (2 * points))
    return torch.polar(torch.ones_like(angle), angle)
