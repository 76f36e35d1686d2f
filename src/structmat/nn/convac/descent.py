"""The way down a generative network: hidden labels from the class to the leaves, drawn or most probable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structmat.nn.convac.network import ConvAC
from structmat.nn.convac.semiring import Semiring, State
from structmat.nn.convac.weights import EdgeMap

Choose = Callable[[Tensor], Tensor]
"""Log weights (..., channels), not normalised, to indices (...)."""


@dataclass(frozen=True)
class Draw:
    """Indices with probability proportional to the exponentials of log weights.

    Args:
        generator: source of randomness.
    """

    generator: torch.Generator | None = None

    def __call__(self, logs: Tensor) -> Tensor:
        """(..., channels) to (...)."""
        noise = torch.rand(logs.shape, generator=self.generator, dtype=torch.float64).clamp(min=1e-300)
        # The maximum of log weights plus Gumbel noise is a draw from their softmax.
        return (logs.double() - (-noise.log()).log()).argmax(-1)


def largest(logs: Tensor) -> Tensor:
    """The index of the largest."""
    return logs.argmax(-1)


def ascend(network: ConvAC, x: Tensor, semiring: Semiring | None = None) -> tuple[dict[int, Tensor], Tensor]:
    """Log states of all levels (-1: the leaves, in tree order), and scores (Y, batch)."""
    given, states = network.semiring, dict[int, Tensor]()
    network.semiring = semiring or given
    try:
        leaves = network.lift(x)
        states[-1] = leaves.value

        def keep(level: int, state: State) -> State:
            states[level] = state.value
            return state

        scores = network.evaluate(leaves, keep).value.squeeze(1)
    finally:
        network.semiring = given
    return states, scores


def descend(network: ConvAC, classes: Tensor, states: dict[int, Tensor] | None, choose: Choose) -> Tensor:
    """Hidden labels of the inputs (batch, N), in the modes' order.

    A node whose channel is g hands it to its children; a child chooses its own channel a by the weight from a to g
    times its own state. Without states (nothing observed) all states are one.

    Args:
        network: with simplex weights, on a tree.
        classes: (batch,).
        states: as :func:`ascend` gives them.
        choose: how to pick.
    """
    tree = network.tree
    rows = network.output.weights.log_dense()[0][classes]  # (batch, r)
    top = len(tree.levels) - 1
    root = choose(rows if states is None else rows + states[top][:, 0].T)
    chosen: dict[int, Tensor] = {top: root.unsqueeze(1)}  # (batch, locations)
    for level in reversed(range(top + 1)):
        edges, maps = list(tree.edges(level)), network.layers[level]
        assert isinstance(maps, nn.ModuleList)
        for source, edge_map in zip(network._sources[level], maps, strict=True):
            assert isinstance(edge_map, EdgeMap)
            mine = [e for e in edges if tree.level_of(e.node) == source]
            channel = chosen[level][:, [e.window for e in mine]]
            read = edge_map.get_buffer("source")
            logs = edge_map.weights.log_dense()[torch.tensor(edge_map.slot.index), channel]  # (batch, edges, in)
            if states is not None:
                logs = logs + states[source][:, read].permute(2, 1, 0)
            if source not in chosen:
                places = tree.modes if source < 0 else len(tree.levels[source])
                chosen[source] = torch.zeros(len(classes), places, dtype=torch.int64)
            chosen[source][:, read] = choose(logs)
    return chosen[-1][:, network.get_buffer("order").argsort()]
