"""GBLR: generalized block-low-rank matrices, sums of windowed rank-one terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.errors import ShapeError, StructureError
from structmat.program import Program, Windowed
from structmat.projection.found_windows import windows_of
from structmat.projection.target import Certificate, Fit, Target
from structmat.projection.windows import low_rank_terms, pack, settle, windowed
from structmat.structure import (
    DENSE_GAIN,
    Normal,
    ParameterSpec,
    Shape,
    Structure,
    check_count,
    check_size,
    largest_fitting,
    whole,
)


@dataclass(frozen=True)
class _EvenWindows:
    """Windows of even widths that begin at even distances, the columns' in random order."""

    height: int
    width: int
    rows: int
    columns: int

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        terms = shape[0]
        windows = torch.zeros(terms, 4, dtype=torch.int64)
        if terms > 0:
            order = torch.randperm(terms, generator=generator)
            windows[:, 1], windows[:, 3] = even_widths(terms, self.rows), even_widths(terms, self.columns)
            windows[:, 0] = torch.arange(terms) * self.height // terms
            windows[:, 2] = order * self.width // terms
        return windows.to(dtype=dtype, device=device)


def even_widths(terms: int, total: int) -> Tensor:
    """Integers (terms,) that differ by at most one and sum to ``total``."""
    edges = torch.arange(terms + 1) * total // max(1, terms)
    return edges[1:] - edges[:-1]


@final
@dataclass(frozen=True)
class GBLR(Structure):
    """``W = sum_k u_k v_k^T``, where ``u_k`` and ``v_k`` live on a window of the outputs and one of the inputs.

    Windows are cyclic intervals of any width, none included, and overlap freely. ``windows`` (terms, 4) holds row
    location, row width, column location and column width of every term; ``left`` (rows,) and ``right`` (columns,) the
    contents, one term after the other. ``rows + columns`` parameters and multiply-adds, on any shape. Holds low rank,
    block-diagonal, block-sparse, block-low-rank and banded matrices (:func:`structmat.windows.as_windows`).

    The windows of a fresh matrix are even and stay where they are under an optimizer: what moves them is
    :mod:`structmat.learn.windows`. Projection: windowed alternating least squares, in which every interval is the exact
    optimum given the other side, never worse than the low rank matrix of the same totals; optimal where all windows are
    full; with a lower bound from the rank. Exact for members whose windows are found
    (:func:`structmat.projection.found_windows.windowed_terms`), as those in general position are.
    Source: Lee and Kim, "Differentiable Learning of Generalized Structured Matrices for Efficient Deep Neural Networks"
    (ICLR 2024).

    Args:
        terms: their number, or a fraction of the dense parameter count, at windows of half the sides.
        rows: the sum of the row widths; half of what ``terms`` full windows hold if not given.
        columns: the sum of the column widths, likewise.
    """

    terms: int | float = 16
    rows: int | None = None
    columns: int | None = None

    supports_complex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size(self, "terms", self.terms, minimum=0)
        for name, size in (("rows", self.rows), ("columns", self.columns)):
            if size is not None:
                check_count(self, name, size, minimum=0)
        if isinstance(self.terms, float) and (self.rows is not None or self.columns is not None):
            raise StructureError(
                f"GBLR(terms={self.terms}, rows={self.rows}, columns={self.columns}): a fraction stands for itself. "
                "Give rows and columns with a number of terms, or the fraction alone."
            )

    def resolve(self, shape: Shape) -> GBLR:
        terms = self.terms
        if isinstance(terms, float):
            terms = int(terms * shape[0] * shape[1] / (_half(shape[0]) + _half(shape[1])) + 1e-9)
            if terms < 1:
                raise ShapeError(
                    f"{self} of a matrix of shape {shape} is less than one term of {_half(shape[0])} + "
                    f"{_half(shape[1])} numbers. Use terms=1 or a larger fraction."
                )
        rows = terms * _half(shape[0]) if self.rows is None else self.rows
        columns = terms * _half(shape[1]) if self.columns is None else self.columns
        return replace(self, terms=terms, rows=rows, columns=columns)

    def restriction(self, shape: Shape) -> str | None:
        terms = whole(self.terms)
        for name, total, size in (("rows", self.rows, shape[0]), ("columns", self.columns, shape[1])):
            if total is not None and total > terms * size:
                return (
                    f"{terms} windows of at most {size} places hold {terms * size} in all. "
                    f"Use {name}={terms * size} or less, or more terms."
                )
        return None

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        terms, rows, columns = whole(self.terms), whole(self.rows), whole(self.columns)
        covered = int((even_widths(terms, rows) * even_widths(terms, columns)).sum())
        inner = max(1.0, columns / max(1, terms))
        gain = DENSE_GAIN * shape[0] * inner / covered if covered else 0.0
        return {
            "left": ParameterSpec((rows,), Normal(gain**0.5)),
            "right": ParameterSpec((columns,), Normal(inner**-0.5)),
            "windows": ParameterSpec((terms, 4), _EvenWindows(*shape, rows, columns), learned=False, dtype=torch.int64),
        }

    def program(self, shape: Shape) -> Program:
        return Windowed("left", "right", "windows", *shape, whole(self.terms), whole(self.rows), whole(self.columns))

    def project(self, target: Target) -> Fit:
        terms, rows, columns = whole(self.terms), whole(self.rows), whole(self.columns)
        (m, n), tail = target.native, target.whitened_svd[1][terms:]
        bound = float(torch.linalg.norm(tail))
        if rows == terms * m and columns == terms * n and terms <= min(m, n):
            found = low_rank_terms(target, terms, rows, columns).canonical()
            return Fit(pack(found), Certificate.OPTIMAL, bound, "truncated SVD")
        certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
        exact = windows_of(target)
        if exact is not None and exact.count <= terms and exact.totals[0] <= rows and exact.totals[1] <= columns:
            exact = settle(target.weight, exact.with_count(terms), rows, columns).canonical()
            return Fit(pack(exact), certificate, bound, "windows found")
        method = "windowed alternating least squares" if target.sweeps else "truncated SVD, cropped"
        return Fit(pack(windowed(target, terms, rows, columns)), certificate, bound, method)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        height, width = _half(shape[0]), _half(shape[1])
        terms = largest_fitting(lambda k: k * (height + width + 4), budget, 2 * min(shape))
        if terms:
            yield cls(terms, terms * height, terms * width)


def _half(size: int) -> int:
    return (size + 1) // 2
