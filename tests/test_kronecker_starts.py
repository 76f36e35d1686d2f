"""Fresh Kronecker blocks keep the second moment of what passes."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kronecker_blocks import F64
from torch import Tensor, nn

from structmat.errors import DataError, StructureError
from structmat.nn import KroneckerBlock, KroneckerNetwork
from structmat.nn.kronecker import Slopes, balanced_, calibrate_, gain, source_
from structmat.structures.kronecker import Orthogonal


@pytest.mark.parametrize("terms", [1, 4])
@pytest.mark.parametrize(("inner", "tolerance"), [(None, 0.05), (torch.relu, 0.15)])
def test_kronecker_18_second_moment_is_kept(
    inner: Callable[[Tensor], Tensor] | None, tolerance: float, terms: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    moments = []
    for _ in range(200):
        network = KroneckerNetwork([(28, 28)] * 3, terms, inner=inner, generator=generator)
        with torch.no_grad():
            moments.append(float(network(torch.randn(16, 784, generator=generator)).square().mean()))
    assert sum(moments) / 200 == pytest.approx(1.0, rel=tolerance)


def test_kronecker_18_published_start_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(28, 28)] * 7
    x = torch.randn(16, 784, generator=generator)
    with torch.no_grad():
        grown = KroneckerNetwork(sizes, 4, inner=None, outer=None, initialize=source_, generator=generator)(x)
        faded = KroneckerNetwork(sizes, 1, inner=torch.relu, initialize=source_, generator=generator)(x)
    assert float(grown.square().mean()) > 100
    assert float(faded.square().mean()) < 0.05
    for parameter in KroneckerBlock(784, 784, initialize=source_).chains[0].factors():
        assert 0.9 * (6 / 56) ** 0.5 < float(parameter.detach().abs().max()) <= (6 / 56) ** 0.5


@torch.no_grad()
def test_kronecker_18_calibration_is_exact_on_its_batch() -> None:
    x = torch.randn(64, 784, dtype=F64) * torch.rand(784, dtype=F64)
    network = KroneckerNetwork([784, 784, (7, 14), 10], 2, inner=torch.relu, dtype=F64)
    calibrate_(network.layers(), x)
    for block in network.layers():
        for chain in block.chains:
            for _, rows in chain.hidden(x):
                assert float(rows.square().mean()) == pytest.approx(1, rel=1e-5)
        assert float(block.linear(x).square().mean()) == pytest.approx(1, rel=1e-5)
        x = block(x)
    with pytest.raises(DataError, match="0 or not finite"):
        calibrate_(network.layers(), torch.zeros(4, 784, dtype=F64))
    small = KroneckerBlock(64, 64, inner=lambda z: z * 0.0, initialize=source_)
    with pytest.raises(StructureError, match="nothing passes"):
        calibrate_([small], torch.randn(4, 64))


@given(st.integers(1, 40))
@settings(max_examples=15)
def test_kronecker_18_one_orthogonal_factor_keeps_norms(size: int) -> None:
    drawn = Orthogonal(1.0, (0, 1, 2)).draw((1, size, size), generator=None, dtype=F64, device=torch.device("cpu"))[0]
    x = torch.randn(size, 3, dtype=F64)
    torch.testing.assert_close((drawn @ x).norm(dim=0), x.norm(dim=0), rtol=1e-12, atol=1e-12)


@given(st.integers(2, 6), st.integers(2, 4))
@settings(max_examples=15)
def test_kronecker_18_orthogonal_factors_keep_norms(count: int, size: int) -> None:
    shape = (size,) * count
    block = KroneckerBlock(size**count, size**count, in_shape=shape, out_shape=shape, inner=None, dtype=F64)
    x = torch.randn(3, size**count, dtype=F64)
    torch.testing.assert_close(block(x).norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_kronecker_26_fluctuations() -> None:
    m = n = 28
    generator = torch.Generator().manual_seed(0)
    for x in (torch.randn(n, n, dtype=F64, generator=generator), torch.ones(n, n, dtype=F64)):
        gram = x @ x.T
        effective = float(gram.trace() ** 2 / gram.square().sum())
        drawn = torch.randn(4000, m, n, dtype=F64, generator=generator)
        sizes = (drawn @ x).square().sum((1, 2))
        assert float(sizes.var() / sizes.mean() ** 2) == pytest.approx(2 / m / effective, rel=0.1)
    x = torch.randn(n, n, dtype=F64, generator=generator)
    scatter = []
    for _ in range(50):  # our own start has none of it
        block = KroneckerBlock(784, 784, inner=None, bias="none", dtype=F64, generator=generator)
        scatter.append(float(block(x).square().sum() / x.square().sum()))
    assert max(scatter) - min(scatter) < 1e-10


def test_gains() -> None:
    assert gain(None) == 1
    assert gain(torch.relu) == pytest.approx(2, rel=1e-6)
    assert gain(nn.LeakyReLU(0.5)) == pytest.approx(2 / 1.25, rel=1e-6)
    assert gain(torch.tanh) == pytest.approx(1 / 0.3943, rel=1e-3)
    assert gain(Slopes(1.0)) == pytest.approx(1)
    assert gain(nn.PReLU(init=0.0)) == pytest.approx(2, rel=1e-6)


def test_a_start_is_reproducible() -> None:
    for initialize in (balanced_, source_):
        first, second = (
            KroneckerNetwork([64, 64, 10], 2, initialize=initialize, generator=torch.Generator().manual_seed(3))
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
