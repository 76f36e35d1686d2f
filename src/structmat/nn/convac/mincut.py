"""The minimum cut of a network: the generic rank, as a combinatorial quantity.

Vertices are the matrices of the convolutions. A pooling node is one hyperedge of capacity r, its width, that joins the
matrices below it with the one above; a leaf's matrix has an open leg of capacity M to the side of its mode. The value
of a cut is the product of what it severs; a pooling node counts once however many of its legs are cut. No
matricisation has a larger rank, and generic unshared weights have been found to reach it in every case tried; with
capacities lowered to powers of one integer it is a proven lower bound (Levine, Yakira, Cohen and Shashua, ICLR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from structmat.errors import ShapeError
from structmat.nn.convac.tree import ModeTree, check_partition


@dataclass(frozen=True)
class Cut:
    """A minimum cut between the modes of ``part`` (side 0) and the rest (side 1).

    Args:
        value: the product of what is severed, exact.
        nodes: the nodes that are severed: pooling nodes (width counted once) and leaves (M each).
        sides: for each node, the side of the matrix above it.
    """

    value: int
    nodes: tuple[int, ...]
    sides: tuple[int, ...]

    @property
    def bits(self) -> float:
        """The base-2 logarithm of the value."""
        return math.log2(self.value)


def minimum_cut(tree: ModeTree, channels: int, widths: Sequence[int], part: Sequence[int]) -> Cut:
    """By dynamic programming from the leaves to the root, in exact integers; time linear in the nodes.

    Args:
        tree: without overlaps.
        channels: M.
        widths: of each level.
        part: the modes of one side.

    Raises:
        ShapeError: the tree has overlapping windows, or ``part`` does not list modes.
    """
    if tree.overlaps:
        raise ShapeError(
            "A tree with overlapping windows reads inputs twice, and a cut bounds no rank there. Use rank(part)."
        )
    inside = check_partition(tree.modes, part)
    values: list[tuple[int, int]] = []
    severed: list[tuple[bool, bool]] = []
    for mode in tree.leaves:
        own = 0 if mode in inside else 1
        values.append((1, channels) if own == 0 else (channels, 1))
        severed.append((own != 0, own != 1))
    for level, windows in enumerate(tree.levels):
        for window in windows:
            children = [values[c] for c in window if c >= 0]
            free = widths[level] * math.prod(min(c) for c in children)
            same = [math.prod(c[side] for c in children) for side in (0, 1)]
            values.append((min(same[0], free), min(same[1], free)))
            severed.append((free < same[0], free < same[1]))
    sides = [0] * tree.nodes
    sides[-1] = 0 if values[-1][0] <= values[-1][1] else 1
    cut = []
    for node in reversed(range(tree.nodes)):
        is_cut = severed[node][sides[node]]
        if is_cut:
            cut.append(node)
        for child in tree.children(node):
            sides[child] = (0 if values[child][0] <= values[child][1] else 1) if is_cut else sides[node]
    return Cut(min(values[-1]), tuple(reversed(cut)), tuple(sides))


def lowered_cut(tree: ModeTree, channels: int, widths: Sequence[int], part: Sequence[int]) -> int:
    """The largest cut with all capacities lowered to powers of one integer: a lower bound if weights are generic and
    unshared."""
    best = 1
    for base in range(2, max(channels, *widths) + 1):
        lowered = [_power_below(width, base) for width in widths]
        best = max(best, minimum_cut(tree, _power_below(channels, base), lowered, part).value)
    return best


def _power_below(value: int, base: int) -> int:
    power = 1
    while power * base <= value:
        power *= base
    return power


def alternating_cut(channels: int, widths: Sequence[int], scale: int) -> int:
    """The cut of the partition that alternates blocks of ``2**scale`` neighbors, on a binary tree, in closed form.

    ``min(r_k, r_{k-1}, r_{k-2}^2, .., r_0^(2^(k-1)), M^(2^k)) ^ (N / 2^(k+1))`` with k the scale. Dependence at scale
    2^k is limited by the widths of levels k and k - 1 first: widen the levels whose receptive field matches the data.

    Raises:
        ShapeError: not 0 <= scale < the number of levels.
    """
    depth = len(widths)
    if not 0 <= scale < depth:
        raise ShapeError(f"A binary tree of {depth} levels has scales 0..{depth - 1}; got {scale}.")
    candidates = [widths[scale], channels ** (2**scale)]
    for below in range(1, scale + 1):
        candidates.append(widths[scale - below] ** (2 ** (below - 1)))
    return int(min(candidates) ** (2**depth // 2 ** (scale + 1)))
