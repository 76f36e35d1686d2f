"""A picture of a mode tree and a cut through it, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

from structmat.errors import ShapeError
from structmat.nn.convac.mincut import Cut
from structmat.nn.convac.tree import ModeTree, check_partition

LARGEST = 256
"""Leaves beyond which a picture shows nothing."""

STEP, RISE, MARGIN, DOT = 26, 48, 24, 6
SIDES = ("#1b6ca8", "#d1782c")
CUT = "#c0262d"


def draw_cut(tree: ModeTree, part: Sequence[int] = (), cut: Cut | None = None) -> str:
    """The tree as SVG: leaves colored by their side, what the cut severs ringed in red.

    Args:
        tree: of at most 256 leaves.
        part: the modes of one side.
        cut: of that partition, or ``None`` for the tree alone.

    Raises:
        ShapeError: more than 256 leaves, or ``part`` does not list modes.
    """
    if tree.modes > LARGEST:
        raise ShapeError(f"A picture shows at most {LARGEST} leaves; the tree has {tree.modes}.")
    inside = check_partition(tree.modes, part)
    depth = len(tree.levels)
    across = [float(MARGIN + STEP * place) for place in range(tree.modes)]
    for node in range(tree.modes, tree.nodes):
        children = tree.children(node)
        across.append(sum(across[c] for c in children) / len(children))
    down = [MARGIN + RISE * (depth - 1 - tree.level_of(node)) for node in range(tree.nodes)]
    width, height = 2 * MARGIN + STEP * (tree.modes - 1), 2 * MARGIN + RISE * depth + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" text-anchor="middle">',
        f"<title>{_caption(tree, cut)}</title>",
    ]
    severed = frozenset(cut.nodes) if cut else frozenset[int]()
    for node in range(tree.modes, tree.nodes):
        for child in tree.children(node):
            color = SIDES[cut.sides[child]] if cut else "#888888"
            lines.append(
                f'<line x1="{across[node]:.1f}" y1="{down[node]}" x2="{across[child]:.1f}" y2="{down[child]}" '
                f'stroke="{color}" stroke-width="1.5"/>'
            )
    for node in range(tree.nodes):
        leaf = node < tree.modes
        color = SIDES[0 if tree.leaves[node] in inside else 1] if leaf and part else "#444444"
        ring = f' stroke="{CUT}" stroke-width="3"' if node in severed else ""
        lines.append(f'<circle cx="{across[node]:.1f}" cy="{down[node]}" r="{DOT}" fill="{color}"{ring}/>')
        if leaf:
            lines.append(f'<text x="{across[node]:.1f}" y="{down[node] + 20}">{tree.leaves[node]}</text>')
    return "\n".join([*lines, "</svg>"])


def _caption(tree: ModeTree, cut: Cut | None) -> str:
    words = f"{tree.modes} modes, {len(tree.levels)} levels"
    return words if cut is None else f"{words}; minimum cut {cut.value}, {len(cut.nodes)} nodes severed"
