"""Displacement structure: operators, ranks, generators, and solving by elimination on generators.

A matrix M has small displacement rank where ``A M - M B`` (Sylvester), or ``M - A M B`` (Stein), has small rank for
some fixed simple matrices A and B: then it is known by the factors ``G H^T`` of that displacement, its generators.
"""

from structmat.displacement.form import CauchyForm, Side
from structmat.displacement.operators import (
    Operators,
    cauchy,
    displacement_rank,
    hankel,
    path,
    shift,
    toeplitz,
    toeplitz_plus_hankel,
    vandermonde,
)
from structmat.displacement.solve import Solution, solve

__all__ = [
    "CauchyForm",
    "Operators",
    "Side",
    "Solution",
    "cauchy",
    "displacement_rank",
    "hankel",
    "path",
    "shift",
    "solve",
    "toeplitz",
    "toeplitz_plus_hankel",
    "vandermonde",
]
