"""Tensor formats: conversions, HT-SVD, CP fits, recurrent and mixed networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from structmat.errors import DataError, ShapeError
from structmat.nn import ConvAC, ModeTree
from structmat.nn.convac import convert
from structmat.nn.convac.cpfit import eckart_young, fit_cp
from structmat.nn.convac.expand import matricize
from structmat.nn.convac.formats import CP, HierarchicalTucker, TensorTrain
from structmat.nn.convac.htsvd import ht_round, ht_svd
from structmat.nn.convac.mixed import MixedConvAC
from structmat.nn.convac.recurrent import RecurrentConvAC
from structmat.nn.convac.semiring import Log, Plain, Scaled
from structmat.nn.convac.weights import Weights, normal_

F64 = torch.float64
BINARY, QUAD = ModeTree.sequence(8), ModeTree.sequence(8, 4)
UNEVEN = ModeTree.nested(((0, 3), (2, (1, 4))))


def network(tree: ModeTree, channels: int, widths: Any, seed: int = 0, **options: Any) -> ConvAC:
    generator = torch.Generator().manual_seed(seed)
    options.setdefault("sharing", "unshared")
    options.setdefault("initialize", lambda w: normal_(w, generator=generator))
    return ConvAC(None, tree, widths, channels=channels, dtype=F64, **options)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return float((a - b).detach().norm()) <= tolerance * max(float(b.detach().norm()), 1e-300)


@pytest.mark.parametrize(
    "tree", [BINARY, QUAD, ModeTree.chain(5), UNEVEN, ModeTree.mirror(3, 2)], ids=lambda t: str(t.modes)
)
def test_convac_16_network_to_ht_and_back(tree: ModeTree) -> None:
    net = network(tree, 2, 3)
    tensor = net.coefficient_tensor().detach()
    ht = convert.to_ht(net)
    assert close(ht.to_tensor(), tensor)
    rounded = ht_round(ht)
    assert close(rounded.to_tensor(), tensor, 1e-6)
    for node, rank in enumerate(rounded.ranks):
        assert rank == net.mincut(tree.modes_below(node)).value
    small = ht_round(ht_round(ht), ranks=2)
    assert max(small.ranks) <= 2
    back = convert.from_ht(ht_svd(tensor, tree).tensor)
    assert close(back.coefficient_tensor(), tensor)


@pytest.mark.parametrize(("modes", "size", "rank"), [(4, 3, 2), (8, 3, 2), (8, 3, 3)])
def test_convac_16_general_transfer_tensors_become_networks(modes: int, size: int, rank: int) -> None:
    """Not diagonal in the children, as those of networks are: k^2 channels."""
    tree, generator = ModeTree.sequence(modes), torch.Generator().manual_seed(5)

    def array(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=generator) / math.sqrt(math.prod(shape[:-1]))

    arrays = [array(size, rank) for _ in range(modes)]
    arrays += [array(rank, rank, rank) for _ in range(modes, tree.nodes - 1)]
    ht = HierarchicalTucker(tree, (*arrays, array(rank, rank)))
    net = convert.from_ht(ht)
    assert net.widths == (rank**2,) * len(tree.levels)
    assert close(net.coefficient_tensor(), ht.to_tensor())


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-2, 0.3])
@pytest.mark.parametrize(
    ("tree", "size", "ranks"),
    [
        (ModeTree.sequence(4), 4, 2), (ModeTree.sequence(4), 4, 3), (BINARY, 2, 2), (BINARY, 3, 3), (QUAD, 2, 2),
        (UNEVEN, 3, 2),
    ],
    ids=["4 modes, rank 2", "4 modes, rank 3", "8 modes, rank 2", "8 modes, rank 3", "windows of 4", "uneven"],
)  # fmt: skip
def test_convac_15_ht_svd_is_within_its_bounds(tree: ModeTree, size: int, ranks: int, noise: float) -> None:
    exact = network(tree, size, ranks).coefficient_tensor().detach()
    exact = exact / exact.norm()
    random = torch.randn(exact.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    tensor = exact + noise * random / random.norm()
    found = ht_svd(tensor, tree, ranks=ranks)
    error = float((found.tensor.to_tensor() - tensor).norm())
    # Rounding is relative to the tensor's norm, which is about one, not to the error's.
    rounding = 1e-14
    if noise == 0:
        assert error <= 1e-12
    else:
        assert found.lower * (1 - 1e-12) - rounding <= error <= found.upper * (1 + 1e-12) + rounding
        assert error <= 1.3 * found.lower
    for node, frame in enumerate(found.tensor.frames()[:-1]):
        deviation = frame.T @ frame - torch.eye(found.tensor.ranks[node], dtype=F64)
        assert float(deviation.abs().max()) <= 1e-13
    norm = float(found.tensor.to_tensor().norm())
    assert float(found.tensor.arrays[-1].norm()) == pytest.approx(norm, rel=1e-13)
    assert error <= math.sqrt(2 * tree.modes - 3) * max(found.lower, 1e-12) or tree is QUAD


@pytest.mark.parametrize("tolerance", [1e-8, 0.05, 0.5])
def test_convac_15_tolerances_are_kept(tolerance: float) -> None:
    tensor = torch.randn(3, 3, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    tree = ModeTree.sequence(4)
    found = ht_svd(tensor, tree, tolerance=tolerance * float(tensor.norm()))
    assert float((found.tensor.to_tensor() - tensor).norm()) <= tolerance * float(tensor.norm()) * (1 + 1e-12)
    rounded = ht_round(found.tensor, tolerance=tolerance * float(tensor.norm()))
    assert float((rounded.to_tensor() - found.tensor.to_tensor()).norm()) <= tolerance * float(tensor.norm()) + 1e-6


def test_cp_networks_and_cp_tensors() -> None:
    net = network(ModeTree.sequence(5, 5), 3, 4)
    cp = convert.to_cp(net)
    weights, factors = cp.as_tuple()
    tensor = torch.einsum("z,az,bz,cz,dz,ez->abcde", weights, *factors)
    assert close(cp.to_tensor(), tensor)
    assert close(net.coefficient_tensor(), tensor)
    for tree in (None, ModeTree.sequence(5), ModeTree.chain(5), UNEVEN):
        assert close(convert.from_cp(cp, tree).coefficient_tensor(), tensor)


def test_cp_tensors_and_tensor_trains_in_tensorlys_types() -> None:
    """A pair and a list are what its functions take and what its types unpack to; the types themselves if it is there.

    Written out here by TensorLy's own formulas: factors (M, Z), cores (r, M, s).
    """
    net, chain = network(ModeTree.sequence(3, 3), 3, 4), network(ModeTree.chain(3), 3, 2)
    weights, factors = convert.to_cp(net).as_tuple()
    assert close((factors[0] * weights @ kruskal(factors[1:]).T).reshape(3, 3, 3), net.coefficient_tensor())
    first, middle, last = convert.to_tensor_train(chain).as_list()
    written = (first.reshape(3, -1) @ middle.reshape(2, -1)).reshape(9, -1) @ last.reshape(2, 3)
    assert close(written.reshape(3, 3, 3), chain.coefficient_tensor())
    assert close(CP.of((weights, factors)).to_tensor(), net.coefficient_tensor())
    unit = CP.of((None, [factors[0] * weights, *factors[1:]]))
    assert close(unit.to_tensor(), net.coefficient_tensor())
    assert close(TensorTrain.of([first, middle, last]).to_tensor(), chain.coefficient_tensor())
    for given in ((weights, factors[:0]), (weights[:2], factors)):
        with pytest.raises(ShapeError, match="share Z"):
            CP.of(given)


def kruskal(factors: list[Tensor]) -> Tensor:
    return torch.einsum("az,bz->abz", *factors).flatten(0, 1)


def test_tensorlys_own_types() -> None:
    tensorly = pytest.importorskip("tensorly")
    tensorly.set_backend("pytorch")
    net, chain = network(ModeTree.sequence(3, 3), 3, 4), network(ModeTree.chain(3), 3, 2)
    cp = tensorly.cp_tensor.CPTensor(convert.to_cp(net).as_tuple())
    assert close(tensorly.cp_to_tensor(cp), net.coefficient_tensor())
    assert close(CP.of(cp).to_tensor(), net.coefficient_tensor())
    train = tensorly.tt_tensor.TTTensor(convert.to_tensor_train(chain).as_list())
    assert close(tensorly.tt_to_tensor(train), chain.coefficient_tensor())
    assert close(TensorTrain.of(train).to_tensor(), chain.coefficient_tensor())


def test_tensor_trains_and_chain_networks() -> None:
    net = network(ModeTree.chain(5), 3, 2)
    train = convert.to_tensor_train(net)
    assert train.ranks == (2, 2, 2, 2)
    assert close(train.to_tensor(), net.coefficient_tensor())
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 2), (2, 3, 4), (4, 3, 2), (2, 3, 1)]
    general = TensorTrain(tuple(torch.randn(s, dtype=F64, generator=generator) for s in shapes))
    back = convert.from_tensor_train(general)
    assert close(back.coefficient_tensor(), general.to_tensor())
    for split in range(1, 4):
        assert back.rank(range(split), method="exact") == min(3**split, 3 ** (4 - split), general.ranks[split - 1])


def published_tensor(kind: str, modes: int, size: int) -> Tensor:
    """The random networks of the published curves: NumPy's generator 0, level by level, node by node."""
    rng, orthogonal = np.random.default_rng(0), kind == "orthogonal"
    tree = ModeTree.sequence(modes)
    net = network(tree, size, size, initialize=lambda w: None)
    for level in range(len(tree.levels)):
        drawn = [rng.standard_normal((size, size)) / math.sqrt(size) for _ in range(modes // 2**level)]
        matrices = np.stack([np.linalg.qr(m)[0] if orthogonal else m for m in drawn])
        net.layers[level][0].weights.set_dense(torch.from_numpy(matrices))
    top = np.ones(size) if orthogonal else rng.standard_normal(size)
    net.output.weights.set_dense(torch.from_numpy(top)[None, None])
    tensor = net.coefficient_tensor().detach()
    return tensor / tensor.norm()


PUBLISHED_FITS: dict[tuple[str, int, int], dict[int, tuple[float, float]]] = {
    ("random", 4, 4): {
        1: (0.519, 0.474), 2: (0.333, 0.315), 4: (0.201, 0.175), 8: (0.024, 0.020), 16: (0.006, 0.0), 24: (0.002, 0.0),
    },
    ("random", 4, 8): {
        1: (0.884, 0.872), 4: (0.665, 0.629), 8: (0.469, 0.401), 16: (0.236, 0.185), 32: (0.054, 0.023),
        64: (0.011, 0.0),
    },
    ("random", 8, 2): {1: (0.471, 0.446), 2: (0.255, 0.228), 4: (0.053, 0.051), 8: (0.013, 0.008), 16: (0.003, 0.0)},
    ("random", 8, 3): {1: (0.667, 0.613), 9: (0.180, 0.141), 27: (0.046, 0.022), 54: (0.015, 0.001), 81: (0.008, 0.0)},
    ("random", 16, 2): {1: (0.418, 0.418), 4: (0.307, 0.228), 16: (0.055, 0.043), 64: (0.013, 0.002)},
    ("orthogonal", 4, 4): {
        1: (0.927, 0.927), 2: (0.874, 0.848), 4: (0.739, 0.720), 8: (0.456, 0.456), 12: (0.138, 0.138),
        16: (0.003, 0.0),
    },
    ("orthogonal", 8, 2): {
        1: (0.930, 0.930), 2: (0.876, 0.875), 4: (0.761, 0.761), 8: (0.517, 0.515), 12: (0.283, 0.283), 16: (0.0, 0.0),
    },
    ("orthogonal", 8, 3): {
        1: (0.987, 0.973), 9: (0.831, 0.801), 27: (0.556, 0.507), 54: (0.226, 0.190), 81: (0.052, 0.0),
    },
    ("orthogonal", 16, 2): {1: (0.974, 0.954), 4: (0.914, 0.859), 16: (0.662, 0.629), 64: (0.313, 0.276)},
}  # fmt: skip
"""(error, lower bound) by width, for (weights, N, M = r)."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c[1:] in ((4, 4), (8, 2)) else pytest.mark.slow) for c in PUBLISHED_FITS],
    ids=lambda c: "{}, N={}, M={}".format(*c),
)
def test_convac_17_cp_fits(case: tuple[str, int, int]) -> None:
    """Errors at most 15 % above the table's (rounded there to 0.001), bounds as there; no width does worse."""
    kind, modes, size = case
    tensor, previous = published_tensor(kind, modes, size), 1.0
    sweeps, starts = (30, 4) if size**modes < 1000 else (60, 2)
    for terms, (error, bound) in PUBLISHED_FITS[case].items():
        found = fit_cp(tensor, terms, sweeps=sweeps, starts=starts)
        assert found.lower == pytest.approx(bound, abs=1e-3)
        assert found.lower <= found.error + 1e-12
        assert found.error <= 1.15 * error + 0.0005
        assert found.error <= previous + 1e-9
        assert float((found.tensor.to_tensor() - tensor).norm()) == pytest.approx(found.error, rel=1e-6, abs=1e-12)
        previous = found.error


def test_gauss_newton_steps_go_on_where_alternating_least_squares_creeps() -> None:
    tensor = published_tensor("random", 4, 4)
    slow, fast = (fit_cp(tensor, 16, sweeps=30, starts=4, steps=steps) for steps in (0, 60))
    assert fast.error < slow.error / 3 < 0.01


def test_convac_17_the_identity_point_needs_exponential_width() -> None:
    """Its spectrum is flat: keeping Z of its product terms is the best that Z terms can do."""
    eye = torch.eye(2, dtype=F64)
    tensor = torch.einsum("ab,cd->abcd", eye, eye) / 2
    for terms in (1, 2, 3):
        found = fit_cp(tensor, terms, sweeps=30, starts=4)
        assert found.lower == pytest.approx(math.sqrt(1 - terms / 4))
        assert found.error == pytest.approx(math.sqrt(1 - terms / 4), abs=1e-3)
    assert eckart_young(tensor, 4) <= 1e-12
    with pytest.raises(DataError, match="not zero"):
        fit_cp(torch.zeros(2, 2), 1)


def test_recurrent_networks_are_tensor_trains() -> None:
    generator = torch.Generator().manual_seed(0)
    for modes in (None, 4):
        net = RecurrentConvAC(None, 3, 2, channels=2, modes=modes, dtype=F64, generator=generator)
        x = torch.randn(3, 2, 4, dtype=F64, generator=generator)
        for y in range(2):
            expected = torch.einsum("abcd,na,nb,nc,nd->n", net.to_tensor_train(4, y).to_tensor(), *x.unbind(2))
            assert torch.allclose(net(x)[:, y], expected, rtol=1e-12)
        scaled = net(x)
        net.semiring = Plain()
        assert torch.equal(net(x), scaled)
    long = RecurrentConvAC(None, 4, 1, channels=2, generator=generator)
    with torch.no_grad():
        long.cores.mul_(1e-3)
    x = torch.randn(2, 2, 1000, generator=generator)
    log = long.signed_log(x).log
    assert bool(log.isfinite().all())
    log.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in long.parameters() if p.grad is not None)
    with pytest.raises(ShapeError, match="length 4"):
        RecurrentConvAC(None, 3, channels=2, modes=4)(torch.zeros(1, 2, 5))
    with pytest.raises(ShapeError, match="signed cores"):
        RecurrentConvAC(None, 3, channels=2, semiring=Log())
    with pytest.raises(ShapeError, match="any number"):
        long.to_tensor_train()


def test_mixed_networks_realise_hybrids() -> None:
    """A hybrid of two dilation orders of width r / 2, inside the mixture of width r, exactly."""
    one, other = ModeTree.dilated((0, 1, 2, 3)), ModeTree.dilated((1, 0, 3, 2))
    hybrid_tree = ModeTree.dilated((0, 1, 3, 2))
    hybrid = network(hybrid_tree, 2, 2, seed=3)
    nets = [
        network(tree, 2, 4, initialize=lambda w: w.set_dense(torch.zeros(w.shape, dtype=F64))) for tree in (one, other)
    ]
    mixed = MixedConvAC(nets[0], nets[1], [1])
    # Below the mixture the first network is the hybrid, in its first two channels; above it the second is.
    for level, net in ((0, nets[0]), (1, nets[0]), (2, nets[1]), (3, nets[1])):
        places = {net.tree.masks[e.node]: (e.window, e.position) for e in net.tree.edges(level)}
        found = hybrid.edge_matrices(level)
        weights = net.layers[level][0].weights
        order = list(net.tree.edges(level))
        for edge in hybrid_tree.edges(level):
            window, position = places[hybrid_tree.masks[edge.node]]
            number = next(i for i, e in enumerate(order) if (e.window, e.position) == (window, position))
            matrix = found[edge.window, edge.position].detach()
            with torch.no_grad():
                weights.weight[number, :2, : matrix.shape[1]] = matrix
    with torch.no_grad():
        nets[1].output.weights.weight[0, :, :2] = hybrid.output_matrix()
    x = torch.randn(5, 2, 16, dtype=F64)
    assert torch.allclose(mixed(x), hybrid(x), rtol=1e-10)
    for net in nets:
        net.semiring = Plain()
        net.initialize(lambda w: normal_(w))
    plain = mixed(x)
    for net in nets:
        net.semiring = Scaled()
    assert torch.allclose(mixed(x), plain, rtol=1e-10, atol=1e-300)
    with pytest.raises(ShapeError, match="different sets"):
        MixedConvAC(nets[0], nets[1], [0])
    with pytest.raises(ShapeError, match="below the root"):
        MixedConvAC(nets[0], nets[1], [3])
    with pytest.raises(ShapeError, match="agree"):
        MixedConvAC(nets[0], network(other, 3, 4), [1])


def test_formats_refuse_what_does_not_fit() -> None:
    ones = torch.ones
    with pytest.raises(ShapeError, match="share Z"):
        CP(ones(2), (ones(3, 2), ones(3, 3)))
    with pytest.raises(ShapeError, match="cores"):
        TensorTrain((ones(1, 2, 3), ones(2, 2, 1)))
    with pytest.raises(ShapeError, match="array"):
        HierarchicalTucker(ModeTree.sequence(2), (ones(2, 2),))
    with pytest.raises(ShapeError, match="node 2"):
        HierarchicalTucker(ModeTree.sequence(2), (ones(2, 2), ones(2, 2), ones(3, 2)))
    with pytest.raises(ShapeError, match="levels"):
        convert.to_cp(network(BINARY, 2, 2))
    with pytest.raises(ShapeError, match="chain"):
        convert.to_tensor_train(network(BINARY, 2, 2))
    with pytest.raises(ShapeError, match="modes"):
        ht_svd(ones(2, 2), BINARY)
    with pytest.raises(ShapeError, match="one size"):
        convert.from_cp(CP(ones(1), (ones(2, 1), ones(3, 1))))
    assert isinstance(network(BINARY, 2, 2).output.weights, Weights)
    assert matricize(ones(2, 3, 4), [2]).shape == (4, 6)
