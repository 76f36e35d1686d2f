"""Forward pass, coefficient tensor and counts of convolutional arithmetic circuits."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from market import proposals
from torch import Tensor

import structmat as sm
from structmat.errors import ShapeError, StructmatError, StructureError
from structmat.nn import ConvAC, ModeTree, TensorialMixture
from structmat.nn.convac.expand import fold, grid_tensor, matricize
from structmat.nn.convac.options import UNSUPPORTED
from structmat.nn.convac.recurrent import RecurrentConvAC
from structmat.nn.convac.representation import OneHot
from structmat.nn.convac.semiring import Log, MaxProduct, Plain, RootMeanSquare, Scaled, Semiring, SignedLog
from structmat.nn.convac.weights import Weights, normal_

F64 = torch.float64

TREES = {
    "cp": ModeTree.sequence(4, 4),
    "pairs": ModeTree.sequence(4),
    "five": ModeTree.sequence(5),
    "fours": ModeTree.sequence(8, 4),
    "truncated": ModeTree.sequence(8).truncated(2),
    "chain": ModeTree.chain(4),
    "nested": ModeTree.nested(((0, 3), (2, (1, 4)))),
    "square": ModeTree.square(2, 3),
    "mirror": ModeTree.mirror(3, 2),
    "rows": ModeTree.alternating(2, 3),
    "dilated": ModeTree.dilated((1, 0)),
}
OVERLAPPING = ModeTree.overlapping(5, (3,), (2,))
SHARINGS = ("shared", "window", "unshared", "recurrent")


def network(
    tree: ModeTree, channels: int = 2, width: int = 3, outputs: int = 2, seed: int = 0, **options: object
) -> ConvAC:
    generator = torch.Generator().manual_seed(seed)
    options.setdefault("initialize", lambda w: normal_(w, generator=generator))
    return ConvAC(None, tree, width, outputs, channels=channels, dtype=F64, **options)  # type: ignore[arg-type]


def one_hot_inputs(channels: int, modes: int) -> Tensor:
    """All M^N inputs (batch, M, N), in C order of the modes."""
    digits = torch.tensor(list(itertools.product(range(channels), repeat=modes)))
    return torch.nn.functional.one_hot(digits, channels).transpose(1, 2).to(F64)


def check_entries(net: ConvAC) -> None:
    """One-hot inputs give all M^N entries of the tensors."""
    scores = net(one_hot_inputs(net.channels, net.tree.modes)).detach()
    for y in range(net.outputs):
        tensor = net.coefficient_tensor(y).detach().flatten()
        assert float((scores[:, y] - tensor).abs().max()) <= 1e-12 * float(tensor.abs().max())


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", ["CP", "deep, windows of 2", "deep, windows of 4", "truncated", "chain"])
@pytest.mark.parametrize(("modes", "channels"), [(4, 2), (4, 3), (8, 2)])
def test_convac_1_one_hot_inputs_give_the_entries_of_the_tensor(
    modes: int, channels: int, name: str, sharing: str
) -> None:
    pairs = ModeTree.sequence(modes)
    tree = {
        "CP": ModeTree.sequence(modes, modes),
        "deep, windows of 2": pairs,
        "deep, windows of 4": ModeTree.sequence(modes, 4),
        "truncated": pairs.truncated(len(pairs.levels) - 1),
        "chain": ModeTree.chain(modes),
    }[name]
    check_entries(network(tree, channels, sharing=sharing))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", sorted(TREES.keys() - {"cp", "pairs", "truncated", "chain"}))
def test_convac_1_other_trees(name: str, sharing: str) -> None:
    tree = TREES[name]
    check_entries(network(tree, 3 if tree.modes < 6 else 2, sharing=sharing))


@pytest.mark.parametrize("name", sorted(TREES))
def test_convac_1_trees_truncated_at_every_depth(name: str) -> None:
    tree = TREES[name]
    for levels in range(1, len(tree.levels) + 1):
        truncated = tree.truncated(levels)
        assert len(truncated.levels) == levels
        check_entries(network(truncated, 2, sharing="unshared"))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", sorted(TREES))
def test_convac_2_scores_are_the_tensor_contracted_with_the_leaves(name: str, sharing: str) -> None:
    tree = TREES[name]
    net = network(tree, sharing=sharing)
    x = torch.randn(3, 2, tree.modes, dtype=F64, generator=torch.Generator().manual_seed(1))
    for y, sample in itertools.product(range(2), range(3)):
        contracted = net.coefficient_tensor(y).detach()
        for mode in range(tree.modes):
            contracted = torch.tensordot(x[sample, :, mode], contracted, dims=([0], [0]))
        assert abs(float(contracted - net(x).detach()[sample, y])) <= 1e-12 * float(net(x).detach().abs().max())


def test_convac_2_counts_are_the_formulas() -> None:
    tree, widths, outputs, M = ModeTree.sequence(8), (4, 5, 6), 7, 3
    inner = [3 * 4, 4 * 5, 5 * 6]
    shared = ConvAC(None, tree, widths, outputs, channels=M)
    unshared = ConvAC(None, tree, widths, outputs, channels=M, sharing="unshared")
    periodic = ConvAC(None, tree, widths, outputs, channels=M, sharing="window")
    assert shared.num_parameters == sum(inner) + 42
    assert periodic.num_parameters == 2 * sum(inner) + 42
    expected = 8 * inner[0] + 4 * inner[1] + 2 * inner[2] + 42
    assert unshared.num_parameters == unshared.macs == shared.macs == expected
    assert shared.products == 4 * 4 + 2 * 5 + 1 * 6
    cp = ConvAC.cp(None, 8, 10, 4, channels=M, sharing="unshared")
    assert cp.num_parameters == 10 * (8 * M + 4) == cp.macs
    assert cp.products == 10 * (8 - 1)
    assert ConvAC.cp(None, 8, 10, 4, channels=M).num_parameters == 10 * (M + 4)
    # Windows of w in general, and equal widths: (2 N - 2) r^2 + Y r.
    quads = ConvAC(None, ModeTree.sequence(16, 4), (4, 5), outputs, channels=M, sharing="unshared")
    assert quads.num_parameters == quads.macs == 16 * 3 * 4 + 4 * 4 * 5 + 7 * 5
    assert quads.products == (16 - 4) * 4 + (4 - 1) * 5
    assert ConvAC(None, tree, 3, outputs, channels=3).macs == (2 * 8 - 2) * 9 + 7 * 3


@pytest.mark.parametrize("name", ["cp", "pairs", "chain"])
@pytest.mark.parametrize("sharing", ["shared", "unshared"])
def test_convac_3_grid_tensor_is_the_tensor_times_the_templates(name: str, sharing: str) -> None:
    net = network(TREES[name], 3, sharing=sharing)
    F = torch.eye(3, dtype=F64) + 0.3 * torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    assert float(torch.linalg.cond(F)) <= 100
    grid = grid_tensor(net, F.T, 1)
    expected = torch.einsum("abcd,ia,jb,kc,ld->ijkl", net.coefficient_tensor(1), F, F, F, F)
    assert float((grid - expected).detach().abs().max()) <= 1e-10 * float(expected.detach().abs().max())
    for part in ([0, 2], [0, 1], [1]):
        ranks = [int(torch.linalg.matrix_rank(matricize(t, part))) for t in (grid, net.coefficient_tensor(1))]
        assert ranks[0] == ranks[1]


def test_convac_4_a_cp_network_is_a_deep_one_with_identity_filters() -> None:
    cp = network(ModeTree.sequence(8, 8), 3, 4, sharing="unshared")
    deep = network(ModeTree.sequence(8), 3, 4, sharing="unshared")
    deep.layers[0][0].weights.set_dense(cp.layers[0][0].weights.dense())
    for level in (1, 2):
        deep.layers[level][0].weights.set_dense(torch.eye(4, dtype=F64))
    deep.output.weights.set_dense(cp.output.weights.dense())
    x = torch.randn(5, 3, 8, dtype=F64, generator=torch.Generator().manual_seed(3))
    assert float((cp(x) - deep(x)).detach().abs().max()) <= 1e-13 * float(cp(x).detach().abs().max())


def test_convac_4_a_cp_network_of_width_M_to_the_N_minus_1_is_universal() -> None:
    target = torch.randn(2, 2, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(4))
    net = network(ModeTree.sequence(4, 4), 2, 8, 1, sharing="unshared")
    filters = torch.zeros(4, 8, 2, dtype=F64)
    for z, digits in enumerate(itertools.product(range(2), repeat=3)):
        filters[0, z] = target[(slice(None), *digits)]
        for mode, digit in enumerate(digits, 1):
            filters[mode, z, digit] = 1
    net.layers[0][0].weights.set_dense(filters)
    net.output.weights.set_dense(torch.ones(1, 1, 8, dtype=F64))
    assert float((net.coefficient_tensor().detach() - target).abs().max()) <= 1e-14


@pytest.mark.parametrize(("modes", "channels"), [(2, 2), (2, 3), (4, 2), (4, 3), (8, 2), (8, 3)])
def test_convac_5_the_identity_point(modes: int, channels: int) -> None:
    net = network(ModeTree.sequence(modes), channels, channels, 1, sharing="unshared")
    for level, maps in enumerate(net.layers):
        weights = maps[0].weights
        matrix = torch.zeros(weights.shape, dtype=F64)
        if level == 0:
            matrix = torch.eye(channels, dtype=F64)
        elif level == 1:
            matrix[0] = 1
        else:
            matrix[0, 0] = 1
        weights.set_dense(matrix)
    top = torch.zeros(1, channels, dtype=F64)
    top[0, 0] = 1
    net.output.weights.set_dense(torch.ones_like(top) if modes == 2 else top)
    even_odd = matricize(net.coefficient_tensor(), range(0, modes, 2))
    assert torch.equal(even_odd, torch.eye(channels ** (modes // 2), dtype=F64))


FAMILIES: dict[str, sm.Structure | None] = {
    "dense": None,
    "low rank": sm.LowRank(2),
    "kronecker": sm.Kronecker(),
}
SEMIRINGS: dict[str, Semiring] = {
    "plain": Plain(), "scaled": Scaled(), "log": Log(), "signed log": SignedLog(), "rms": RootMeanSquare(),
    "max": MaxProduct(),
}  # fmt: skip
MATRIX_TREES = (
    "cp", "five", "chain", "mirror", "nested", "truncated", "square", "rows", "dilated", "overlapping",
)  # fmt: skip


def by_hand(net: ConvAC, x: Tensor, *, tropical: bool = False) -> Tensor:
    """Scores (batch, Y) by a walk over the tree with the dense matrix of each edge, one node after the other.

    ``tropical``: logarithms, with maximum in the place of the sum.
    """
    matrices = [net.edge_matrices(level) for level in range(len(net.tree.levels))]

    def through(matrix: Tensor, value: Tensor) -> Tensor:
        return (value[:, None] + matrix.log()).amax(-1) if tropical else value @ matrix.T

    def multiply(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(0) if tropical else torch.stack(parts).prod(0)

    leaves = x.log() if tropical else x
    root = fold(net.tree, lambda mode: leaves[:, :, mode], lambda l, w, p, v: through(matrices[l][w, p], v), multiply)
    return through(net.output_matrix(), root)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("semiring", sorted(SEMIRINGS))
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", MATRIX_TREES)
def test_convac_1_every_tree_sharing_semiring_and_family(name: str, sharing: str, semiring: str, family: str) -> None:
    """All give the number that a walk with dense matrices gives, and finite gradients for all weights."""
    tree = OVERLAPPING if name == "overlapping" else TREES[name]
    chosen = SEMIRINGS[semiring]
    constraint = "simplex" if semiring in ("log", "max") else "none"
    options = {"sharing": sharing, "weights": FAMILIES[family], "constraint": constraint, "initialize": lambda w: None}
    net = ConvAC(None, tree, 4, 2, channels=4, semiring=chosen, dtype=F64, **options)  # type: ignore[arg-type]
    x = torch.rand(3, 4, tree.modes, dtype=F64, generator=torch.Generator().manual_seed(1)) + 0.1
    sign, log = net.signed_log(x)
    scores = net(x)
    if semiring == "max":
        assert torch.allclose(scores, by_hand(net, x, tropical=True), rtol=1e-9)
    elif semiring == "rms":
        ratio = scores / by_hand(net, x)
        assert torch.allclose(ratio[:, 0], ratio[:, 1], rtol=1e-9), "one factor for each sample"
        assert bool((ratio > 0).all())
    else:
        expected = by_hand(net, x)
        assert torch.allclose(sign * log.exp(), expected, rtol=1e-9, atol=1e-300)
        assert torch.allclose(scores.exp() if semiring == "log" else scores, expected, rtol=1e-9, atol=1e-300)
    scores.sum().backward()
    gradients = [p.grad for p in net.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert any(g is not None and bool((g != 0).any()) for g in gradients)


@pytest.mark.parametrize("semiring", sorted(SEMIRINGS))
def test_convac_1_every_combination_of_options_works_or_is_refused(semiring: str) -> None:
    """Semiring x constraint x activation x pooling x kind of weights: the list of what is refused is all there is."""
    chosen, x = SEMIRINGS[semiring], torch.rand(2, 8, 2, dtype=F64) + 0.1
    for constraint, activation, pooling, family in itertools.product(
        ("none", "positive", "simplex"), ("none", "relu"), ("product", "max", "average"), (None, sm.Circulant())
    ):
        options = {"constraint": constraint, "activation": activation, "pooling": pooling, "weights": family}
        refused = (
            (semiring in ("log", "max") and constraint == "none")
            or (activation == "relu" and semiring != "plain")
            or (activation == "relu") == (pooling == "product")
            or (family is not None and constraint != "none")
        )
        if refused:
            with pytest.raises(StructureError):
                ConvAC(None, ModeTree.sequence(2), 8, channels=8, semiring=chosen, dtype=F64, **options)  # type: ignore[arg-type]
            continue
        net = ConvAC(None, ModeTree.sequence(2), 8, channels=8, semiring=chosen, dtype=F64, **options)  # type: ignore[arg-type]
        assert bool(net(x).isfinite().all())


def refused_examples() -> list[Callable[[], object]]:
    """One for each line of the list, in its order."""
    pairs, overlapping = ModeTree.sequence(4), ModeTree.overlapping(5, (3,))
    return [
        lambda: ConvAC(None, pairs, 2, channels=2, semiring=MaxProduct()),
        lambda: ConvAC(None, pairs, 2, channels=2, activation="relu", pooling="max", semiring=SignedLog()),
        lambda: ConvAC(None, pairs, 2, channels=2, activation="none", pooling="average", semiring=Plain()),
        lambda: ConvAC(None, pairs, 8, channels=8, weights=sm.Circulant(), constraint="positive"),
        lambda: TensorialMixture(OneHot(2), overlapping, 2),
        lambda: RecurrentConvAC(None, 2, channels=2, semiring=SignedLog()),
    ]


@pytest.mark.parametrize("number", range(len(UNSUPPORTED)))
def test_convac_1_all_that_is_listed_as_unsupported_raises(number: int) -> None:
    assert len(refused_examples()) == len(UNSUPPORTED)
    with pytest.raises(StructmatError, match=r"Use |in Plain"):
        refused_examples()[number]()


@pytest.mark.parametrize("name", sorted(sm.families()))
def test_every_family_serves_as_weights(name: str) -> None:
    """The network is that of the family's dense matrices; so is one of distributions, where signs allow one."""
    options: dict[str, Any] = {"channels": 8, "sharing": "window", "dtype": F64}
    for member in proposals(sm.families()[name], (8, 8))[:1]:
        net = ConvAC(None, ModeTree.sequence(3), 8, 2, weights=member, **options)
        x = torch.randn(2, 8, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
        expected = by_hand(net, x).detach()
        assert float((net(x).detach() - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
        refused = ""
        try:
            net = ConvAC(None, ModeTree.sequence(3), 8, 2, weights=member, constraint="simplex", **options)
        except StructureError as error:
            refused = str(error)
        if refused:
            assert "can't be constrained" in refused
            continue
        net.semiring = Log()
        assert torch.allclose(net(x.abs()).exp(), by_hand(net, x.abs()), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"semiring": Log()}, "unconstrained"),
        ({"semiring": MaxProduct()}, "unconstrained"),
        ({"activation": "relu", "pooling": "max"}, "Plain"),
        ({"activation": "relu", "semiring": Plain()}, "not supported"),
        ({"pooling": "average", "semiring": Plain()}, "not supported"),
        ({"weights": sm.LowRank(9)}, "LowRank"),
        ({"weights": sm.TensorTrain(rank=1), "constraint": "other"}, "other"),
        ({"weights": sm.Circulant(), "constraint": "simplex", "width": 8, "channels": 8}, "signs say nothing"),
        ({"weights": sm.Sparse(density=0.1), "constraint": "simplex", "width": 8, "channels": 8}, "without entries"),
        ({"width": (2, 2)}, "2 levels|3 levels"),
        ({"sharing": ("shared",)}, "sharing"),
    ],
)
def test_unsupported_combinations_are_refused(options: dict[str, object], words: str) -> None:
    width = options.pop("width", 3)
    channels = options.pop("channels", 2)
    with pytest.raises(ValueError, match=words):
        ConvAC(None, ModeTree.sequence(8), width, channels=channels, **options)  # type: ignore[arg-type]


