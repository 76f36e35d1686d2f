"""Kronecker blocks and networks against their definition, their extended networks and their counts."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kronecker_blocks import BIASES, F64, SHAPES, by_hand, random_block

from structmat.errors import ShapeError
from structmat.nn import KroneckerBlock, KroneckerNetwork
from structmat.nn.kronecker import Slopes, block_shape
from structmat.nn.kronecker.extended import kron
from structmat.program import cost
from structmat.program.circuit import to_circuit


@given(*(st.integers(1, 7) for _ in range(4)))
def test_kronecker_1_vectorisation_in_both_conventions(m: int, n: int, p: int, q: int) -> None:
    left, right, x = torch.randn(m, n, dtype=F64), torch.randn(p, q, dtype=F64), torch.randn(n, p, dtype=F64)
    y = left @ x @ right
    by_rows, by_columns = y.reshape(-1), y.T.reshape(-1)
    turned = right.T
    if min(m, n, p, q) > 1:
        torch.testing.assert_close(kron(left, turned), torch.kron(left, turned.contiguous()))
    torch.testing.assert_close(kron(left, turned) @ x.reshape(-1), by_rows, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(kron(turned, left) @ x.T.reshape(-1), by_columns, rtol=1e-12, atol=1e-13)
    if min(m, n, p, q) > 1:
        assert float((kron(turned, left) @ x.reshape(-1) - by_rows).abs().max()) > 1e-6, "the silent mix-up"
    # The block's linear part is the row-major one.
    block = KroneckerBlock(n * p, m * q, in_shape=(n, p), out_shape=(m, q), inner=None, bias="none", dtype=F64)
    block.chains[0].set_factors([left[None], turned[None]])
    torch.testing.assert_close(block(x.reshape(-1)), by_rows, rtol=1e-12, atol=1e-13)
    if n > 1:  # a single row is a vector
        torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", SHAPES)
def test_kronecker_2_a_block_is_its_extended_network(name: str, bias: str) -> None:
    for terms in {"mixed": (4,), "left": (1, 2, 3, 4), "right": (1, 2, 3, 4)}.get(name, (1, 3)):
        block = random_block(**{**SHAPES[name], "bias": bias, "terms": terms})
        x = torch.randn(6, *block.shape.inputs, dtype=F64)
        wanted = block(x)
        if len(block.shape.inputs) == 2:
            torch.testing.assert_close(by_hand(block, x), wanted, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(block.extended()(x.flatten(1)), wanted.flatten(1), rtol=1e-12, atol=1e-13)
        axes = [0, *reversed(range(1, x.dim()))]
        by_columns = block.extended("column")(x.permute(axes).reshape(6, -1))
        torch.testing.assert_close(by_columns, wanted.permute(axes).reshape(6, -1), rtol=1e-12, atol=1e-13)


def test_kronecker_2_with_slopes_and_with_padding() -> None:
    for inner in (Slopes(0.3), None, torch.relu):
        block = KroneckerBlock(13, 11, 2, inner=inner, dtype=F64)
        x = torch.randn(5, 13, dtype=F64)
        torch.testing.assert_close(block.extended()(x), block(x), rtol=1e-12, atol=1e-13)
    with pytest.raises(ShapeError, match="row-major"):
        block.extended("column")


@given(*(st.integers(1, 5) for _ in range(5)))
@settings(max_examples=20)
def test_kronecker_3_nonzeros_and_tied_values_are_those_of_the_table(
    m: int, n: int, p: int, q: int, terms: int
) -> None:
    k = min(terms, m * n, p * q)
    block = random_block(in_shape=(n, p), out_shape=(m, q), order="left", terms=k)
    for convention in ("row", "column"):
        first, second = block.extended(convention).layers
        assert first.weight.shape == (k * m * p, n * p)
        assert (first.nonzeros, first.distinct) == (k * m * n * p, k * m * n)
        assert first.density == pytest.approx(1 / p)
        assert second.weight.shape == (m * q, k * m * p)
        assert (second.nonzeros, second.distinct) == (k * m * p * q, k * p * q)
        assert second.density == pytest.approx(1 / m)
        for layer, uses in ((first, p), (second, m)):
            assert torch.equal(layer.weight != 0, layer.tied > 0)
            assert set(layer.tied[layer.tied > 0].unique(return_counts=True)[1].tolist()) == {uses}
            for number in layer.tied.unique()[1:3]:
                assert len(layer.weight[layer.tied == number].unique()) == 1
    extended = block.extended()
    assert extended.distinct == block.shape.weights


def test_the_picture_of_an_extended_network_shows_each_entry() -> None:
    block = random_block(in_shape=(2, 2), out_shape=(2, 2), terms=1, order="left")
    first, second = block.extended().layers
    assert first.tied.tolist() == [[1, 0, 2, 0], [0, 1, 0, 2], [3, 0, 4, 0], [0, 3, 0, 4]]
    assert second.tied.tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 1, 2], [0, 0, 3, 4]]
    picture = block.extended().draw()
    assert picture.count("hsl(") == 16
    assert "4 x 4, 8 entries" in picture
    with pytest.raises(ShapeError, match="784"):
        KroneckerBlock(784, 784).extended().draw()


MNIST = ((28, 28), (28, 28), (28, 28), (2, 5))


def test_kronecker_4_published_integers() -> None:
    square = block_shape(784, 784, in_shape=(28, 28), out_shape=(28, 28))
    assert (square.weights, square.parameters - square.weights) == (1568, 1568)
    last = block_shape(784, 10, in_shape=(28, 28), out_shape=(2, 5), order="left")
    assert last.inner_biases + 2 * 28 == 112
    assert last.outer_biases + 28 * 5 == 150
    one, two, four = (KroneckerNetwork(MNIST, k, inner=torch.tanh).counts for k in (1, 2, 4))
    assert (one.source_parameters, one.parameters) == (6_534, 6_534)
    assert (two.source_parameters, two.parameters, four.parameters) == (13_068, 11_490, 21_402)
    assert one.dense_parameters == 1_238_730
    assert KroneckerNetwork(MNIST, 2, bias="axis").counts.parameters == 8_358
    assert KroneckerNetwork(MNIST, 2, bias="outer").counts.parameters == 8_242
    assert one.weights + one.biases == one.parameters
    for counts, network in ((one, KroneckerNetwork(MNIST)), (four, KroneckerNetwork(MNIST, 4))):
        assert network.num_parameters == counts.parameters

    trunk = sum(c_out * (9 * c_in + 1) for c_in, c_out in ((3, 16), (16, 64), (64, 256)))
    assert trunk == 157_440
    sizes = ((64, 64), (64, 64), (64, 64), (2, 5))
    mixed = ("left", "right", "left", "left")
    assert trunk + KroneckerNetwork(sizes, 1).counts.source_parameters == 190_794
    assert trunk + KroneckerNetwork(sizes, 4, order=mixed).counts.source_parameters == 291_048
    assert trunk + KroneckerNetwork((4096, 4096, 10)).counts.dense_parameters == 157_440 + 16_822_282
    # Two hidden layers of 4096, as the published total has them.
    assert trunk + KroneckerNetwork(sizes).counts.dense_parameters == 33_761_034
    big = block_shape(4096, 4096, in_shape=(64, 64), out_shape=(64, 64))
    assert (big.weights, big.parameters - big.weights) == (8192, 8192)
    for order, first, second in (("left", 256, 330), ("right", 640, 138)):
        head = block_shape(4096, 10, in_shape=(64, 64), out_shape=(2, 5), order=order)
        own = (2 * 64 + 2 * 64, 64 * 5 + 10) if order == "left" else (64 * 5 + 64 * 5, 2 * 64 + 10)
        assert own == (first, second)
        assert head.parameters == first + second


def test_kronecker_4_operations() -> None:
    for k in (1, 2, 4):
        hidden = block_shape(784, 784, k, in_shape=(28, 28), out_shape=(28, 28))
        assert (hidden.macs, hidden.dense_macs) == (43_904 * k, 614_656)
        assert hidden.backward_macs() == 2 * hidden.macs
        assert hidden.backward_macs(first=True) == 2 * hidden.macs - k * 28**3
    counts = KroneckerNetwork(MNIST).counts
    assert (counts.macs, counts.dense_macs) == (89_656, 1_237_152)
    assert block_shape(784, 10, in_shape=(28, 28), out_shape=(2, 5), order="left").macs == 1_848
    assert block_shape(784, 10, in_shape=(28, 28), out_shape=(2, 5), order="right").macs == 4_200
    assert block_shape(512, 2048, in_shape=(32, 16), out_shape=(16, 128), order="left").macs == 40_960
    assert block_shape(512, 2048, in_shape=(32, 16), out_shape=(16, 128), order="right").macs == 131_072


@given(*(st.integers(1, 4) for _ in range(5)))
@settings(max_examples=15, deadline=None)
def test_kronecker_4_the_scalar_circuit_counts_the_same(m: int, n: int, p: int, q: int, terms: int) -> None:
    """Gate by gate."""
    k = min(terms, m * n, p * q)
    block = random_block(in_shape=(n, p), out_shape=(m, q), order="left", terms=k, inner=None, outer=None, bias="none")
    (program,) = block.chains[0].programs
    circuit = to_circuit(program, {name: t.detach() for name, t in block.chains[0].named_parameters()})
    found = circuit.wide
    assert found.multiplications == k * m * p * (n + q) == block.shape.macs
    assert found.additions == k * m * p * (n - 1) + m * q * (k * p - 1) == block.shape.additions
    # Weights are on edges, so that the two levels of multiplications are no gates, but where nothing is added.
    assert circuit.depth == block.shape.depth - (n > 1) - (k * p > 1)


@pytest.mark.parametrize("name", SHAPES)
def test_kronecker_4_the_plan_that_runs_counts_the_same(name: str) -> None:
    for bias in BIASES:
        block = random_block(**{**SHAPES[name], "bias": bias})
        shape = block.shape
        planned = [cost(program) for chain in block.chains for program in chain.programs]
        assert sum(c.macs for c in planned) == shape.macs
        assert sum(c.parameters for c in planned) == shape.weights
        if len(shape.inputs) == 2:
            joined = (len(block.chains) - 1) * shape.outer_array  # chains of different orders are added
            assert sum(c.flops - c.macs for c in planned) + joined == shape.additions
        assert block.num_parameters == shape.parameters
    k, (n, p), (m, q) = 3, (5, 4), (2, 7)
    shape = block_shape(n * p, m * q, k, in_shape=(n, p), out_shape=(m, q), order="left")
    assert shape.additions == k * m * p * (n - 1) + m * q * (k * p - 1)
    assert shape.depth == 2 + math.ceil(math.log2(n)) + math.ceil(math.log2(k * p))


def test_padding_is_counted_apart() -> None:
    block = KroneckerBlock(13, 11, 2, in_shape=(4, 5), out_shape=(4, 4), dtype=F64, inner=torch.tanh)
    shape = block.shape
    x = torch.randn(50, 13, dtype=F64)
    block(x).square().sum().backward()
    idle = sum(int((p.grad == 0).sum()) for n, p in block.named_parameters() if "factor0" in n and p.grad is not None)
    assert idle == shape.idle_weights == 2 * (4 + 4 - 1)
    assert block_shape(784, 784).idle_weights == 0
