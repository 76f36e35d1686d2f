"""Hierarchical factorization of a matrix into a chain of contractions, with error certificates.

A chain of chainable patterns is fitted by splitting it in two, again and again, in the order of any binary tree. At a
split the product of the patterns on either side is known, the problem falls apart into independent blocks of low rank,
and each is solved by a truncated SVD. Before a split the factors to the left are made column-orthonormal and those to
the right row-orthonormal (in the blocks of their gauge), so that what is cut off is the error of the whole product.

With ``E_s`` the distance of the matrix to the two-factor class of split s, ``max E_s`` bounds the error of every
member from below, and from left to right or right to left the error is at most ``sqrt(sum E_s^2)``.
Source: Le, Zheng, Riccietti, Gribonval, "Fast learning of fast transforms, with guarantees" (ICASSP 2022); Zheng et
al., "Butterfly factorization with error guarantees" (SIMAX 2025).

Patterns and factors are given in order of application; inside, factor 0 is the leftmost of the matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.program import Chain, Contraction, apply, chainable, merged_pattern
from structmat.program.dense import dense
from structmat.sizes import Pattern

_NARROW = 8
"""Blocks with at most as many rows or columns are decomposed by their Gram matrices."""


def product_pattern(patterns: Sequence[Pattern]) -> Pattern:
    """The pattern of the product of a chain in order of application."""
    merged = patterns[0]
    for pattern in patterns[1:]:
        merged = merged_pattern(_stage(merged), _stage(pattern))
    return merged


def dense_product(factors: Sequence[Tensor], patterns: Sequence[Pattern]) -> Tensor:
    """The (out, in) matrix that a chain of factors (a, b, c, d), in order of application, multiplies to."""
    program = Chain(tuple(Contraction(str(i), *pattern) for i, pattern in enumerate(patterns)))
    tensors = {str(i): factor for i, factor in enumerate(factors)}
    return dense(program, tensors, factors[0].dtype, factors[0].device)


def restrict(matrix: Tensor, pattern: Pattern) -> Tensor:
    """The entries of a matrix (abd, acd) on the support of a pattern, as a tensor (a, b, c, d)."""
    a, b, c, d = pattern
    grid = matrix.reshape(a, b, d, a, c, d)
    return torch.diagonal(torch.diagonal(grid, dim1=0, dim2=3), dim1=1, dim2=3).permute(2, 0, 1, 3)


def split_errors(matrix: Tensor, patterns: Sequence[Pattern]) -> list[float]:
    """``E_s`` for each of the splits between neighbours, counted from the output: the distance of a matrix to the
    products of two factors with the patterns of either side. Every member of the chain is at least ``max E_s`` away.

    For a chain of a single pattern the list holds the distance to it. Cost: one batched SVD of all entries a split.
    """
    order = _from_output(patterns)
    whole = product_pattern(patterns)
    tensor = restrict(matrix, whole)
    outside = max(0.0, float(torch.linalg.norm(matrix) ** 2 - torch.linalg.norm(tensor) ** 2))
    if len(order) == 1:
        return [outside**0.5]
    errors = []
    for s in range(1, len(order)):
        left, right = _sides(order, 0, s, len(order))
        blocks, rank = _blocks(tensor, left, right)
        tails = torch.linalg.svdvals(blocks)[..., rank:]
        errors.append((outside + float(torch.linalg.norm(tails) ** 2)) ** 0.5)
    return errors


def factorize(
    matrix: Tensor, patterns: Sequence[Pattern], *, splits: Sequence[int] | None = None, orthonormal: bool = True
) -> list[Tensor]:
    """Factors of a chain near to a matrix; exact, up to rounding, for members.

    Args:
        matrix: (out, in), the shape of the product.
        patterns: a chain of chainable patterns, in order of application.
        splits: the order in which the interfaces ``1 .. L - 1``, counted from the output, are split. Any order is one
            of a binary tree; None for left to right.
        orthonormal: orthonormalise before every split. Without it there are no certificates.

    Returns:
        One tensor (a, b, c, d) a pattern, in order of application.
    """
    order = _from_output(patterns)
    count = len(order)
    splits = range(1, count) if splits is None else splits
    assert sorted(splits) == list(range(1, count)), f"{splits} is no order of the {count - 1} interfaces"
    spans = [(0, count)]
    factors = [restrict(matrix, product_pattern(patterns))]
    for s in splits:
        which = next(i for i, (low, high) in enumerate(spans) if low < s < high)
        if orthonormal:
            _orthonormalise(factors, [_span_pattern(order, *span) for span in spans], which)
        low, high = spans[which]
        left, right = _sides(order, low, s, high)
        factors[which : which + 1] = _split(factors[which], left, right)
        spans[which : which + 1] = [(low, s), (s, high)]
    return factors[::-1]


def factorize_by_crosses(matrix: Tensor, patterns: Sequence[Pattern]) -> list[Tensor] | None:
    """Factors of a member of a chain whose interfaces have rank 1, from one row and one column of every block.

    A block of rank 1 is the product of any of its columns and rows that are not zero: of the matrix only
    ``O(n^1.5)`` entries are looked at. For matrices that are no members this is no approximation; the caller compares.
    None where an interface has another rank.
    """
    order = _from_output(patterns)
    count = len(order)
    spans, factors = [(0, count)], [restrict(matrix, product_pattern(patterns))]
    for s in _bisections(0, count):
        which = next(i for i, (low, high) in enumerate(spans) if low < s < high)
        low, high = spans[which]
        left, right = _sides(order, low, s, high)
        blocks, rank = _blocks(factors[which], left, right)
        if rank != 1:
            return None
        first, second = _cross(blocks)
        factors[which : which + 1] = _from_left(first, left), _from_right(second, right)
        spans[which : which + 1] = [(low, s), (s, high)]
    return factors[::-1]


def _bisections(low: int, high: int) -> list[int]:
    """The interfaces between ``low`` and ``high``, middle ones first."""
    if high - low < 2:
        return []
    middle = (low + high) // 2
    return [middle, *_bisections(low, middle), *_bisections(middle, high)]


def _cross(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A column and a row of each block, through an entry that is large among those that were looked at."""
    column = blocks[..., :1, :].abs().argmax(-1, keepdim=True)
    row = torch.take_along_dim(blocks, column, -1).abs().argmax(-2, keepdim=True)
    column = torch.take_along_dim(blocks, row, -2).abs().argmax(-1, keepdim=True)
    own = torch.take_along_dim(blocks, column, -1)
    row = own.abs().argmax(-2, keepdim=True)
    across = torch.take_along_dim(blocks, row, -2)
    pivot = torch.take_along_dim(own, row, -2)
    even = torch.where(pivot == 0, 1.0, pivot)
    root = even.abs().sqrt()
    return own / (even / root), across / root


