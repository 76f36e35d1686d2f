"""Best approximations in hierarchical Tucker format, with their error bound (Grasedyck 2010)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.errors import ShapeError
from structmat.nn.convac.expand import matricize
from structmat.nn.convac.formats import HierarchicalTucker
from structmat.nn.convac.tree import ModeTree

ROUNDING = 1e-14
"""Singular values below this part of the largest are noise: what neither ranks nor a tolerance cut is cut there."""


@dataclass(frozen=True)
class HTApproximation:
    """A hierarchical Tucker tensor near a given one.

    Args:
        tensor: with orthonormal frames; its norm is that of the root's array.
        lower: no tensor with these ranks is nearer (the largest tail of a single node).
        upper: this one is at most that far away (root of the sum of the squared tails).
    """

    tensor: HierarchicalTucker
    lower: float
    upper: float


def ht_svd(
    tensor: Tensor, tree: ModeTree, *, ranks: int | Mapping[int, int] | None = None, tolerance: float | None = None
) -> HTApproximation:
    """Leaves to root: singular vectors of each node's matricisation of what is left of the tensor.

    The error is at most ``sqrt(n)`` times the best in the format, n the number of nodes without the root, the root's
    two children counted once: ``2 N - 3`` for binary trees. Found errors are within a third of the best.

    Args:
        tensor: (M_0, .., M_{N-1}).
        tree: without overlaps.
        ranks: of all nodes, or by node; ``None``: full.
        tolerance: absolute error that may be made in all; the ranks are then as small as that allows.

    Raises:
        ShapeError: the tree has another number of modes, or overlaps.
    """
    if tree.overlaps or tensor.dim() != tree.modes:
        raise ShapeError(f"The tree has {tree.modes} modes and must not overlap; the tensor has {tensor.dim()} axes.")
    share = None if tolerance is None else tolerance / math.sqrt(len(counted(tree)))
    core, present = tensor, list(tree.leaves)  # the node of each axis of the core: leaves in their modes' order
    present = [tree.leaves.index(mode) for mode in range(tree.modes)]
    arrays: list[Tensor | None] = [None] * tree.nodes
    original = core
    for leaf in range(tree.modes):
        unfolded = matricize(original, [tree.leaves[leaf]])
        frame = _frame(unfolded, _rank(ranks, leaf), share)
        arrays[leaf] = frame
        core = _contract(core, present.index(leaf), frame)
    for level, windows in enumerate(tree.levels[:-1]):
        current = core
        for number in range(len(windows)):
            node = tree.starts[level] + number
            children = tree.children(node)
            axes = [present.index(c) for c in children]
            rest = [a for a in range(current.dim()) if a not in axes]
            sizes = [current.shape[a] for a in axes]
            unfolded = current.permute(*axes, *rest).reshape(math.prod(sizes), -1)
            frame = _frame(unfolded, _rank(ranks, node), share)
            arrays[node] = frame.reshape(*sizes, -1)
            # Contract at once: singular vectors of other nodes of the level are those of a nested projection.
            current = (frame.T @ unfolded).reshape(-1, *(current.shape[a] for a in rest))
            present = [node, *(present[a] for a in rest)]
        core = current
    arrays[-1] = core.permute([present.index(c) for c in tree.children(tree.nodes - 1)])
    found = HierarchicalTucker(tree, tuple(a for a in arrays if a is not None))
    tails = node_tails(tensor, found)
    return HTApproximation(found, max(tails.values(), default=0.0), math.sqrt(sum(t * t for t in tails.values())))


def counted(tree: ModeTree) -> list[int]:
    """The nodes whose projections may lose something: all but the root, of two children of the root one."""
    nodes = list(range(tree.nodes - 1))
    top = tree.children(tree.nodes - 1)
    # Their matricisations are transposes of each other: one projection of each, of one loss.
    return [n for n in nodes if len(top) != 2 or n != top[1]]


def node_tails(tensor: Tensor, approximation: HierarchicalTucker) -> dict[int, float]:
    """For each counted node, the root of the sum of the squared singular values beyond its rank."""
    tails = {}
    tree = approximation.tree
    top = tree.children(tree.nodes - 1)
    for node in counted(tree):
        rank = approximation.ranks[node]
        if len(top) == 2 and node == top[0]:
            rank = min(rank, approximation.ranks[top[1]])
        values = torch.linalg.svdvals(matricize(tensor, tree.modes_below(node)))
        tails[node] = float(values[rank:].square().sum().sqrt())
    return tails


def ht_round(
    given: HierarchicalTucker, *, ranks: int | Mapping[int, int] | None = None, tolerance: float | None = None
) -> HierarchicalTucker:
    """The same tensor with orthonormal frames and ranks as small as asked, without writing it out.

    QR decompositions from the leaves to the root, Gram matrices from the root to the leaves. ``O(N (k^4 + M k^2))`` for
    binary trees. Without ranks and tolerance, the ranks become those of the matricisations, up to rounding (Gram
    matrices resolve singular values of the square root of the rounding unit and more).

    Args:
        given: any.
        ranks, tolerance: as for :func:`ht_svd`.
    """
    tree = given.tree
    arrays, triangles = list(given.arrays), list[Tensor]()
    for node in range(tree.nodes):
        array = arrays[node]
        for axis, child in enumerate(tree.children(node)):
            array = torch.tensordot(triangles[child], array, dims=([1], [axis])).movedim(0, axis)
        if node < tree.nodes - 1:
            q, r = torch.linalg.qr(array.flatten(0, -2))
            array = q.reshape(*array.shape[:-1], q.shape[1])
            triangles.append(r)
        arrays[node] = array
    # The Gram matrix of a node is that of the rows of its matricisation in its own orthonormal frame.
    grams: dict[int, Tensor] = {}
    for node in reversed(range(tree.modes, tree.nodes)):
        array = arrays[node]
        weighted = array if node == tree.nodes - 1 else torch.tensordot(array, grams[node], dims=1)
        for axis, child in enumerate(tree.children(node)):
            others = [a for a in range(array.dim()) if a != axis]
            grams[child] = torch.tensordot(weighted, array, dims=(others, others))
    share = None if tolerance is None else tolerance / math.sqrt(len(counted(tree)))
    for node in range(tree.nodes - 1):
        squares, vectors = torch.linalg.eigh((grams[node] + grams[node].T) / 2)
        values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
        kept = vectors[:, : _kept(values, _rank(ranks, node), share, 1e-7)]
        arrays[node] = arrays[node] @ kept
        parent = next(p for p in range(node + 1, tree.nodes) if node in tree.children(p))
        axis = tree.children(parent).index(node)
        arrays[parent] = torch.tensordot(arrays[parent], kept, dims=([axis], [0])).movedim(-1, axis)
    return HierarchicalTucker(tree, tuple(arrays))


def _frame(unfolded: Tensor, rank: int | None, share: float | None) -> Tensor:
    vectors, values, _ = torch.linalg.svd(unfolded, full_matrices=False)
    frame: Tensor = vectors[:, : _kept(values, rank, share, ROUNDING)]
    return frame


def _kept(values: Tensor, rank: int | None, share: float | None, rounding: float) -> int:
    kept = max(1, int((values > rounding * values[0]).sum()))
    if share is not None:
        tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[k]: the error of keeping k
        kept = min(kept, max(1, int((tails > share).sum())))
    return kept if rank is None else min(kept, rank)


def _rank(ranks: int | Mapping[int, int] | None, node: int) -> int | None:
    return ranks if ranks is None or isinstance(ranks, int) else ranks.get(node)


def _contract(core: Tensor, axis: int, frame: Tensor) -> Tensor:
    contracted: Tensor = torch.tensordot(core, frame, dims=([axis], [0]))
    return contracted.movedim(-1, axis)
