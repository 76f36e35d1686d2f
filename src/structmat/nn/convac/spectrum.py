"""Singular values of matricisations of networks with a thousand patches.

The tiles of a partition (maximal nodes on one side) enter the matricisation only through the r tensors of their
channels, so that a tile can be replaced by the triangular factor of a QR decomposition: it multiplies by orthonormal
columns, which leaves singular values alone. Halves then are an r x r matrix for any N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from structmat.errors import ShapeError
from structmat.nn.convac.expand import check_multilinear, fold
from structmat.nn.convac.tree import check_partition

if TYPE_CHECKING:
    from structmat.nn.convac.network import ConvAC

LARGEST = 2**24
"""Entries of the arrays of nodes with modes of both sides."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matricisation for orthonormal representation functions.

    Args:
        values: descending, of Euclidean norm one (or all zero).
        log_norm: logarithm of the norm of the tensor: it may be no float.
    """

    values: Floats
    log_norm: float

    @property
    def entropy(self) -> float:
        """``-sum p log p`` with ``p`` the squared values: the entanglement entropy of the partition, in nats."""
        p = self.values**2
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    @property
    def distance(self) -> float:
        """Normalised L2 distance to the separable functions, ``sqrt(1 - sigma_1^2 / sum sigma^2)``."""
        return math.sqrt(max(0.0, 1.0 - float(self.values[0]) ** 2))

    def tail(self, rank: int) -> float:
        """Relative error that any approximation of at most that separation rank makes (Eckart and Young 1936)."""
        return float(np.sqrt((self.values[rank:] ** 2).sum()))

    def rank(self, tolerance: float | None = None) -> int:
        """Values above ``tolerance`` times the largest, by default size times the rounding unit."""
        limit = len(self.values) * np.finfo(np.float64).eps if tolerance is None else tolerance
        return int((self.values > limit * self.values[0]).sum())


@dataclass(frozen=True)
class _Node:
    """An array (rows, columns, channels) times ``exp(log)``."""

    array: Floats
    log: float


def separation_spectrum(network: ConvAC, part: Sequence[int], output: int = 0) -> Spectrum:
    """Singular values of the matricisation ``part`` | rest of the coefficient tensor.

    Args:
        network: multilinear.
        part: the modes of one side.
        output: which score.

    Raises:
        ShapeError: there is no coefficient tensor, or the partition splits so many nodes that 2^24 entries do not hold
            a node's array.
    """
    check_multilinear(network)
    tree = network.tree
    inside = check_partition(tree.modes, part)
    matrices = [
        {k: m.detach().double().cpu().numpy() for k, m in network.edge_matrices(level).items()}
        for level in range(len(tree.levels))
    ]
    eye = np.eye(network.channels)

    def leaf(mode: int) -> _Node:
        return _Node(eye[:, None] if mode in inside else eye[None], 0.0)

    root = fold(tree, leaf, lambda l, j, p, x: _Node(x.array @ matrices[l][j, p].T, x.log), _multiply)
    row = network.output_matrix()[output].detach().double().cpu().numpy()
    values = np.linalg.svd(root.array @ row, compute_uv=False)
    norm = float(np.linalg.norm(values))
    return Spectrum(values / norm, root.log + math.log(norm)) if norm else Spectrum(values, -math.inf)


def _multiply(parts: list[_Node]) -> _Node:
    result = parts[0]
    for part in parts[1:]:
        a, b = result.array, part.array
        shape = (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1], a.shape[2])
        if math.prod(shape) > LARGEST:
            raise ShapeError(
                f"The partition splits so many nodes that one has an array of {shape}, more than 2^24 entries. The "
                "method is for partitions of few tiles; use rank(part) or mincut(part)."
            )
        product = (a[:, None, :, None] * b[None, :, None, :]).reshape(shape)
        result = _compress(_Node(product, result.log + part.log))
    return result


def _compress(node: _Node) -> _Node:
    """Fewer rows and columns by orthogonal factors, and size near one."""
    array = node.array
    rows, columns, channels = array.shape
    if rows > columns * channels:
        array = _triangle(array.reshape(rows, -1)).reshape(-1, columns, channels)
    rows = array.shape[0]
    if columns > rows * channels:
        turned = _triangle(array.transpose(1, 0, 2).reshape(columns, -1))
        array = turned.reshape(-1, rows, channels).transpose(1, 0, 2)
    size = float(np.abs(array).max())
    if size == 0.0:
        return _Node(array, node.log)
    return _Node(array / size, node.log + math.log(size))


def _triangle(matrix: Floats) -> Floats:
    return np.asarray(np.linalg.qr(matrix, mode="reduced")[1])