def test_inputs_of_the_wrong_shape_are_refused() -> None:
    net = network(TREES["pairs"])
    with pytest.raises(ShapeError, match="channels, then patches"):
        net(torch.zeros(3, 4, 2, dtype=F64))
    with pytest.raises(ShapeError, match="channels=M"):
        ConvAC(None, TREES["pairs"], 3)
    with pytest.raises(ShapeError, match="outputs"):
        net.coefficient_tensor(5)
    with pytest.raises(ShapeError, match="2\\^26"):
        network(ModeTree.sequence(64)).coefficient_tensor()


@pytest.mark.parametrize("name", ["truncated", "mirror", "chain", "nested"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_convac_23_state_dicts(name: str, sharing: str) -> None:
    net, other = network(TREES[name], sharing=sharing), network(TREES[name], sharing=sharing, seed=1)
    x = torch.randn(3, 2, TREES[name].modes, dtype=F64)
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


@pytest.mark.parametrize(("name", "sharing"), [("truncated", "shared"), ("mirror", "window"), ("chain", "unshared")])
def test_convac_23_networks_export(name: str, sharing: str) -> None:
    net = network(TREES[name], sharing=sharing)
    x = torch.randn(3, 2, TREES[name].modes, dtype=F64)
    exported = torch.export.export(net, (x,))
    assert torch.allclose(exported.module()(x), net(x), rtol=1e-12)


@pytest.mark.parametrize("name", ["truncated", "mirror"])
def test_convac_23_counts_of_other_trees(name: str) -> None:
    """Unshared weights are as many as the multiply-adds; a pattern with the period of a window has one set a place."""
    tree = TREES[name]
    unshared, periodic = (ConvAC(None, tree, 3, 2, channels=4, sharing=s) for s in ("unshared", "window"))
    edges = [len(list(tree.edges(level))) for level in range(len(tree.levels))]
    below = [4, *(3 for _ in edges[1:])]
    assert unshared.num_parameters == unshared.macs == sum(3 * r * n for n, r in zip(edges, below, strict=True)) + 6
    places = [len(windows[0]) for windows in tree.levels]
    assert periodic.num_parameters == sum(3 * r * n for n, r in zip(places, below, strict=True)) + 6


def test_recurrent_sharing_ties_the_levels_of_a_chain() -> None:
    short, long = (ConvAC(None, ModeTree.chain(n), 4, channels=3, sharing="recurrent") for n in (5, 50))
    assert short.num_parameters == long.num_parameters
    window = ConvAC(None, ModeTree.chain(50), 4, channels=3, sharing="window")
    assert window.num_parameters > 10 * long.num_parameters


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(2, 5), st.integers(0, 10**6))
def test_any_number_of_patches_and_any_window(modes: int, window: int, seed: int) -> None:
    tree = ModeTree.sequence(modes, window)
    assert tree.masks[-1] == 2**modes - 1
    assert not tree.overlaps
    net = network(tree, seed=seed)
    ones = torch.ones(2, 2, modes, dtype=F64)
    assert net(ones).shape == (2, 2)


def test_every_weight_is_used() -> None:
    for name, sharing in itertools.product(TREES, SHARINGS):
        net = network(TREES[name], sharing=sharing)
        net(torch.rand(2, 2, TREES[name].modes, dtype=F64)).sum().backward()
        for parameter in net.parameters():
            assert parameter.grad is not None
            assert float(parameter.grad.abs().sum()) > 0
    assert isinstance(net.output.weights, Weights)
