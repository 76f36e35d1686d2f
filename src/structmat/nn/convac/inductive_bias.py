"""Which dependence a network models well: its ranks over standard partitions of the inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from structmat.errors import ShapeError
from structmat.nn.convac import bounds
from structmat.nn.convac.mincut import lowered_cut
from structmat.nn.convac.weights import Sharing

if TYPE_CHECKING:
    from structmat.nn.convac.network import ConvAC


@dataclass(frozen=True)
class RankBounds:
    """What the theorems say about the rank of a partition.

    Args:
        lower: almost all weights give at least this.
        cut: the minimum cut; all weights give at most this, and generic unshared dense ones exactly this as far as
        known.
        upper: the bound of the theorem; all weights give at most this.
    """

    lower: int
    cut: int
    upper: int


def rank_bounds(network: ConvAC, part: Sequence[int]) -> RankBounds:
    """The bounds of a network's architecture for one partition.

    With structured weights no lower bound beyond 1 is known. With shared weights that of theorem 1 holds, and the one
    by lowered capacities is left out.

    Raises:
        ShapeError: overlapping windows, for which only ``rank(part)`` exists.
    """
    tree, channels, widths = network.tree, network.channels, network.widths
    cut = network.mincut(part).value
    upper = bounds.upper_bound(tree, channels, widths, part)
    if network.structure is not None:
        return RankBounds(1, cut, upper)
    lower = bounds.lower_bound(tree, channels, widths, part)
    if all(s is Sharing.UNSHARED for s in network.sharing):
        lower = max(lower, lowered_cut(tree, channels, widths, part))
    if len(widths) == 1 and network.sharing[0] is Sharing.SHARED:
        # Shared filters of a shallow network give symmetric tensors.
        shared = bounds.shallow_bound(channels, widths[0], tree.modes, part, shared=True)
        return RankBounds(min(lower, shared), min(cut, shared), min(upper, shared))
    return RankBounds(lower, cut, upper)


def standard_partitions(shape: int | tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Partitions by name, each as the modes of one side.

    Args:
        shape: number of modes of a sequence, or (height, width) of an image.
    """
    if isinstance(shape, int):
        places = range(shape)
        found = {"halves": tuple(range(shape // 2)), "even | odd": tuple(range(0, shape, 2))}
        scale = 2
        while 2 * scale < shape:
            found[f"blocks of {scale}"] = tuple(i for i in places if i // scale % 2 == 0)
            scale *= 2
        # Pairs of a place and its reflection end up on one side; the mirror partition separates every pair's neighbors.
        found["mirror"] = tuple(i for i in places if min(i, shape - 1 - i) % 2 == 0)
        found["centre | rim"] = tuple(i for i in places if shape // 4 <= i < shape - shape // 4)
        return found
    height, width = shape
    grid = [(i, j) for i in range(height) for j in range(width)]

    def those(test: list[bool]) -> tuple[int, ...]:
        return tuple(mode for mode, chosen in enumerate(test) if chosen)

    found = {
        "left | right": those([j < width // 2 for _, j in grid]),
        "top | bottom": those([i < height // 2 for i, _ in grid]),
        "even | odd columns": those([j % 2 == 0 for _, j in grid]),
    }
    scale = 1
    while scale < max(height, width):
        found[f"checkerboard of {scale}"] = those([(i // scale + j // scale) % 2 == 0 for i, j in grid])
        scale *= 2
    found["mirror"] = those([(min(i, height - 1 - i) + min(j, width - 1 - j)) % 2 == 0 for i, j in grid])
    inner_rows = range(height // 4, height - height // 4)
    inner_columns = range(width // 4, width - width // 4)
    found["centre | rim"] = those([i in inner_rows and j in inner_columns for i, j in grid])
    return {name: part for name, part in found.items() if 0 < len(part) < height * width}


@dataclass(frozen=True)
class InductiveBias:
    """Bounds of the ranks of partitions by name; printed as a table of base-2 logarithms."""

    rows: Mapping[str, RankBounds]

    def __str__(self) -> str:
        wide = max(map(len, self.rows), default=0)
        lines = [f"{'partition':<{wide}}  log2 rank: at least, minimum cut, at most"]
        for name, row in self.rows.items():
            lines.append(f"{name:<{wide}}  {_bits(row.lower):>8} {_bits(row.cut):>8} {_bits(row.upper):>8}")
        return "\n".join(lines)


def _bits(value: int) -> str:
    return f"{math.log2(value):.1f}"


def inductive_bias(
    network: ConvAC,
    shape: int | tuple[int, int] | None = None,
    partitions: Mapping[str, Sequence[int]] | None = None,
) -> InductiveBias:
    """The ranks that a network's architecture can reach over standard partitions, or over given ones.

    A partition with a rank exponential in the number of patches is one over which the network can model dependence; the
    tree decides which (Cohen and Shashua, ICLR 2017).

    Args:
        network: without overlaps.
        shape: of the inputs, by default a sequence.
        partitions: by name, instead of the standard ones.

    Raises:
        ShapeError: the shape has another number of places than the network has modes.
    """
    modes = network.tree.modes
    shape = modes if shape is None else shape
    if (shape if isinstance(shape, int) else shape[0] * shape[1]) != modes:
        raise ShapeError(f"The network has {modes} modes; the shape {shape} has another number of places.")
    chosen = standard_partitions(shape) if partitions is None else partitions
    return InductiveBias({name: rank_bounds(network, part) for name, part in chosen.items()})
