"""What the theorems say about separation ranks, as functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from structmat.errors import ShapeError
from structmat.nn.convac.tree import ModeTree, check_partition


def lower_bound(tree: ModeTree, channels: int, widths: Sequence[int], part: Sequence[int]) -> int:
    """``min(r_0, M) ** S``, S the number of lowest windows with modes of both sides; dense weights, shared or not.

    Holds for almost all weights (Cohen and Shashua, ICLR 2017, theorem 1; Cohen, Sharir and Shashua, COLT 2016,
    theorem 1 for even | odd positions). With trees whose leaves have several heights, windows of leaves only are
    counted.
    """
    inside, value = check_partition(tree.modes, part), 1
    for level, windows in enumerate(tree.levels):
        for window in windows:
            children = [c for c in window if c >= 0]
            if max(children) < tree.modes:
                split = len({tree.leaves[c] in inside for c in children}) == 2
                value *= min(widths[level], channels) if split else 1
    return value


def upper_bound(tree: ModeTree, channels: int, widths: Sequence[int], part: Sequence[int]) -> int:
    """The recursion ``c_v = min(M^min(|I_v|, |J_v|), r_v prod c_children)`` (Cohen and Shashua, ICLR 2017, theorem 1).

    Any weights. The minimum cut is never larger.
    """
    inside = check_partition(tree.modes, part)
    mask = sum(1 << m for m in inside)
    values = [1] * tree.modes
    for level, windows in enumerate(tree.levels):
        for window in windows:
            node = len(values)
            total, own = tree.masks[node].bit_count(), (tree.masks[node] & mask).bit_count()
            product = math.prod(values[c] for c in window if c >= 0)
            values.append(min(channels ** min(own, total - own), widths[level] * product))
    return values[-1]


def shallow_bound(channels: int, terms: int, modes: int, part: Sequence[int], *, shared: bool = False) -> int:
    """The rank that a CP network of that many terms has for generic weights: ``min(M^min(|I|, |J|), Z)``.

    Shared filters give symmetric tensors: also at most ``binom(M + |I| - 1, |I|)``, and the same for the other side.
    """
    one = len(check_partition(modes, part))
    other = modes - one
    if shared:
        sizes = [math.comb(channels + n - 1, n) for n in (one, other)]
        return min(*sizes, terms)
    return int(min(channels ** min(one, other), terms))


def shallow_width(channels: int, widths: Sequence[int], modes: int) -> int:
    """Terms that a CP network needs to equal, or to approximate arbitrarily well, almost any deep one: ``r^(N/2)``.

    ``r = min(r_0, M)``, windows of two (Cohen, Sharir and Shashua, COLT 2016, theorem 1 and corollary).
    """
    return int(min(widths[0], channels) ** (modes // 2))


def truncated_width(channels: int, widths: Sequence[int], modes: int, levels: int) -> int:
    """Last hidden width that a network of fewer levels needs to equal almost any deep one: ``r^(N / 2^levels)``.

    ``r = min(M, r_0, .., r_{levels-1})`` of the deep one (the same, theorem 3).

    Raises:
        ShapeError: ``levels`` is not below the number of widths.
    """
    if not 1 <= levels < len(widths):
        raise ShapeError(
            f"The deep network has {len(widths)} levels; a truncation has 1..{len(widths) - 1}, got {levels}."
        )
    return int(min(channels, *widths[:levels]) ** (modes // 2**levels))


def tiles(tree: ModeTree, part: Sequence[int]) -> tuple[list[int], list[int]]:
    """The maximal nodes all of whose modes are on one side: those inside ``part``, those outside."""
    mask = sum(1 << m for m in check_partition(tree.modes, part))
    inside, outside, pending = list[int](), list[int](), [tree.nodes - 1]
    while pending:
        node = pending.pop()
        own = tree.masks[node] & mask
        if own == tree.masks[node]:
            inside.append(node)
        elif not own:
            outside.append(node)
        else:
            pending += tree.children(node)
    return sorted(inside), sorted(outside)


def tiling_bounds(tree: ModeTree, width: int, part: Sequence[int]) -> tuple[int, int]:
    """Lower and upper bound for a binary tree with all widths and M equal: powers of the width counted by tiles.

    Lower: sibling pairs of tiles of different sides, below the root. Upper: the smaller number of tiles (Cohen, Tamari
    and Shashua, ICLR 2018).
    """
    inside, outside = tiles(tree, part)
    sides = dict.fromkeys(inside, 0) | dict.fromkeys(outside, 1)
    pairs = 0
    for node in range(tree.modes, tree.nodes - 1):
        found = [sides.get(c) for c in tree.children(node)]
        pairs += sorted(found, key=str) == [0, 1]
    return width**pairs, width ** min(len(inside), len(outside))


def hybrid_width(width: int, group: int) -> float:
    """Channels beyond which single networks must go to follow two mixed dilation orders: ``(r / 2)^(2 / (1 +
    2^(1-k)))``.

    Groups of k layers are swapped between the orders, which are joined at layer k (Cohen, Tamari and Shashua, ICLR
    2018).
    """
    return float((width / 2) ** (2 / (1 + 2.0 ** (1 - group))))
