"""Rows and columns of a butterfly or Monarch matrix put back in order, when both were shuffled in an unknown way.

Two rows of a Monarch matrix that share a block of its right factor are proportional on each block of columns: their
quotient takes few values, each many times. The quotients by one row therefore give the blocks of columns, one level
after the other for a butterfly; and rows that are proportional on all blocks of a level belong together.
Source: Zheng, Riccietti, Gribonval, "Efficient identification of butterfly sparse matrix factorizations" (2023), who
cluster by correlations and so allow for noise, which this does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIKE = 1e-6
"""Quotients nearer than this, relatively, are equal: a millionth suits double precision."""


def butterfly_reordering(matrix: Tensor, alike: float = ALIKE) -> tuple[Tensor, Tensor] | None:
    """Orders of rows and columns after which a square matrix, a power of two, may be a butterfly.

    Args:
        matrix: (n, n), in float64 or complex128.
        alike: relative differences up to it are rounding.

    Returns:
        Two permutations with ``matrix[rows][:, columns]`` a butterfly if the matrix is one that was reordered, and
        None if it is not. Orders are not unique: those within a subtree are free. To be checked by a fit.

    Cost: ``O(n^2 log n)``, and as much for each row that is tried as reference.
    """
    size = matrix.shape[0]
    if matrix.shape[1] != size or size < 4 or size & (size - 1) or not bool((matrix != 0).all()):
        return None
    labels = _column_tree(matrix, alike)
    if labels is None:
        return None
    # labels[s] (n,) is the block of each column among 2^(s+1) blocks, nested.
    columns = _lexicographic(labels)
    groups = []
    for blocks in labels:
        found = _row_groups(matrix, blocks, alike)
        if found is None:
            return None
        groups.append(found)
    # Two column blocks: pairs of rows; all columns apart: all rows together. Coarse groups are the leading digit.
    rows = _lexicographic(groups[::-1])
    # Rows of one group are n / (2^(s+1)) apart in a butterfly: its digits count the other way.
    return _spread(rows, size), columns


def monarch_reordering(matrix: Tensor, block: int, alike: float = ALIKE) -> tuple[Tensor, Tensor] | None:
    """Orders of rows and columns after which a square matrix may be a Monarch matrix with so many columns a block.

    Args:
        matrix: (n, n), in float64 or complex128.
        block: b, a divisor of n between 2 and n / 2.
        alike: relative differences up to it are rounding.

    Returns:
        Two permutations, to be checked by a fit, or None. Cost: ``O(n^2 log n)``.
    """
    size = matrix.shape[0]
    if matrix.shape[1] != size or size % block or not 2 <= block <= size // 2 or not bool((matrix != 0).all()):
        return None
    for row in matrix[1:] / matrix[:1]:
        label = _classes(row, alike)
        sizes = torch.bincount(label)
        if len(sizes) == size // block and bool((sizes == block).all()):
            groups = _row_groups(matrix, label, alike)
            if groups is not None:
                # Row l b + j is the l-th one of group j.
                rows = groups.argsort(stable=True).reshape(block, size // block).T.flatten()
                return rows, label.argsort(stable=True)
    return None


def _column_tree(matrix: Tensor, alike: float) -> list[Tensor] | None:
    """Nested partitions of the columns into 2, 4, ..., n / 2 blocks, as labels."""
    size = matrix.shape[0]
    quotients = matrix[1:] / matrix[:1]
    label = torch.zeros(size, dtype=torch.int64)
    found: list[Tensor] = []
    classes = [_classes(row, alike) for row in quotients]
    counts = torch.tensor([int(c.max()) + 1 for c in classes])
    blocks = 1
    while blocks < size // 2:
        for index in counts.argsort(stable=True).tolist():
            if counts[index] > 2 * blocks:
                return None
            _, finer = torch.unique(label * size + classes[index], return_inverse=True)
            sizes = torch.bincount(finer)
            if len(sizes) == 2 * blocks and bool((sizes == size // (2 * blocks)).all()):
                label, blocks = finer, 2 * blocks
                found.append(label)
                break
        else:
            return None
    return found


def _classes(values: Tensor, alike: float) -> Tensor:
    """Equal numbers get equal labels, up to rounding."""
    scale = float(values.abs().median()) * alike
    parts = torch.view_as_real(values) if values.is_complex() else values[:, None]
    label = torch.zeros(len(values), dtype=torch.int64)
    for part in parts.T:
        order = part.argsort()
        steps = (part[order].diff() > scale).to(torch.int64).cumsum(0)
        own = torch.zeros_like(label)
        own[order[1:]] = steps
        _, label = torch.unique(label * len(values) + own, return_inverse=True)
    return label


def _row_groups(matrix: Tensor, blocks: Tensor, alike: float) -> Tensor | None:
    """Rows that are proportional on each block of columns, as labels; None if groups have not one size."""
    size = matrix.shape[0]
    count = int(blocks.max()) + 1
    order = blocks.argsort(stable=True)
    parts = matrix[:, order].reshape(size, count, -1)
    directions = parts / torch.linalg.vector_norm(parts, dim=-1, keepdim=True)
    label = torch.full((size,), -1, dtype=torch.int64)
    group = 0
    for row in range(size):
        if label[row] < 0:
            cosines = torch.einsum("rkc,kc->rk", directions, directions[row].conj()).abs()
            near = (cosines > 1 - alike).all(1) & (label < 0)
            if int(near.sum()) != count:
                return None
            label[near] = group
            group += 1
    return label


def _lexicographic(labels: list[Tensor]) -> Tensor:
    """The order of places by nested labels, coarse ones first."""
    key = torch.zeros_like(labels[0])
    for label in labels:
        _, key = torch.unique(key * (int(label.max()) + 1) + label, return_inverse=True)
    return key.argsort(stable=True)


def _spread(rows: Tensor, size: int) -> Tensor:
    """Rows that come in subtrees, put where a butterfly has them: place i takes the row of reversed digits."""
    levels = size.bit_length() - 1
    places = torch.arange(size)
    backwards = torch.zeros_like(places)
    for level in range(levels):
        backwards |= ((places >> level) & 1) << (levels - 1 - level)
    return rows[backwards]
