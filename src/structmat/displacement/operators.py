"""Displacement operators and the rank that a matrix has under them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.errors import DataError, ShapeError
from structmat.structure import Shape, check_shape


@dataclass(frozen=True, eq=False)
class Operators:
    """A pair of matrices: the displacement of M is ``A M - M B`` (Sylvester), or ``M - A M B`` (Stein).

    Args:
        left: A, (out, out).
        right: B, (in, in).
        stein: which of the two forms is meant.
    """

    left: Tensor
    right: Tensor
    stein: bool = False

    def displace(self, matrix: Tensor) -> Tensor:
        """The displacement of a matrix (out, in), in float64 or complex128.

        Raises:
            ShapeError: the matrix does not fit the operators.
            DataError: it has entries that are NaN or infinite.
        """
        shape = (self.left.shape[0], self.right.shape[0])
        if tuple(matrix.shape) != shape:
            raise ShapeError(f"These operators displace matrices of shape {shape}; got {tuple(matrix.shape)}.")
        if not bool(torch.isfinite(matrix).all()):
            raise DataError(f"The matrix of shape {shape} has entries that are NaN or infinite.")
        given = (matrix, self.left, self.right)
        dtype = torch.complex128 if any(t.is_complex() for t in given) else torch.float64
        wide, left, right = (t.detach().to(device="cpu", dtype=dtype) for t in given)
        return wide - left @ wide @ right if self.stein else left @ wide - wide @ right


def shift(size: int, twist: float = 0.0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """``Z_f`` (size, size): ones below the diagonal and f in the upper right corner, so that ``(Z_f x)[i] = x[i - 1]``
    and ``(Z_f x)[0] = f x[-1]``."""
    check_shape((size, size))
    matrix = torch.zeros(size, size, dtype=dtype)
    matrix.diagonal(-1).fill_(1.0)
    matrix[0, size - 1] += twist
    return matrix


def path(size: int, corner: float = 0.0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """``Z_0 + Z_0^T`` (size, size), with ``corner`` added at both ends of the diagonal."""
    matrix = shift(size, dtype=dtype)
    matrix = matrix + matrix.T
    matrix[0, 0] += corner
    matrix[-1, -1] += corner
    return matrix


def toeplitz(shape: Shape) -> Operators:
    """``(Z_1, Z_-1)``: Toeplitz matrices and their inverses have rank at most 2, products of two at most 4."""
    rows, columns = check_shape(shape)
    return Operators(shift(rows, 1.0), shift(columns, -1.0))


def hankel(shape: Shape) -> Operators:
    """``(Z_1^T, Z_-1)``: Hankel matrices have rank at most 2."""
    rows, columns = check_shape(shape)
    return Operators(shift(rows, 1.0).T, shift(columns, -1.0))


def toeplitz_plus_hankel(shape: Shape) -> Operators:
    """``(Y_00, Y_11)``, both tridiagonal: sums of a Toeplitz and a Hankel matrix have rank at most 4.

    Source: Golub and Van Loan, Matrix Computations, section 12.1; Heinig and Rost.
    """
    rows, columns = check_shape(shape)
    return Operators(path(rows), path(columns, 1.0))


def vandermonde(nodes: Tensor, columns: int, twist: float = 0.0) -> Operators:
    """``(diag(nodes), Z_f)``: the Vandermonde matrix ``nodes[i]**j`` has rank at most 1.

    Args:
        nodes: (out,), one a row.
        columns: number of columns.
        twist: f.
    """
    return Operators(torch.diag(nodes), shift(columns, twist, dtype=_wide(nodes)))


def cauchy(rows: Tensor, columns: Tensor) -> Operators:
    """``(diag(s), diag(t))``: the Cauchy matrix ``1 / (s[i] - t[j])`` has rank 1.

    Args:
        rows: s, (out,).
        columns: t, (in,).
    """
    return Operators(torch.diag(rows), torch.diag(columns))


def displacement_rank(matrix: Tensor, operators: Operators | None = None, *, tolerance: float | None = None) -> int:
    """The rank of a matrix's displacement.

    Args:
        matrix: (out, in), real or complex.
        operators: A and B, by default those of Toeplitz matrices; see :mod:`structmat.displacement` for others.
        tolerance: singular values of the displacement up to this share of the matrix's Frobenius norm are rounding; by
            default the precision of the matrix's dtype to the power 2/3 (4e-11 in float64).

    Raises:
        ShapeError: the matrix does not fit the operators.
        DataError: it has entries that are NaN or infinite.

    Cost: two products with the operators and a singular value decomposition.
    Source: Kailath, Kung and Morf 1979; Golub and Van Loan, section 12.1.
    """
    if matrix.dim() != 2:
        raise ShapeError(f"A matrix has two axes (out_features, in_features); got shape {tuple(matrix.shape)}.")
    if operators is None:
        operators = toeplitz((matrix.shape[0], matrix.shape[1]))
    if tolerance is None:
        dtype = matrix.dtype if matrix.is_floating_point() or matrix.is_complex() else torch.float64
        tolerance = torch.finfo(dtype).eps ** (2 / 3)
    values = torch.linalg.svdvals(operators.displace(matrix))
    size = float(torch.linalg.norm(matrix.detach().to(torch.complex128)))
    return int((values > tolerance * size).sum())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
