"""Solving systems with displacement structure: Gaussian elimination with partial pivoting on generators.

A Cauchy-like matrix, ``diag(s) M - M diag(t) = G H^T``, has the entries ``(G[i] . H[j]) / (s[i] - t[j])``, and so has
every Schur complement of it, with generators that follow from those before by a rank-one update each. So an elimination
with row pivoting takes ``O(n^2 r)`` operations, and is as stable as that of the dense matrix unless the generators grow
(which is measured). Toeplitz-, Hankel- and Vandermonde-like matrices are turned into Cauchy-like ones by Fourier
transforms, which lose nothing.
Source: Gohberg, Kailath and Olshevsky, Mathematics of Computation 1995; Golub and Van Loan, section 12.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.displacement.form import CauchyForm, Side
from structmat.errors import DataError, ShapeError, StructureError
from structmat.matrix import StructuredMatrix

_UNSOLVED = 0.01
"""With a larger residual nothing was solved: x would be noise along a null vector."""


@dataclass(frozen=True)
class Solution:
    """What :func:`solve` found.

    Args:
        x: with ``S x = b``.
        method: how it was found.
        growth: the largest generator that came up in the elimination, by the largest at its start; large numbers mean
            that digits were lost. 1 where there was no such elimination.
        residual: ``||S x - b|| / ||b||``, computed with the matrix itself.
    """

    x: Tensor
    method: str
    growth: float
    residual: float


def solve(matrix: StructuredMatrix, b: Tensor) -> Solution:
    """Solve ``S x = b``.

    Circulant matrices by dividing Fourier transforms, ``O(n log n)``; other matrices whose family knows its generators
    by elimination on these, ``O(n^2)``, in complex128; all others by LU factors of the dense matrix, ``O(n^3)``. One
    step of iterative refinement follows where it lowers the residual. No gradients flow through it.

    Args:
        matrix: square and not singular.
        b: (n,) or (n, k).

    Raises:
        ShapeError: the matrix is not square, or ``b`` does not fit it.
        DataError: the matrix is singular to working precision: a pivot is zero, or what was found leaves more than a
            hundredth of ``b``.
    """
    size = matrix.shape[0]
    if matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"A matrix of shape {matrix.shape} can't be solved with: it is not square. Use least squares.")
    if b.dim() not in (1, 2) or b.shape[0] != size:
        raise ShapeError(f"The right hand side of a system of size {size} has shape ({size},) or ({size}, k).")
    is_complex = matrix.dtype.is_complex or b.is_complex()
    dtype = torch.promote_types(matrix.dtype, b.dtype)
    if not bool(torch.isfinite(b).all()):
        raise DataError(f"The right hand side of shape {tuple(b.shape)} has entries that are NaN or infinite.")
    wide = torch.complex128 if is_complex else torch.float64
    with torch.no_grad():
        exact = matrix.to(dtype=torch.complex128 if matrix.dtype.is_complex else torch.float64)
        solver = _solver(exact)
        wanted = b.detach().to(wide).reshape(size, b[0].numel())
        if wanted.numel() == 0:
            return Solution(b.detach().to(dtype), solver.method, solver.growth, 0.0)
        x = solver.solve(wanted)
        x = x if is_complex else x.real
        best, rest = x, wanted - _product(exact, x)
        correction = solver.solve(rest)
        other = x + (correction if is_complex else correction.real)
        other_rest = wanted - _product(exact, other)
        if float(torch.linalg.norm(other_rest)) < float(torch.linalg.norm(rest)):
            best, rest = other, other_rest
        if not bool(torch.isfinite(best).all()):
            raise DataError(f"The matrix {matrix.structure} of size {size} is singular to working precision.")
        size_b = float(torch.linalg.norm(wanted))
        residual = float(torch.linalg.norm(rest)) / size_b if size_b > 0 else 0.0
        if residual > _UNSOLVED:
            raise DataError(
                f"The matrix {matrix.structure} of size {size} is singular to working precision: what was found leaves "
                f"{residual:.2g} of the right hand side. Use least squares."
            )
    return Solution(best.reshape(b.shape).to(dtype), solver.method, solver.growth, residual)


def _product(matrix: StructuredMatrix, x: Tensor) -> Tensor:
    if x.is_complex() and not matrix.dtype.is_complex:
        return torch.complex(matrix @ x.real.contiguous(), matrix @ x.imag.contiguous())
    return matrix @ x


class _Dense:
    method, growth = "LU factors of the dense matrix", 1.0

    def __init__(self, matrix: Tensor) -> None:
        self.factors, self.pivots, info = torch.linalg.lu_factor_ex(matrix)
        if int(info) > 0:
            raise DataError(f"The matrix of size {len(matrix)} is singular: pivot {int(info)} of its LU factors is 0.")

    def solve(self, b: Tensor) -> Tensor:
        wide = torch.promote_types(b.dtype, self.factors.dtype)
        x: Tensor = torch.linalg.lu_solve(self.factors.to(wide), self.pivots, b.to(wide))
        return x


class _Circulant:
    method, growth = "division of Fourier transforms", 1.0

    def __init__(self, column: Tensor) -> None:
        self.spectrum = torch.fft.fft(column.to(torch.complex128))
        if float(self.spectrum.abs().min()) <= torch.finfo(torch.float64).eps * float(self.spectrum.abs().max()):
            raise DataError(f"The circulant matrix of size {len(column)} is singular: its spectrum has a zero.")

    def solve(self, b: Tensor) -> Tensor:
        x: Tensor = torch.fft.ifft(torch.fft.fft(b.to(torch.complex128), dim=0) / self.spectrum[:, None], dim=0)
        return x


class _Cauchy:
    """LU factors with row pivoting of the Cauchy-like form, computed from generators."""

    method = "Gaussian elimination with partial pivoting on generators (GKO)"

    def __init__(self, form: CauchyForm, transposed: bool) -> None:
        self.form, self.transposed = form, transposed
        left, right = form.left_generator.to(torch.complex128), form.right_generator.to(torch.complex128)
        size = left.shape[0]
        s, t = _nodes(form.left, form.rows, size), _nodes(form.right, form.columns, size)
        left, right = self._left(left), self._right_transposed_inverse(right)
        self.lower, self.upper, self.order, self.growth = _eliminate(s, t, left, right)

    def solve(self, b: Tensor) -> Tensor:
        wanted = b.to(torch.complex128)
        if self.transposed:
            # M^T x = b: with M = J L^-1 C R^-1 the factors are taken in the other order.
            y = self._right_transposed(wanted)
            y = torch.linalg.solve_triangular(self.upper.T, y, upper=False)
            y = torch.linalg.solve_triangular(self.lower.T, y, upper=True, unitriangular=True)
            z = torch.empty_like(y)
            z[self.order] = y
            z = self._left_transposed(z)
            return z.flip(0) if self.form.reversed_rows else z
        wanted = wanted.flip(0) if self.form.reversed_rows else wanted
        y = torch.linalg.solve_triangular(self.lower, self._left(wanted)[self.order], upper=False, unitriangular=True)
        return self._right(torch.linalg.solve_triangular(self.upper, y, upper=True))

    # The Cauchy-like matrix is C = L M R with L the transform of the left side and R that of the right.

    def _left(self, x: Tensor) -> Tensor:
        if self.form.left is Side.PLAIN:
            return x
        transformed: Tensor = torch.fft.fft(x, dim=0, norm="ortho")
        return transformed

    def _left_transposed(self, x: Tensor) -> Tensor:
        return self._left(x)  # a symmetric matrix

    def _right(self, x: Tensor) -> Tensor:
        if self.form.right is Side.PLAIN:
            return x
        return _signs(len(x)) * _inverse_transform(x)

    def _right_transposed(self, x: Tensor) -> Tensor:
        if self.form.right is Side.PLAIN:
            return x
        return _inverse_transform(_signs(len(x)) * x)

    def _right_transposed_inverse(self, x: Tensor) -> Tensor:
        """Of the generator: ``L G (H^T R) = (L G) (R^T H)^T``."""
        return self._right_transposed(x)


def _inverse_transform(x: Tensor) -> Tensor:
    transformed: Tensor = torch.fft.ifft(x, dim=0, norm="ortho")
    return transformed


def _nodes(side: Side, given: Tensor | None, size: int) -> Tensor:
    if side is Side.PLAIN:
        assert given is not None
        return given.to(torch.complex128)
    half = 0.0 if side is Side.SHIFT else 0.5
    angle = -2 * torch.pi * (torch.arange(size, dtype=torch.float64) + half) / size
    return torch.polar(torch.ones_like(angle), angle)


def _signs(size: int) -> Tensor:
    """``exp(i pi j / size)``, (size, 1): Z_-1 is Z_1 between these, but for a factor."""
    angle = torch.pi * torch.arange(size, dtype=torch.float64) / size
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def _eliminate(s: Tensor, t: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """``C[order] = lower @ upper`` for ``C[i, j] = left[i] . right[j] / (s[i] - t[j])``."""
    size = len(s)
    # Balanced and orthogonal generators lose least.
    q, triangle = torch.linalg.qr(left)
    left, right = q, right @ triangle.mT
    start = float(left.abs().max()) * float(right.abs().max())
    s, left, right, order = s.clone(), left.clone(), right.clone(), torch.arange(size)
    lower, upper = torch.eye(size, dtype=s.dtype), torch.zeros(size, size, dtype=s.dtype)
    growth = 1.0
    for k in range(size):
        column = (left[k:] @ right[k]) / (s[k:] - t[k])
        pivot = k + int(column.abs().argmax())
        if pivot != k:
            column[[0, pivot - k]] = column[[pivot - k, 0]]
            for rows in (s, left, order):
                rows[[k, pivot]] = rows[[pivot, k]]
            lower[[k, pivot], :k] = lower[[pivot, k], :k]
        row = (right[k:] @ left[k]) / (s[k] - t[k:])
        if not float(column[0].abs()) > 0:
            raise DataError(f"The matrix of size {size} is singular: pivot {k} of its elimination is 0.")
        upper[k, k:] = row
        lower[k + 1 :, k] = column[1:] / column[0]
        left[k + 1 :] -= lower[k + 1 :, k, None] * left[k]
        right[k + 1 :] -= (row[1:] / row[0])[:, None] * right[k]
        if k + 1 < size and start > 0:
            growth = max(growth, float(left[k + 1 :].abs().max()) * float(right[k + 1 :].abs().max()) / start)
    return lower, upper, order, growth


def _solver(matrix: StructuredMatrix) -> _Dense | _Circulant | _Cauchy:
    structure, transposed = matrix.structure, matrix.is_transposed
    found = structure.inversion(matrix.T if transposed else matrix)
    if found is None:
        return _Dense(matrix.to_dense())
    if isinstance(found, CauchyForm):
        return _Cauchy(found, transposed)
    if found.dim() != 1:
        raise StructureError(f"{structure} says that it is a circulant matrix with {found.dim()} axes.")
    return _Circulant(_reversed(found) if transposed else found)


def _reversed(column: Tensor) -> Tensor:
    return column.flip(0).roll(1)
