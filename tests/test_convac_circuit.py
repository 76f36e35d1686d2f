"""A network's scalar circuit: the same numbers, and the gates that the formulas count."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import structmat as sm
from structmat.circuit import Rationals
from structmat.errors import ShapeError
from structmat.nn import ConvAC, ModeTree
from structmat.nn.convac.semiring import Plain
from structmat.nn.convac.weights import Weights, normal_

F64 = torch.float64
TREES = {
    "cp": ModeTree.sequence(4, 4),
    "pairs": ModeTree.sequence(8),
    "fours": ModeTree.sequence(16, 4),
    "truncated": ModeTree.sequence(8).truncated(2),
    "five": ModeTree.sequence(5),
    "chain": ModeTree.chain(4),
    "mirror": ModeTree.mirror(3, 2),
    "nested": ModeTree.nested(((0, 3), (2, (1, 4)))),
}
EVEN = ("cp", "pairs", "fours", "truncated")
"""Trees whose levels have full windows and read the level below only: those of the formulas."""


def network(tree: ModeTree, widths: object = 3, channels: int = 2, outputs: int = 2, **options: object) -> ConvAC:
    generator = torch.Generator().manual_seed(0)

    def normal(weights: Weights) -> None:
        normal_(weights, generator=generator)

    options.setdefault("initialize", normal)
    return ConvAC(None, tree, widths, outputs, channels=channels, dtype=F64, **options)  # type: ignore[arg-type]


def rows(x: Tensor) -> np.ndarray:
    """Inputs of the circuit, (batch, N M), from representation values (batch, M, N)."""
    return x.transpose(1, 2).flatten(1).numpy()


@pytest.mark.parametrize("sharing", ["shared", "window", "unshared", "recurrent"])
@pytest.mark.parametrize("name", sorted(TREES))
def test_convac_2_three_evaluations_agree(name: str, sharing: str) -> None:
    """Network, circuit, and the tensor contracted with the inputs."""
    tree = TREES[name]
    net = network(tree, sharing=sharing)
    x = torch.randn(3, 2, tree.modes, dtype=F64, generator=torch.Generator().manual_seed(1))
    by_circuit = net.circuit().evaluate(rows(x))
    scores = net(x).detach().numpy()
    assert np.allclose(by_circuit, scores, rtol=1e-12, atol=1e-12 * np.abs(scores).max())
    for y, sample in itertools.product(range(2), range(3)):
        contracted = net.coefficient_tensor(y).detach()
        for mode in range(tree.modes):
            contracted = torch.tensordot(x[sample, :, mode], contracted, dims=([0], [0]))
        assert abs(float(contracted) - by_circuit[sample, y]) <= 1e-12 * np.abs(scores).max()


@pytest.mark.parametrize("sharing", ["shared", "unshared"])
@pytest.mark.parametrize("name", EVEN)
def test_convac_2_gate_counts_are_the_formulas(name: str, sharing: str) -> None:
    tree, channels, outputs = TREES[name], 3, 5
    widths = tuple(4 + level for level in range(len(tree.levels)))
    net = network(tree, widths, channels, outputs, sharing=sharing)
    circuit = net.circuit()
    below, levels = [channels, *widths[:-1]], len(widths)
    windows = [len(level[0]) for level in tree.levels]
    nodes = [tree.modes]
    for window in windows:
        nodes.append(nodes[-1] // window)
    sums = sum(n * r for n, r in zip(nodes, widths, strict=False)) + outputs
    edges = sum(n * r * p for n, r, p in zip(nodes, widths, below, strict=False)) + outputs * widths[-1]
    products = sum(n * r for n, r in zip(nodes[1:], widths, strict=True))
    multiplied = sum((a - b) * r for a, b, r in zip(nodes, nodes[1:], widths, strict=False))
    assert circuit.wide.gates == sums + products
    assert circuit.wide.depth == 2 * levels + 1
    assert circuit.edges == edges + sum(n * r * w for n, r, w in zip(nodes[1:], widths, windows, strict=True))
    assert circuit.multiplications == edges + multiplied == net.macs + net.products
    assert circuit.additions == edges - sums
    assert circuit.counts.gates == edges - sums + multiplied
    # A binary gate of the library multiplies and adds at once: one level less for each weighted sum.
    binary = sum(math.ceil(math.log2(p)) + math.ceil(math.log2(w)) for p, w in zip(below, windows, strict=True))
    assert circuit.depth == binary + math.ceil(math.log2(widths[-1]))


def test_convac_2_the_circuit_is_multilinear_and_its_gradient_has_thrice_the_gates() -> None:
    net = network(ModeTree.sequence(8), 3)
    circuit = network(ModeTree.sequence(8), 3, outputs=1).circuit()
    gradient = circuit.gradient()
    assert gradient.counts.operations <= 3 * circuit.counts.operations
    x = torch.randn(1, 2, 8, dtype=F64, generator=torch.Generator().manual_seed(2))
    moved = x.clone()
    moved[:, :, 5] += 1
    before, after = (gradient.evaluate(rows(v))[0].reshape(8, 2) for v in (x, moved))
    assert np.allclose(before[5], after[5], rtol=1e-12), "linear in each group: its derivative does not depend on it"
    assert not np.allclose(before[4], after[4])
    leaf = x.clone().requires_grad_()
    net(leaf)[0, 0].backward()
    assert leaf.grad is not None
    assert net.circuit().out_features == 2


def test_rational_weights_evaluate_exactly() -> None:
    net = network(ModeTree.sequence(4), 2, outputs=1)
    x = np.array([[1, 2, -3, 1, 0, 5, 2, 2]])
    exact = net.circuit().evaluate(x, Rationals())
    floats = net(torch.from_numpy(x.reshape(1, 4, 2).astype(float)).transpose(1, 2)).detach().numpy()
    assert float(exact[0, 0]) == pytest.approx(floats[0, 0], rel=1e-13)


@pytest.mark.parametrize("constraint", ["none", "simplex"])
@pytest.mark.parametrize("family", [sm.LowRank(1), sm.Kronecker(), sm.Monarch(blocks=2)], ids=str)
def test_structured_weights_bring_their_own_gates(family: sm.Structure, constraint: str) -> None:
    tree = ModeTree.sequence(4)
    net = network(tree, 4, 4, weights=family, sharing="unshared", constraint=constraint, initialize=None)
    x = torch.rand(3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(3))
    assert np.allclose(net.circuit().evaluate(rows(x)), net(x).detach().numpy(), rtol=1e-12)
    if isinstance(family, sm.LowRank) and constraint == "none":
        dense = network(tree, 4, 4, sharing="unshared").circuit()
        # r (in + out) against in out multiplications, for each of the 6 convolutions.
        assert dense.multiplications - net.circuit().multiplications == 6 * (16 - 8)


def test_overlapping_windows_share_gates_and_rectifiers_have_none() -> None:
    tree = ModeTree.overlapping(5, (3,), (2,))
    net = network(tree, 3, sharing="shared")
    x = torch.randn(2, 2, 5, dtype=F64, generator=torch.Generator().manual_seed(4))
    circuit = net.circuit()
    assert np.allclose(circuit.evaluate(rows(x)), net(x).detach().numpy(), rtol=1e-12)
    # 5 places with 3 channels of 2 terms, 3 nodes with 3 channels of 3 terms, 2 outputs of 3 terms.
    assert len(list(tree.edges(0))) > 5, "places are read by two windows, and convolved once"
    assert circuit.additions == 5 * 3 * 1 + 3 * 3 * 2 + 2 * 2
    rectifier = ConvAC(None, ModeTree.sequence(4), 2, channels=2, activation="relu", pooling="max", semiring=Plain())
    with pytest.raises(ShapeError, match="arithmetic circuit"):
        rectifier.circuit()
