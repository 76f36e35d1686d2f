"""Exact conversions to GBLR, sums of windowed rank-one terms, and the operations under which these are closed.

Low rank, block-diagonal, block-sparse, block-low-rank, banded and Pixelfly-like matrices (a sparse part plus a low-rank
one) are sums of windowed rank-one terms at their own cost, as :func:`structmat.projection.windows.published_cost`
counts. Sums of members are members and their costs add; products with a member, transposes, cyclic shifts, diagonal
scalings and submatrices are members of no greater cost.
Source: Lee and Kim, "Differentiable Learning of Generalized Structured Matrices" (ICLR 2024), section 3 and appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.errors import ShapeError, StructureError
from structmat.matrix import StructuredMatrix
from structmat.projection.masks import boxcar
from structmat.projection.windows import Terms, pack, runs, unpack
from structmat.structure import Shape, specs
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal
from structmat.structures.gblr import GBLR
from structmat.structures.low_rank import LowRank
from structmat.structures.product import Product
from structmat.structures.sparse import Sparse
from structmat.structures.sum_of import Sum


def terms_of(matrix: StructuredMatrix) -> Terms:
    """The windowed terms of a GBLR matrix (or of its transpose), written out."""
    if not isinstance(matrix.structure, GBLR):
        raise StructureError(f"{matrix.structure} holds no windows. Convert it by as_windows(matrix) first.")
    shape = matrix.shape[::-1] if matrix.is_transposed else matrix.shape
    t = matrix.tensors
    terms = unpack(t["left"].detach(), t["right"].detach(), t["windows"], shape)
    return transposed(terms) if matrix.is_transposed else terms


def from_terms(terms: Terms) -> StructuredMatrix:
    """The matrix of windowed terms, compactly: terms without one of their widths are dropped."""
    kept = terms.taken(torch.nonzero(terms.alive)[:, 0]).canonical()
    shape = (terms.left.shape[1], terms.right.shape[1])
    rows, columns = kept.totals
    return StructuredMatrix(GBLR(kept.count, rows, columns), shape, pack(kept))


def as_windows(matrix: StructuredMatrix) -> StructuredMatrix:
    """The same matrix as a GBLR one, exactly.

    Families: GBLR, Dense, LowRank, BlockDiagonal, BlockTensorTrain (blocks of low rank), Sparse (whose runs of entries
    within columns or rows become one term each: banded and block-sparse matrices at their own cost), Diagonal, and sums
    and products of these, so Pixelfly-like ``Sum(LowRank(...), Sparse(...))`` too; transposes of all.

    Raises:
        StructureError: the family is none of these. Its dense form can be projected.
    """
    plain = StructuredMatrix(
        matrix.structure, matrix.shape[::-1] if matrix.is_transposed else matrix.shape, matrix.tensors
    )
    terms = _terms(plain)
    return from_terms(transposed(terms) if matrix.is_transposed else terms)


def _terms(matrix: StructuredMatrix) -> Terms:
    structure, (m, n) = matrix.structure, matrix.shape
    tensors = {name: t.detach() for name, t in matrix.tensors.items()}
    if isinstance(structure, GBLR):
        return terms_of(matrix)
    if isinstance(structure, LowRank):
        return full_terms(tensors["left"].T, tensors["right"])
    if isinstance(structure, Sum):
        found = [_terms(part) for part in _parts(structure, matrix, [matrix.shape] * len(structure.parts))]
        return joined(*found)
    if isinstance(structure, Dense | Diagonal | Sparse | BlockDiagonal | BlockTensorTrain):
        if isinstance(structure, BlockTensorTrain):
            return _block_low_rank(structure, tensors, (m, n))
        dense = matrix.to_dense()
        support = _support(matrix)
        by_columns, by_rows = runs(dense, support), transposed(runs(dense.T, support.T))
        return by_columns if by_columns.count <= by_rows.count else by_rows
    if isinstance(structure, Product):
        return _product(structure, matrix)
    raise StructureError(
        f"{structure} is no sum of windowed terms at its own cost. Project it: "
        "project(matrix.to_dense(), GBLR(terms=...))."
    )


def _support(matrix: StructuredMatrix) -> Tensor:
    """Which entries the structure may fill, whatever the values."""
    ones = {n: torch.ones_like(t) if t.is_floating_point() or t.is_complex() else t for n, t in matrix.tensors.items()}
    return StructuredMatrix(matrix.structure, matrix.shape, ones).to_dense() != 0


def _parts(structure: Sum, matrix: StructuredMatrix, shapes: list[Shape]) -> list[StructuredMatrix]:
    found = []
    for index, (part, shape) in enumerate(zip(structure.parts, shapes, strict=True)):
        names = specs(part, shape)
        found.append(StructuredMatrix(part, shape, {name: matrix.tensors[f"term{index}_{name}"] for name in names}))
    return found


def _product(structure: Product, matrix: StructuredMatrix) -> Terms:
    m, n = matrix.shape
    inner = structure.inner if isinstance(structure.inner, int) else min(m, n)
    left = StructuredMatrix(
        structure.left, (m, inner), {k: matrix.tensors[f"left_{k}"] for k in specs(structure.left, (m, inner))}
    )
    right = StructuredMatrix(
        structure.right, (inner, n), {k: matrix.tensors[f"right_{k}"] for k in specs(structure.right, (inner, n))}
    )
    return multiplied(_terms(left), right.to_dense())


def _block_low_rank(structure: BlockTensorTrain, tensors: dict[str, Tensor], shape: Shape) -> Terms:
    m1, m2, n2, n1 = structure._factors
    rank = tensors["left"].shape[2] // n2
    left = tensors["left"].reshape(m1, m2, n2, rank)
    right = tensors["right"].reshape(n2, m1, rank, n1)
    count = m1 * n2 * rank
    rows = left.new_zeros(m1, n2, rank, m1, m2)
    columns = right.new_zeros(m1, n2, rank, n2, n1)
    windows = torch.zeros(m1, n2, rank, 4, dtype=torch.int64)
    for i in range(m1):
        rows[i, :, :, i] = left[i].permute(1, 2, 0)
        windows[i, :, :, 0] = i * m2
    for j in range(n2):
        columns[:, j, :, j] = right[j]
        windows[:, j, :, 2] = j * n1
    windows[..., 1], windows[..., 3] = m2, n1
    whole = Terms(rows.reshape(count, m1 * m2), columns.reshape(count, n2 * n1), windows.reshape(count, 4))
    return submatrix(whole, (0, shape[0]), (0, shape[1]))


# ------------------------------------------------------------------------------------------------- constructions


def full_terms(left: Tensor, right: Tensor) -> Terms:
    """A low-rank matrix: one term with full windows a row of ``left`` (terms, out) and ``right`` (terms, in)."""
    window = torch.tensor([[0, left.shape[1], 0, right.shape[1]]])
    return Terms(left.clone(), right.clone(), window.expand(len(left), 4).clone())


# ------------------------------------------------------------------------------------------------------- closure


def joined(*terms: Terms) -> Terms:
    """The sum: all terms together, costs add."""
    return Terms(
        torch.cat([t.left for t in terms]), torch.cat([t.right for t in terms]), torch.cat([t.windows for t in terms])
    )


def transposed(terms: Terms) -> Terms:
    """The transpose (not conjugated): the two sides exchanged, the cost the same."""
    return Terms(terms.right, terms.left, terms.windows[:, [2, 3, 0, 1]])


def multiplied(terms: Terms, right: Tensor) -> Terms:
    """The product with any matrix (in, other) from the right: as many terms, the row windows unchanged.

    The column windows are the shortest cyclic intervals that hold what is reached: supports of the new contents.
    """
    content = terms.cropped().right @ right
    reached = (boxcar(terms.windows[:, 3], terms.windows[:, 2], terms.right.shape[1]).to(torch.float64)) @ (
        right != 0
    ).to(torch.float64) > 0
    windows = terms.windows.clone()
    for k in range(terms.count):
        windows[k, 2:] = torch.tensor(hull(reached[k]))
    return Terms(terms.left, content, windows)


def hull(held: Tensor) -> tuple[int, int]:
    """Start and width of the shortest cyclic interval that holds all places where ``held`` (size,) is true."""
    places = torch.nonzero(held)[:, 0]
    if len(places) == 0:
        return 0, 0
    gaps = (places.roll(-1) - places - 1) % len(held)  # empty places after each held one
    if len(places) == 1:
        return int(places[0]), 1
    last = int(gaps.argmax())
    start = int(places[(last + 1) % len(places)])
    return start, len(held) - int(gaps[last])


def shifted(terms: Terms, rows: int, columns: int) -> Terms:
    """The matrix with rows and columns moved on cyclically: windows move, the cost stays."""
    windows = terms.windows.clone()
    windows[:, 0] = (windows[:, 0] + rows) % terms.left.shape[1]
    windows[:, 2] = (windows[:, 2] + columns) % terms.right.shape[1]
    return Terms(terms.left.roll(rows, 1), terms.right.roll(columns, 1), windows)


def scaled(terms: Terms, rows: Tensor, columns: Tensor) -> Terms:
    """``diag(rows) @ W @ diag(columns)``: the same windows."""
    return Terms(terms.left * rows, terms.right * columns, terms.windows)


def submatrix(terms: Terms, rows: tuple[int, int], columns: tuple[int, int]) -> Terms:
    """Rows ``rows[0] .. rows[1] - 1`` and such columns. A window that the border cuts in two becomes two terms."""
    found = terms
    for side, (begin, end) in enumerate((rows, columns)):
        found = _cut(found if side == 0 else transposed(found), begin, end)
        found = found if side == 0 else transposed(found)
    return found


def _cut(terms: Terms, begin: int, end: int) -> Terms:
    """Rows ``begin .. end - 1``."""
    kept, windows = [], []
    size = end - begin
    for k, (row, height, column, width) in enumerate(terms.windows.tolist()):
        held = boxcar(torch.tensor([height]), torch.tensor([row]), terms.left.shape[1])[0][begin:end]
        edges = torch.nonzero(torch.diff(held.to(torch.int8), prepend=torch.zeros(1), append=torch.zeros(1)))[:, 0]
        for start, stop in edges.reshape(-1, 2).tolist():
            kept.append(k)
            windows.append((start % size, stop - start, column, width))
    which = torch.tensor(kept, dtype=torch.int64)
    table = torch.tensor(windows, dtype=torch.int64).reshape(-1, 4)
    return Terms(terms.left[which, begin:end], terms.right[which], table).cropped()


def interpolated(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Windows (terms, 4) between two of as many terms: ``floor(share * first + (1 - share) * second)``.

    The average width of the outcome is at most that of the larger one.

    Raises:
        ShapeError: the numbers of terms differ.
    """
    if first.shape != second.shape:
        raise ShapeError(
            f"Windows of {len(first)} and of {len(second)} terms have nothing between them. Add empty terms."
        )
    return torch.floor(share * first + (1 - share) * second).to(torch.int64)
