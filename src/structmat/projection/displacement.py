"""Generators of a given matrix: the members of the displacement classes near it.

For fixed operators the displacement of the best rank is a truncated SVD. It gives back every member exactly, but
matters of size tail there may come back as large as ``tail / (2 sin(pi / 2 n))`` for the operators ``(Z_1, Z_-1)``: for
other matrices it is a start, which is scaled as fits best and then refined. What the start leaves bounds every member
from below, since the operators are orthogonal: ``||W - S|| >= tail / 2``.
Source: Pan, Structured Matrices and Polynomials (2001); Golub and Van Loan, section 12.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.program import Program
from structmat.projection.refine import refine, rescale
from structmat.projection.target import Certificate, Fit, Target


@dataclass(frozen=True)
class Generators:
    """``left`` (rank, period) and ``right`` (rank, period): the corner of ``sum of Z_1(left[i]) Z_-1(right[i])``.

    ``tail`` is the size of what was cut off of the displacement.
    """

    left: Tensor
    right: Tensor
    tail: float


def toeplitz_like_generators(matrix: Tensor, rank: int) -> Generators:
    """Generators of a corner (m, n) of a matrix whose displacement under ``(Z_1, Z_-1)`` has a rank.

    Of a rectangle, only the part of the displacement that lies inside is known. It has the rank, and gives one of the
    two generators; what is unknown of the other follows from the first row or the first column: every such member is
    given back, if it has full rank there.
    """
    m, n = matrix.shape
    size = max(m, n)
    if 1 in (m, n):  # nothing of the displacement is known: the identity times the row or the column
        left, right = matrix.new_zeros(rank, size), matrix.new_zeros(rank, size)
        (left if m == 1 else right)[0, 0] = 1.0
        if m == 1:
            right[0] = torch.cat([matrix[0, :1], -matrix[0, 1:].flip(0)])
        else:
            left[0] = matrix[:, 0]
        return Generators(left, right, 0.0)
    # Row i of Z_1 M is row i - 1; column j of M Z_-1 is column j + 1.
    above, beside = matrix.roll(1, 0), matrix.roll(-1, 1)
    beside = torch.cat([beside[:, :-1], -beside[:, -1:]], 1)
    known = (above - beside)[0 if m == size else 1 :, : n if n == size else n - 1]
    u, s, vh = _svd(known)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    g, h = matrix.new_zeros(rank, size), matrix.new_zeros(rank, size)
    first = 0 if m == size else 1
    g[:kept, first : first + known.shape[0]] = (u[:, :kept] * root).T
    h[:kept, : known.shape[1]] = root[:, None] * vh[:kept]
    left, right = g / 2, h.flip(1)  # Z_-1(J h)
    tail = float(torch.linalg.norm(s[rank:]))
    if m < n:
        missing = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(m, size)])
        _complete_left(left, right, missing, matrix[0])
    elif n < m:
        _complete_right(left, right, torch.arange(size - n + 1), matrix[:, 0])
    return Generators(left, right, tail)


def _complete_left(left: Tensor, right: Tensor, missing: Tensor, first_row: Tensor) -> None:
    """Fill in the missing places of the left vectors, so that the first row is right."""
    rank, size = left.shape
    # The first row is the sum over i and l of left[i, -l mod size] times row l of Z_-1(right[i]).
    l, j = torch.arange(size)[:, None], torch.arange(size)
    rows = right[:, (l - j) % size] * torch.where(l < j, -1.0, 1.0)
    rest = first_row - torch.einsum("il,ilj->j", left[:, (-torch.arange(size)) % size], rows)
    system = rows[:, (-missing) % size].reshape(-1, size).T
    left[:, missing] = _least_squares(system, rest).reshape(rank, -1)


def _complete_right(left: Tensor, right: Tensor, missing: Tensor, first_column: Tensor) -> None:
    """Fill in the missing places of the right vectors, so that the first column is right: Z_1(left) right, summed."""
    rank, size = left.shape
    j, l = torch.arange(size)[:, None], torch.arange(size)
    columns = left[:, (j - l) % size]
    rest = first_column - torch.einsum("ijl,il->j", columns, right)
    system = columns[:, :, missing].transpose(1, 2).reshape(-1, size).T
    right[:, missing] = _least_squares(system, rest).reshape(rank, -1)


def _least_squares(system: Tensor, wanted: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:, 0]
    return solution


def low_rank_factors(displacement: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``g`` (rank, m) and ``h`` (rank, n) with ``sum of g[i] h[i]^T`` nearest to a displacement, by truncated SVD."""
    u, s, vh = _svd(displacement)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    g, h = displacement.new_zeros(rank, displacement.shape[0]), displacement.new_zeros(rank, displacement.shape[1])
    g[:kept], h[:kept] = (u[:, :kept] * root).T, root[:, None] * vh[:kept]
    return g, h


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if 0 in matrix.shape:
        none = matrix.new_zeros(0, 0)
        return matrix.new_zeros(matrix.shape[0], 0), none.real.flatten(), matrix.new_zeros(0, matrix.shape[1])
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def finished(
    program: Program, tensors: Mapping[str, Tensor], name: str, target: Target, bound: float, method: str
) -> Fit:
    """A start scaled as fits best, refined by sweeps of alternating least squares over the tensors it is linear in.

    Args:
        program: of the target's native shape.
        tensors: the start.
        name: of the tensor that is scaled.
        target: what to approximate.
        bound: below which no member is in the Frobenius norm; not used in a weighted one.
        method: how the start was found.
    """
    scaled = rescale(program, tensors, name, target)
    found = refine(program, scaled, target, target.sweeps)
    plain = target.second_moment is None and target.output_moment is None
    certificate = Certificate.BOUND if plain and bound > 0 else Certificate.NONE
    method += ", alternating least squares" if target.sweeps else ""
    return Fit(found, certificate, bound if plain else 0.0, method)
