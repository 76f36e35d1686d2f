"""Networks to tensor decompositions and back."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError
from structmat.nn.convac.expand import check_multilinear
from structmat.nn.convac.formats import CP, HierarchicalTucker, TensorTrain
from structmat.nn.convac.network import ConvAC
from structmat.nn.convac.tree import Edge, ModeTree
from structmat.nn.convac.weights import EdgeMap, Sharing


def to_cp(network: ConvAC, output: int = 0) -> CP:
    """A shallow network as the CP tensor that it is.

    Raises:
        ShapeError: the network has more than one level; write its tensor out and use :func:`fit_cp`.
    """
    check_multilinear(network)
    if len(network.tree.levels) != 1:
        raise ShapeError(
            f"A network of {len(network.tree.levels)} levels is no CP tensor of its own width. Write the tensor out "
            "and approximate it with fit_cp."
        )
    matrices = network.edge_matrices(0)
    by_mode = {network.tree.leaves[e.node]: matrices[e.window, e.position].T for e in network.tree.edges(0)}
    return CP(network.output_matrix()[output], tuple(by_mode[m] for m in range(network.tree.modes)))


def to_ht(network: ConvAC, output: int = 0) -> HierarchicalTucker:
    """A network on a tree as hierarchical Tucker: transfer tensors that are diagonal in the children, times a matrix.

    Orthogonalise and truncate it with :func:`ht_round`: its ranks then are those of the matricisations.
    """
    check_multilinear(network)
    tree = network.tree
    above = {
        edge.node: network.edge_matrices(level)[edge.window, edge.position]
        for level in range(len(tree.levels))
        for edge in tree.edges(level)
    }
    arrays = []
    for node in range(tree.nodes):
        if node < tree.modes:
            arrays.append(above[node].T)
            continue
        row = network.output_matrix()[output : output + 1] if node == tree.nodes - 1 else above[node]
        copies = len(tree.children(node))
        width = row.shape[1]
        array = row.new_zeros(*(width,) * copies, row.shape[0])
        places = torch.arange(width)
        array[(places,) * copies] = row.T
        arrays.append(array.squeeze(-1) if node == tree.nodes - 1 else array)
    return HierarchicalTucker(tree, tuple(arrays))


def to_tensor_train(network: ConvAC, output: int = 0) -> TensorTrain:
    """A network on a chain tree as the tensor-train that it is: ``G[a, d, b] = U[b, a] V[b, d]``.

    Raises:
        ShapeError: the tree is no ``ModeTree.chain``.
    """
    check_multilinear(network)
    tree = network.tree
    if tree.modes < 2 or tree != ModeTree.chain(tree.modes):
        raise ShapeError("Only a network on ModeTree.chain(N) is a tensor-train. Convert others by to_ht.")
    levels = [network.edge_matrices(level) for level in range(len(tree.levels))]
    cores = [levels[0][0, 0].T.unsqueeze(0)]
    for level, matrices in enumerate(levels):
        into = matrices[0, 1]
        state = torch.eye(into.shape[0], dtype=into.dtype) if level == 0 else matrices[0, 0]
        cores.append(torch.einsum("ba,bd->adb", state, into))
    last = cores[-1] @ network.output_matrix()[output].unsqueeze(-1)
    return TensorTrain((*cores[:-1], last))


def from_cp(cp: CP, tree: ModeTree | None = None) -> ConvAC:
    """The network of a CP tensor: shallow, or on a tree with identity filters above the first convolutions.

    Args:
        cp: with modes of one size.
        tree: by default the shallow one.

    Raises:
        ShapeError: the modes differ in size or number.
    """
    sizes = {f.shape[0] for f in cp.factors}
    modes = len(cp.factors)
    tree = ModeTree.sequence(modes, max(2, modes)) if tree is None else tree
    if len(sizes) != 1 or tree.modes != modes:
        raise ShapeError(
            f"The network needs {tree.modes} modes of one size; the tensor has {modes} of sizes {sorted(sizes)}."
        )

    def matrix(edge: Edge) -> Tensor:
        leaf = edge.node < tree.modes
        return cp.factors[tree.leaves[edge.node]].T if leaf else torch.eye(cp.terms, dtype=cp.weights.dtype)

    return _network(tree, sizes.pop(), (cp.terms,) * len(tree.levels), {e: matrix(e) for e in _edges(tree)}, cp.weights)


def from_ht(given: HierarchicalTucker) -> ConvAC:
    """A network with the same tensor, exactly: a node with children of ranks k_1, .., k_w gets their product of
    channels.

    A transfer tensor is not diagonal in its children; channel (a_1, .., a_w) takes channel a_i of child i, so that the
    product of the children is all their products, and the next convolution is the transfer tensor as a matrix.
    """
    tree = given.tree
    widths = [
        max(
            math.prod(given.arrays[c].shape[-1] for c in tree.children(tree.starts[level] + n))
            for n in range(len(windows))
        )
        for level, windows in enumerate(tree.levels)
    ]
    matrices = {}
    for edge in _edges(tree):
        parent = tree.starts[edge.level] + edge.window
        children = tree.children(parent)
        array = given.arrays[edge.node]
        rows = array.flatten(0, -2).T if edge.node >= tree.modes else array.T  # (rank, channels of the child)
        place = children.index(edge.node)
        channels = itertools.product(*(range(given.arrays[c].shape[-1]) for c in children))
        copied = torch.stack([rows[channel[place]] for channel in channels])
        fan_in = given.arrays[0].shape[0] if edge.node < tree.modes else widths[tree.level_of(edge.node)]
        full = copied.new_zeros(widths[edge.level], fan_in)
        full[: copied.shape[0], : copied.shape[1]] = copied
        matrices[edge] = full
    sizes = {given.arrays[leaf].shape[0] for leaf in range(tree.modes)}
    if len(sizes) != 1:
        raise ShapeError(f"A network's modes have one size; the tensor has modes of sizes {sorted(sizes)}.")
    root = given.arrays[-1].flatten()
    return _network(
        tree, sizes.pop(), tuple(widths), matrices, torch.nn.functional.pad(root, (0, widths[-1] - len(root)))
    )


def from_tensor_train(given: TensorTrain) -> ConvAC:
    """A network on a chain tree with the same tensor, exactly, of width ``r M``: channel (a, d) is ``h[a] rep[d]``.

    Raises:
        ShapeError: fewer than two modes, or modes of different sizes.
    """
    sizes = {c.shape[1] for c in given.cores}
    modes = len(given.cores)
    if len(sizes) != 1 or modes < 2:
        raise ShapeError(f"A chain network needs two or more modes of one size; got {modes} of sizes {sorted(sizes)}.")
    size, tree, dtype = sizes.pop(), ModeTree.chain(modes), given.cores[0].dtype
    widths = [core.shape[0] * size for core in given.cores[1:]]
    matrices = {}
    for edge in _edges(tree):
        core = given.cores[edge.level + 1]
        rank = core.shape[0]
        if edge.position == 1:
            matrices[edge] = torch.eye(size, dtype=dtype).repeat(rank, 1)
        else:
            # The state h of rank r, from the channels below: the core before this one as a matrix.
            before = given.cores[edge.level].flatten(0, 1).T
            matrices[edge] = before.repeat_interleave(size, 0)
    return _network(tree, size, tuple(widths), matrices, given.cores[-1].flatten())


def _edges(tree: ModeTree) -> list[Edge]:
    return [edge for level in range(len(tree.levels)) for edge in tree.edges(level)]


def _network(
    tree: ModeTree, channels: int, widths: tuple[int, ...], matrices: dict[Edge, Tensor], output: Tensor
) -> ConvAC:
    """An unshared network with given matrices."""
    made = ConvAC(
        None, tree, widths, channels=channels, sharing=Sharing.UNSHARED, dtype=output.dtype, initialize=lambda w: None
    )
    for level in range(len(tree.levels)):
        maps = made.layers[level]
        assert isinstance(maps, nn.ModuleList)
        edges = list(tree.edges(level))
        for source, edge_map in zip(made._sources[level], maps, strict=True):
            assert isinstance(edge_map, EdgeMap)
            mine = [matrices[e] for e in edges if tree.level_of(e.node) == source]
            edge_map.weights.set_dense(torch.stack(mine).detach())
    made.output.weights.set_dense(output.detach().reshape(1, 1, -1))
    return made
