"""The scalar circuit of a network: weighted sums and products on its mode tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from structmat.circuit import Builder, Circuit
from structmat.errors import ShapeError
from structmat.nn.convac.weights import EdgeMap, Weights

if TYPE_CHECKING:
    from structmat.nn.convac.network import ConvAC

Ints = NDArray[np.int64]


def scalar_circuit(network: ConvAC) -> Circuit:
    """The circuit that computes a network's scores from representation values, gate by gate.

    Inputs: N M numbers, ``rep(i, d)`` at ``i M + d`` (modes in their own order); one output for each score. Dense
    weights with n_l nodes below the windows of level l give ``sum_l n_l r_l + Y`` weighted sums with ``sum_l n_l r_l
    r_{l-1} + Y r_{L-1}`` edges, and ``sum_l n_{l+1} r_l`` products, of depth ``2 L + 1``; structured weights put the
    family's own gates in place of the sums of a convolution. Weights are constants of the circuit, in float64.

    Args:
        network: with product pooling; overlapping windows too. Its semiring does not matter (normalised networks have
            the circuit of the scores before normalisation).

    Raises:
        ShapeError: the network has rectifiers.
        CircuitError: a family whose program is not made of polynomial operations.
    """
    tree = network.tree
    if network.pooling.value != "product":
        raise ShapeError("A rectifier network has no arithmetic circuit: a maximum is neither a sum nor a product.")
    builder = Builder(tree.modes * network.channels)
    inputs = builder.inputs.reshape(tree.modes, network.channels)
    values: dict[int, Ints] = {-1: inputs[list(tree.leaves)]}
    for level, windows in enumerate(tree.levels):
        edges, convolved = list(tree.edges(level)), dict[tuple[int, int], Ints]()
        maps = network.layers[level]
        assert isinstance(maps, nn.ModuleList)
        for source, edge_map in zip(network._sources[level], maps, strict=True):
            assert isinstance(edge_map, EdgeMap)
            mine = [e for e in edges if tree.level_of(e.node) == source]
            for edge, nodes in zip(mine, _convolution(builder, edge_map, values[source]), strict=True):
                convolved[edge.window, edge.position] = nodes
        factors = [
            np.stack([convolved[number, p] for p, child in enumerate(window) if child >= 0], -1)
            for number, window in enumerate(windows)
        ]
        # A window of one child multiplies nothing.
        values[level] = np.stack([f[:, 0] if f.shape[1] == 1 else builder.products(f) for f in factors])
    (scores,) = _convolution(builder, network.output, values[len(tree.levels) - 1])
    return builder.build(scores)


def _convolution(builder: Builder, edge_map: EdgeMap, below: Ints) -> list[Ints]:
    """The nodes (out,) of each edge; edges that read one location with one matrix share their gates."""
    sources: list[int] = edge_map.get_buffer("source").tolist()
    asked = list(zip(edge_map.slot.index, sources, strict=True))
    found: dict[tuple[int, int], Ints] = {}
    for copy in range(edge_map.slot.copies):
        places = sorted({source for number, source in asked if number == copy})
        nodes = _multiplied(builder, edge_map.weights, copy, below[places])
        found |= {(copy, place): row for place, row in zip(places, nodes, strict=True)}
    return [found[key] for key in asked]


def _multiplied(builder: Builder, weights: Weights, copy: int, vectors: Ints) -> Ints:
    """Matrix times vectors (locations, in): nodes (locations, out)."""
    if weights.structure is None:
        matrix = weights.dense()[copy].detach().double().cpu().numpy()
        operands = np.broadcast_to(vectors[:, None, :], (len(vectors), *matrix.shape))
        return builder.sums(operands, matrix)
    return builder.apply(_family_circuit(weights, copy), vectors)


def _family_circuit(weights: Weights, copy: int) -> Circuit:
    """The family's own linear circuit for one matrix."""
    from structmat.circuit.torch_trace import trace_torch

    def column(x: Tensor) -> Tensor:
        return weights.multiply_one(copy, x.unsqueeze(1)).squeeze(1)

    with torch.no_grad():
        return trace_torch(column, weights.shape[1])