def sweep(matrix: Tensor, factors: Sequence[Tensor], patterns: Sequence[Pattern]) -> list[Tensor]:
    """One pass of exact block coordinate descent from the output to the input; never increases the error.

    With the factors to the left column-orthonormal and those to the right row-orthonormal, the rank-one terms that a
    factor weighs are orthonormal, so its least squares solution is ``X^H A Y^H`` restricted to its support.
    """
    order, current = _from_output(patterns), list(factors)[::-1]
    count = len(order)
    _orthonormalise(current, order, 0)
    rights = [_dense_side(current[i + 1 :], order[i + 1 :]) for i in range(count)]  # products right of factor i
    reached = matrix  # X^H A for the product X left of the current factor
    for i in range(count):
        right = rights[i]
        current[i] = restrict(reached if right is None else reached @ right.mH, order[i]).clone()
        if i + 1 < count:
            _push_right(current, order, i)
            adjoint = Contraction("w", *order[i]).transpose()
            reached = apply(adjoint, {"w": current[i].conj().resolve_conj()}, reached.T).T
    return current[::-1]


def _dense_side(factors: Sequence[Tensor], order: Sequence[Pattern]) -> Tensor | None:
    return dense_product(factors[::-1], order[::-1]) if factors else None


# --------------------------------------------------------------------------------------- two neighbouring factors


def _stage(pattern: Pattern) -> Contraction:
    return Contraction("", *pattern)


def _from_output(patterns: Sequence[Pattern]) -> list[Pattern]:
    return list(patterns)[::-1]


def _span_pattern(order: Sequence[Pattern], low: int, high: int) -> Pattern:
    return product_pattern(order[low:high][::-1])


def _sides(order: Sequence[Pattern], low: int, s: int, high: int) -> tuple[Pattern, Pattern]:
    return _span_pattern(order, low, s), _span_pattern(order, s, high)


def _interface(left: Pattern, right: Pattern) -> tuple[int, int, int]:
    """(outer, rank, inner): the left factor's c is (outer, rank) and its d (inner, d2), the right one's a is
    (a1, outer) and its b (rank, inner)."""
    rank = chainable(_stage(right), _stage(left))
    assert rank is not None, f"{left} and {right} are not chainable"
    return right[0] // left[0], rank, left[3] // right[3]


def _blocks(tensor: Tensor, left: Pattern, right: Pattern) -> tuple[Tensor, int]:
    """The product tensor of two factors as a batch (a1, outer, inner, d2) of matrices b1 x c2, and their rank."""
    outer, rank, inner = _interface(left, right)
    grid = tensor.reshape(left[0], left[1], inner, outer, right[2], right[3])
    return grid.permute(0, 3, 2, 5, 1, 4), rank


