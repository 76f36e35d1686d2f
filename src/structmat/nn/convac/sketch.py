"""Ranks in floating point, without forming the matricisation: random functionals that are products over the modes.

S = P A Q^T with k random functionals on each side has rank min(k, rank A) with probability one, and the network gives
all k^2 numbers in one evaluation by broadcasting: nodes below one side only cost k. Weights keep their values, whatever
they are; the price is a tolerance. See :mod:`structmat.nn.convac.modular` for the same without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from structmat.errors import ShapeError
from structmat.nn.convac.expand import fold
from structmat.nn.convac.modular import EXTRA, LARGEST_SKETCH
from structmat.nn.convac.tree import check_partition

if TYPE_CHECKING:
    from structmat.nn.convac.network import ConvAC

TOLERANCE = 1e-11
"""Singular values below this part of the largest are rounding. Rows and columns of the sketch are scaled to one."""

Floats = NDArray[np.float64]


def sketched_rank(
    network: ConvAC, part: Sequence[int], *, output: int = 0, seed: int = 0, tolerance: float = TOLERANCE
) -> int:
    """Rank of a matricisation of these weights; with overlapping windows of the grid tensor on one-hot templates.

    Args:
        network: with product pooling.
        part: modes of one side.
        output: which score.
        seed: of the functionals.
        tolerance: relative to the largest singular value of the scaled sketch.

    Raises:
        ShapeError: more than 2048 functionals on a side are needed, or the network has rectifiers.
    """
    tree, channels = network.tree, network.channels
    if network.pooling.value != "product":
        raise ShapeError("A sketch needs a multilinear network, not a rectifier. Write the grid tensor out instead.")
    inside = check_partition(tree.modes, part)
    rng = np.random.default_rng(seed)
    # With overlaps no cut bounds the rank: the number of tuples of templates on the smaller side does.
    sizes = len(inside), tree.modes - len(inside)
    bound = int(channels ** min(sizes)) if tree.overlaps else network.mincut(part).value
    count = bound + EXTRA
    if count > LARGEST_SKETCH:
        raise ShapeError(
            f"The rank may be as large as {bound}, and a sketch has at most {LARGEST_SKETCH} functionals a side. Use "
            "mincut(part), or a smaller network."
        )
    drawn = rng.standard_normal((tree.modes, count, channels))
    if tree.overlaps:
        drawn = np.eye(channels)[rng.integers(0, channels, (tree.modes, 8 * count))]
    matrices = [
        {k: m.detach().double().cpu().numpy() for k, m in network.edge_matrices(level).items()}
        for level in range(len(tree.levels))
    ]

    def leaf(mode: int) -> Floats:
        return np.asarray(drawn[mode][:, None] if mode in inside else drawn[mode][None])

    root = fold(tree, leaf, lambda l, j, p, x: x @ matrices[l][j, p].T, _multiply)
    row = network.output_matrix()[output].detach().double().cpu().numpy()
    values = np.linalg.svd(_scaled((root @ row)[..., None])[..., 0], compute_uv=False)
    return int((values > tolerance * values[0]).sum())


def _multiply(parts: list[Floats]) -> Floats:
    result = parts[0]
    for part in parts[1:]:
        result = _scaled(result * part)
    return result


def _scaled(array: Floats) -> Floats:
    """(rows, columns, channels) with each row, then each column, divided by its largest number: no rank changes."""
    for axes in ((1, 2), (0, 2)):
        top = np.abs(array).max(axes, keepdims=True)
        array = array / np.where(top > 0, top, 1.0)
    return array
