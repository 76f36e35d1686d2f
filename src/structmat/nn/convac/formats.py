"""Tensor formats: CP, hierarchical Tucker and tensor-train, as values that can be written out.

Conventions are TensorLy's where it has the format. Its CP tensor is the pair ``(weights, factors)``, its tensor-train
the list of cores: :meth:`CP.as_tuple` and :meth:`TensorTrain.as_list` give them to all of its functions, and
:meth:`CP.of` and :meth:`TensorTrain.of` take its ``CPTensor`` and ``TTTensor``. It has no hierarchical Tucker.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structmat.errors import ShapeError
from structmat.nn.convac.tree import ModeTree


@dataclass(frozen=True)
class CP:
    """``T = sum_z weights[z] factors[0][:, z] (x) .. (x) factors[N-1][:, z]``.

    Args:
        weights: (Z,).
        factors: N of (M_i, Z).

    Raises:
        ShapeError: the numbers of terms differ.
    """

    weights: Tensor
    factors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        terms = {self.weights.shape[-1], *(f.shape[-1] for f in self.factors)}
        if not self.factors or len(terms) != 1 or self.weights.dim() != 1:
            raise ShapeError(
                f"Weights (Z,) and factors (M, Z) of a CP tensor share Z; got {tuple(self.weights.shape)} and "
                f"{[tuple(f.shape) for f in self.factors]}."
            )

    @property
    def terms(self) -> int:
        """Z."""
        return int(self.weights.shape[0])

    def as_tuple(self) -> tuple[Tensor, list[Tensor]]:
        """What TensorLy takes for a CP tensor."""
        return self.weights, list(self.factors)

    @classmethod
    def of(cls, given: Iterable[Any]) -> CP:
        """From TensorLy's ``CPTensor``, or the pair; weights may be ``None``: ones.

        Raises:
            ShapeError: as for the class.
        """
        weights, factors = given
        found = tuple(torch.as_tensor(f) for f in factors)
        ones = found[0].new_ones(found[0].shape[-1]) if found else torch.ones(1)
        return cls(ones if weights is None else torch.as_tensor(weights), found)

    def to_tensor(self) -> Tensor:
        """Written out, (M_0, .., M_{N-1})."""
        result = self.weights.unsqueeze(0)
        for factor in self.factors:
            result = (result[:, None] * factor[None]).flatten(0, 1)
        return result.sum(-1).reshape([f.shape[0] for f in self.factors])


@dataclass(frozen=True)
class TensorTrain:
    """``T[d_0..] = G_0[d_0] G_1[d_1] .. G_{N-1}[d_{N-1}]``, a product of matrices.

    Args:
        cores: N of (r_{k-1}, M_k, r_k) with r_0 = r_N = 1.

    Raises:
        ShapeError: the ranks of neighbors differ.
    """

    cores: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        shapes = [tuple(c.shape) for c in self.cores]
        ends = [1, *(s[-1] for s in shapes)]
        if not shapes or any(len(s) != 3 for s in shapes) or [s[0] for s in shapes] != ends[:-1] or ends[-1] != 1:
            raise ShapeError(f"Tensor-train cores have shapes (1, M, r), (r, M, s), .., (t, M, 1); got {shapes}.")

    def as_list(self) -> list[Tensor]:
        """What TensorLy takes for a tensor-train."""
        return list(self.cores)

    @classmethod
    def of(cls, given: Iterable[Any]) -> TensorTrain:
        """From TensorLy's ``TTTensor``, or the list of cores.

        Raises:
            ShapeError: as for the class.
        """
        return cls(tuple(torch.as_tensor(core) for core in given))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks between neighbors, N - 1 of them."""
        return tuple(int(c.shape[2]) for c in self.cores[:-1])

    def to_tensor(self) -> Tensor:
        """Written out."""
        result = self.cores[0]
        for core in self.cores[1:]:
            result = torch.tensordot(result, core, dims=1)
        return result.squeeze(0).squeeze(-1)


@dataclass(frozen=True)
class HierarchicalTucker:
    """A tensor whose every node's matricisation has a frame that is built from its children's frames.

    Args:
        tree: any without overlaps and without empty positions to skip.
        arrays: for each node of the tree. A leaf: its frame (M, k). An inner node: the transfer tensor (k_1, .., k_w,
            k) of its children and itself. The root: (k_1, .., k_w).

    Raises:
        ShapeError: an array does not fit its children.
    """

    tree: ModeTree
    arrays: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if self.tree.overlaps or len(self.arrays) != self.tree.nodes:
            raise ShapeError(
                f"Hierarchical Tucker takes a tree without overlaps and an array for each of its {self.tree.nodes} "
                f"nodes; "
                f"got {len(self.arrays)}."
            )
        for node in range(self.tree.modes, self.tree.nodes):
            expected = tuple(self.arrays[c].shape[-1] for c in self.tree.children(node))
            shape = tuple(self.arrays[node].shape)
            if shape[: len(expected)] != expected or len(shape) != len(expected) + (node < self.tree.nodes - 1):
                raise ShapeError(f"The array of node {node} has shape {shape}; its children have ranks {expected}.")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each node but the root."""
        return tuple(int(a.shape[-1]) for a in self.arrays[:-1])

    def frames(self) -> list[Tensor]:
        """The frame of each node but the root, (entries of its modes as a walk meets them, rank).

        Last comes the tensor, (.., 1).
        """
        found = list(self.arrays[: self.tree.modes])
        for node in range(self.tree.modes, self.tree.nodes):
            array = self.arrays[node]
            if node == self.tree.nodes - 1:
                array = array.unsqueeze(-1)
            for child in self.tree.children(node):
                # The first axis is the next child's: its frame's entries go to the end.
                array = torch.tensordot(array, found[child], dims=([0], [1]))
            rank, *sizes = array.shape
            found.append(array.reshape(rank, math.prod(sizes)).T)
        return found

    def to_tensor(self) -> Tensor:
        """Written out, modes in their own order."""
        order = walk(self.tree)
        sizes = [self.arrays[self.tree.leaves.index(mode)].shape[0] for mode in order]
        tensor = self.frames()[-1].reshape(sizes)
        return tensor.permute([order.index(mode) for mode in range(len(order))])


def walk(tree: ModeTree, node: int | None = None) -> list[int]:
    """The modes below a node (by default the root) in the order in which a walk meets them."""
    pending, found = [tree.nodes - 1 if node is None else node], list[int]()
    while pending:
        current = pending.pop()
        if current < tree.modes:
            found.append(tree.leaves[current])
        pending += reversed(tree.children(current))
    return found