def _split(tensor: Tensor, left: Pattern, right: Pattern) -> tuple[Tensor, Tensor]:
    blocks, rank = _blocks(tensor, left, right)
    if rank == 1 and 1 < min(blocks.shape[-2:]) <= _NARROW:
        first, second = _nearest_of_rank_1(blocks)
        return _from_left(first, left), _from_right(second, right)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    kept = min(rank, s.shape[-1])
    root = s[..., :kept].sqrt()
    first, second = u[..., :kept] * root[..., None, :], root[..., None] * vh[..., :kept, :]
    if kept < rank:  # more rank than the blocks have: the rest is zero
        first = torch.nn.functional.pad(first, (0, rank - kept))
        second = torch.nn.functional.pad(second, (0, 0, 0, rank - kept))
    return _from_left(first, left), _from_right(second, right)


def _nearest_of_rank_1(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The best columns times rows for a batch of matrices, narrow in one direction, by their small Gram matrices.

    Squaring costs digits of the small singular values only, and those are what is cut off: the leading vector comes out
    to rounding wherever it matters, so that matrices of rank 1 are met to rounding. One pass over the entries.
    """
    blocks = blocks.resolve_conj()
    low, high = torch.aminmax(torch.view_as_real(blocks) if blocks.is_complex() else blocks)
    largest = max(-float(low), float(high))
    scaled = blocks if largest == 0 or 1e-100 < largest < 1e100 else blocks / largest  # squares must not overflow
    is_tall = blocks.shape[-2] > blocks.shape[-1]
    vectors = torch.linalg.eigh(scaled.mH @ scaled if is_tall else scaled @ scaled.mH)[1]
    top = vectors[..., -1:]
    other = blocks @ top if is_tall else top.mH @ blocks
    root = torch.linalg.vector_norm(other, dim=(-2, -1), keepdim=True).sqrt()
    even = torch.where(root > 0, root, 1.0)
    return (other / even, even * top.mH) if is_tall else (top * even, other / even)


def _left_frames(tensor: Tensor, left: Pattern, right: Pattern) -> Tensor:
    """A left factor as a batch (a1, outer, inner, d2) of matrices b1 x rank: the columns of one gauge block each."""
    outer, rank, inner = _interface(left, right)
    return tensor.reshape(left[0], left[1], outer, rank, inner, right[3]).permute(0, 2, 4, 5, 1, 3)


def _from_left(frames: Tensor, left: Pattern) -> Tensor:
    return frames.permute(0, 4, 1, 5, 2, 3).reshape(left)


def _right_frames(tensor: Tensor, left: Pattern, right: Pattern) -> Tensor:
    """A right factor as a batch (a1, outer, inner, d2) of matrices rank x c2."""
    outer, rank, inner = _interface(left, right)
    return tensor.reshape(left[0], outer, rank, inner, right[2], right[3]).permute(0, 1, 3, 5, 2, 4)


def _from_right(frames: Tensor, right: Pattern) -> Tensor:
    return frames.permute(0, 1, 4, 2, 5, 3).reshape(right)


# ------------------------------------------------------------------------------------------------ orthonormalising


def _orthonormalise(factors: list[Tensor], order: Sequence[Pattern], centre: int) -> None:
    """Column-orthonormal factors left of the centre, row-orthonormal ones right of it; the product does not change."""
    for i in range(centre):
        _push_right(factors, order, i)
    for i in range(len(factors) - 1, centre, -1):
        _push_left(factors, order, i)


def _push_right(factors: list[Tensor], order: Sequence[Pattern], i: int) -> None:
    left, right = order[i], order[i + 1]
    frame, rest = _orthonormal_columns(_left_frames(factors[i], left, right))
    factors[i] = _from_left(frame, left)
    factors[i + 1] = _from_right(rest @ _right_frames(factors[i + 1], left, right), right)


def _push_left(factors: list[Tensor], order: Sequence[Pattern], i: int) -> None:
    left, right = order[i - 1], order[i]
    frame, rest = _orthonormal_columns(_right_frames(factors[i], left, right).mH)
    factors[i] = _from_right(frame.mH, right)
    factors[i - 1] = _from_left(_left_frames(factors[i - 1], left, right) @ rest.mH, left)


def _orthonormal_columns(frames: Tensor) -> tuple[Tensor, Tensor]:
    """``frames = Q R`` in a batch, Q of the shape of ``frames`` with orthonormal columns (zero ones where there are
    more columns than rows)."""
    rows, columns = frames.shape[-2:]
    if columns == 1:
        norm = torch.linalg.norm(frames, dim=-2, keepdim=True)
        unit = torch.zeros_like(frames)
        unit[..., 0, :] = 1.0
        return torch.where(norm > 0, frames / torch.where(norm > 0, norm, 1.0), unit), norm.to(frames.dtype)
    frame, rest = torch.linalg.qr(frames)
    if rows < columns:
        frame = torch.nn.functional.pad(frame, (0, columns - rows))
        rest = torch.nn.functional.pad(rest, (0, 0, 0, columns - rows))
    return frame, rest
