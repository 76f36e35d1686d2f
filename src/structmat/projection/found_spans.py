"""Windows of a matrix of fewer terms than rows and columns, from its column space and its row space.

The column space of a sum of as many windowed rank-one terms as its rank holds their left sides, and in general position
the vectors of the space that live on the shortest windows are these, up to sums of those whose windows lie within one
another. (The vectors of shortest spans of a linear code are found likewise.) The right sides follow; a sum that is one
too many shows on the other side as a window that is too long, and is taken back where that makes both shorter in all.
Windows may overlap in any number. Derived for this library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.projection.windows import Terms

_LARGEST = 128
"""Sides up to this: a singular value decomposition for every row, and some."""

_FULLEST = 3 / 4
"""Of the full rank, at most: beyond, windows of any space of the rank are short."""

_STEPS = 8
"""Sums taken back, for every term."""

_PAIRS = 1024
"""Of terms that are looked at together."""

LOCATIONS = 4
"""Numbers of a term beside its contents."""


def numbers(terms: Terms) -> int:
    """What a matrix of these terms stores, locations too."""
    return sum(terms.totals) + LOCATIONS * terms.count


def spanned_terms(matrix: Tensor, loose: float) -> Terms | None:
    """Windowed terms (as many as the rank) whose sum a matrix (m, n) nearly is, or None where its column space or its
    row space has no vector on a window that is shorter than in any space of this dimension.

    Args:
        matrix: float64 or complex128, of less than full rank.
        loose: what is smaller relative to the rest is zero.
    """
    if max(matrix.shape) > _LARGEST or not bool(matrix.any()):
        return None
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > loose * s[0]).sum())
    if rank > _FULLEST * len(s):
        return None
    best: Terms | None = None
    for basis, own in ((u[:, :rank], matrix), (vh[:rank].mT, matrix.mT)):
        left = _shortest(basis, loose)
        if left is not None:
            right = torch.linalg.lstsq(left, own).solution
            terms = disentangled(left.mT, right, loose)
            if own is not matrix:
                terms = Terms(terms.right, terms.left, terms.windows[:, [2, 3, 0, 1]])
            if best is None or numbers(terms) < numbers(best):
                best = terms
    return best


def _shortest(basis: Tensor, loose: float) -> Tensor | None:
    """A basis (m, rank) of the space that these columns (m, rank) span, on windows as short as can be; None where no
    window is shorter than in general.

    For every row the shortest window from there on that holds a vector of the space, which is not zero there: the row
    of the basis is then no combination of those of the rows outside.
    """
    size, rank = basis.shape
    turned = torch.stack([basis.roll(-i, 0) for i in range(size)])  # (starts, rows from the start on, rank)
    place = torch.arange(size)

    def beyond(width: Tensor) -> Tensor:
        """What is left of the first rows, when those outside of windows of these widths (starts,) are taken out."""
        outside = turned * (place >= width[:, None])[:, :, None]
        _, s, vh = torch.linalg.svd(outside, full_matrices=False)
        kept = vh * (s > loose)[:, :, None]
        first = turned[:, 0]
        for _ in range(2):  # once more for the rounding of the first time
            first = first - torch.einsum("sk,skr->sr", torch.einsum("sr,skr->sk", first, kept.conj()), kept)
        return first

    def is_held(width: Tensor) -> Tensor:
        found: Tensor = torch.linalg.norm(beyond(width), dim=1) > loose
        return found

    usual = size - rank + 1
    low, high = torch.zeros(size, dtype=torch.int64), torch.full((size,), size)
    if not bool(is_held(torch.full((size,), usual - 1)).any()):
        return None
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        held = is_held(middle)
        low, high = torch.where(held, low, middle), torch.where(held, middle, high)
    vectors = torch.einsum("mr,sr->sm", basis, beyond(high).conj())
    chosen: list[Tensor] = []
    held_so_far = basis.new_zeros(0, size)
    for start in high.argsort(stable=True).tolist():
        vector = vectors[start] / torch.linalg.norm(vectors[start])
        rest = vector
        for _ in range(2):
            rest = rest - (held_so_far.conj() @ rest) @ held_so_far
        if float(torch.linalg.norm(rest)) > 1e-6:
            held_so_far = torch.cat([held_so_far, (rest / torch.linalg.norm(rest))[None]])
            chosen.append(vector)
            if len(chosen) == rank:
                return torch.stack(chosen, 1)
    return None


def disentangled(left: Tensor, right: Tensor, loose: float) -> Terms:
    """The same matrix ``left^T right`` in terms of windows that are shorter in all, after sums have been taken back.

    ``right[k] - t right[l]`` and ``left[l] + t left[k]`` give the same matrix. Those are tried that end a window
    sooner, and the one that saves most numbers is taken, as long as there is one.

    Args:
        left: (terms, m).
        right: (terms, n).
        loose: what is smaller relative to the rest is zero.
    """
    count = len(left)
    left, right = _cleared(left, left.abs(), loose), _cleared(right, right.abs(), loose)
    windows = torch.cat([_hulls(left != 0), _hulls(right != 0)], 1)
    gains = torch.zeros(count, count, 4, dtype=torch.int64)
    renewed = torch.arange(count)
    for _ in range(_STEPS * count):
        which = torch.zeros(count, count, dtype=torch.bool)
        which[renewed], which[:, renewed] = True, True
        pairs = torch.nonzero(which.fill_diagonal_(False)).mT
        for k, l in zip(*(own.split(_PAIRS) for own in pairs), strict=True):
            new_left, new_right = _exchanged(left, right, windows, k, l, loose)
            heights, widths = _hulls(new_left != 0)[..., 1], _hulls(new_right != 0)[..., 1]
            before = _stored(windows[k, 1], windows[k, 3]) + _stored(windows[l, 1], windows[l, 3])
            after = _stored(windows[k, 1, None], widths) + _stored(heights, windows[l, 3, None])
            gains[k, l] = before[:, None] - after
        best = int(gains.argmax()) if count > 1 else 0
        one, other, way = best // (4 * count), best // 4 % count, best % 4
        if count < 2 or int(gains[one, other, way]) <= 0:
            break
        renewed = torch.tensor([one, other])
        new_left, new_right = _exchanged(left, right, windows, renewed[:1], renewed[1:], loose)
        left[other], right[one] = new_left[0, way], new_right[0, way]
        windows[renewed] = torch.cat([_hulls(left[renewed] != 0), _hulls(right[renewed] != 0)], 1)
    terms = Terms(left, right, windows)
    return terms.taken(torch.nonzero(terms.alive)[:, 0])


def _exchanged(
    left: Tensor, right: Tensor, windows: Tensor, k: Tensor, l: Tensor, loose: float
) -> tuple[Tensor, Tensor]:
    """For pairs of terms, what ``left[l]`` and ``right[k]`` become in four ways: without the first or the last place of
    a window of the second, or of the first; (pairs, 4, places) each."""
    places = []
    for own, start, size in ((l, windows[l, 0], left.shape[1]), (k, windows[k, 2], right.shape[1])):
        wide = windows[own, 1 if own is l else 3]
        places.append(torch.stack([start, (start + wide - 1) % size], 1))
    above = torch.cat([right[k].gather(1, places[1]), -left[l].gather(1, places[0])], 1)
    below = torch.cat([right[l].gather(1, places[1]), left[k].gather(1, places[0])], 1)
    factors = torch.where(below != 0, above / torch.where(below != 0, below, torch.ones_like(below)), 0)[..., None]
    found = []
    for own, other, by in ((left[l], left[k], factors), (right[k], right[l], -factors)):
        added = by * other[:, None]
        found.append(_cleared(own[:, None] + added, own[:, None].abs() + added.abs(), loose))
    return found[0], found[1]


def _stored(heights: Tensor, widths: Tensor) -> Tensor:
    """Numbers of terms, none without one of their widths."""
    return torch.where((heights > 0) & (widths > 0), heights + widths + LOCATIONS, 0)


def _cleared(values: Tensor, sizes: Tensor, loose: float) -> Tensor:
    """With zeros where no more than rounding of numbers of these sizes is left."""
    return torch.where(values.abs() <= loose * sizes.amax(-1, keepdim=True), torch.zeros_like(values), values)


def _hulls(held: Tensor) -> Tensor:
    """Starts and widths (..., 2) of the shortest cyclic intervals that hold all places (..., size)."""
    size = held.shape[-1]
    place = torch.arange(2 * size)
    before = torch.where(torch.cat([held, held], -1), place, -1).cummax(-1).values
    # Places in a row before each that hold nothing, around the circle; the window is after the most of them.
    empty = torch.where(held, place[size:] - 1 - before[..., size - 1 : -1], -1)
    gap, first = empty.max(-1)
    return torch.stack([first, torch.where(gap >= 0, size - gap, 0)], -1)
