"""All nearest sums of Kronecker products of one shape from one singular value decomposition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.errors import ShapeError
from structmat.matrix import StructuredMatrix
from structmat.projection.kronecker import Pairs, factor_pairs, padded_factors, rearrange
from structmat.projection.target import Certificate
from structmat.structure import Shape
from structmat.structures.kronecker import Kronecker, factor_matrices


@dataclass(frozen=True)
class KroneckerSpectrum:
    """The singular values and vectors of a rearranged matrix: each number of terms is a truncation.

    The terms of the best sum of k products are the first k of the best sum of more, and orthogonal to each other.

    Args:
        shape: (out_features, in_features) of the matrix.
        pairs: sizes (m_i, n_i) of the two factors.
        values: all singular values, descending.
        left, right: singular vectors (values, m n) and (values, q p), as flattened factors.
        dtype: of the matrix.
    """

    shape: Shape
    pairs: Pairs
    values: Tensor
    left: Tensor
    right: Tensor
    dtype: torch.dtype

    @property
    def most(self) -> int:
        """Terms with which the matrix is reached exactly."""
        return len(self.values)

    @property
    def certificate(self) -> Certificate:
        """Optimal (Eckart and Young; Van Loan and Pitsianis 1993), unless rows or columns were filled with zeros."""
        native = (math.prod(m for m, _ in self.pairs), math.prod(n for _, n in self.pairs))
        return Certificate.OPTIMAL if native == self.shape else Certificate.NONE

    def errors(self) -> Tensor:
        """``||W - S_k||_F / ||W||_F`` for k = 0, 1, ..., ``most``; of a padded matrix an upper bound."""
        squares = self.values.square()
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return (tails / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)).sqrt()

    def terms_within(self, error: float) -> int:
        """The fewest terms whose relative error is at most that."""
        return int((self.errors() > error).sum())

    def parameters(self, terms: int) -> int:
        """Numbers in so many terms."""
        return terms * sum(m * n for m, n in self.pairs)

    def matrix(self, terms: int) -> StructuredMatrix:
        """The nearest sum of so many terms, its factors balanced.

        Raises:
            ShapeError: there are not so many terms.
        """
        if not 1 <= terms <= self.most:
            raise ShapeError(f"A sum of products of sizes {self.pairs} has 1 to {self.most} terms; got {terms}.")
        family = Kronecker(terms, self.pairs)
        made = StructuredMatrix.random(family, self.shape, dtype=self.dtype)
        root = self.values[:terms].sqrt()[:, None]
        for own, flat in zip(factor_matrices(family, made.tensors), (self.left, self.right), strict=True):
            own.copy_((root * flat[:terms]).reshape(own.shape))
        return made


def kronecker_spectrum(matrix: Tensor, pairs: Pairs) -> KroneckerSpectrum:
    """The best sums of Kronecker products of two factors of given sizes, for every number of terms at once.

    Cost: one SVD of an (m n) x (q p) matrix, in float64.

    Args:
        matrix: (out_features, in_features).
        pairs: ``((m, n), (q, p))``, the sizes of the factors; they may multiply to more than the matrix has.

    Raises:
        ShapeError: they multiply to less.
    """
    wide = torch.complex128 if matrix.is_complex() else torch.float64
    native = (math.prod(m for m, _ in pairs), math.prod(n for _, n in pairs))
    rows, columns = matrix.shape
    if len(pairs) != 2 or native[0] < rows or native[1] < columns:
        raise ShapeError(
            f"A spectrum needs two factors that multiply to at least {rows} x {columns}; got {pairs}. For more factors "
            "use project."
        )
    whole = torch.nn.functional.pad(matrix.detach().to("cpu", wide), (0, native[1] - columns, 0, native[0] - rows))
    u, s, vh = torch.linalg.svd(rearrange(whole, pairs), full_matrices=False)
    return KroneckerSpectrum((rows, columns), pairs, s, u.T.contiguous(), vh, matrix.dtype)


@dataclass(frozen=True)
class RankedShape:
    """Sizes of factors, with the most terms that fit a budget and their error."""

    structure: Kronecker
    parameters: int
    error: float


def rank_shapes(matrix: Tensor, *, parameters: int) -> list[RankedShape]:
    """All sizes of two factors for a matrix, the nearest sum within a budget first; one SVD for each.

    Shapes with a factor of one row and one column are the matrix itself times a number, and left out; the low-rank
    corner (M, 1) x (1, N) is among the others.

    Args:
        matrix: (out_features, in_features).
        parameters: that a sum may have.
    """
    rows, columns = matrix.shape
    found = []
    for m, q in factor_pairs(math.prod(padded_factors(rows, 2))):
        for n, p in factor_pairs(math.prod(padded_factors(columns, 2))):
            each = m * n + q * p
            if m * n == 1 or q * p == 1 or each > parameters:
                continue
            spectrum = kronecker_spectrum(matrix, ((m, n), (q, p)))
            terms = min(spectrum.most, parameters // each)
            error = float(spectrum.errors()[terms])
            found.append(RankedShape(Kronecker(terms, spectrum.pairs), terms * each, error))
    return sorted(found, key=lambda f: f.error)
