"""Kronecker multi-layer networks: blocks, counts, extended networks, gradients, starts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import structmat as sm
from structmat.errors import DataError, ShapeError, StructureError
from structmat.nn import KroneckerBlock, KroneckerNetwork
from structmat.nn.kronecker import (
    Bias,
    Slopes,
    SourceTerm,
    balanced_,
    block_shape,
    calibrate_,
    choose,
    choose_all,
    from_source,
    gain,
    source_,
    to_source,
)
from structmat.nn.kronecker.extended import kron
from structmat.program import Contraction, cost, stages
from structmat.program.circuit import to_circuit
from structmat.structures import Kronecker
from structmat.structures.kronecker import Orthogonal

F64 = torch.float64
BIASES = tuple(bias.value for bias in Bias)
MIXED = ("left", "right", "left", "right")
SHAPES: dict[str, dict[str, object]] = {
    "left": {"in_shape": (3, 5), "out_shape": (4, 2), "order": "left"},
    "right": {"in_shape": (3, 5), "out_shape": (4, 2), "order": "right"},
    "mixed": {"in_shape": (3, 5), "out_shape": (4, 2), "order": MIXED, "terms": 4},
    "three factors": {"in_shape": (3, 5, 2), "out_shape": (4, 2, 3), "activated": (True, True)},
    "three factors, some places": {"in_shape": (2, 5, 3), "out_shape": (4, 2, 3), "activated": (False, True)},
    "four factors": {"in_shape": (2, 1, 2, 3), "out_shape": (2, 3, 1, 2), "activated": (True,) * 3, "order": "right"},
}


def random_block(out: int | None = None, **options: object) -> KroneckerBlock:
    """A block in float64 with nothing equal to zero."""
    features = [math.prod(options[name]) for name in ("in_shape", "out_shape")]  # type: ignore[call-overload]
    terms = options.pop("terms", 2)
    block = KroneckerBlock(*features, terms, **{"dtype": F64, "inner": torch.tanh, "outer": torch.tanh, **options})  # type: ignore[arg-type, misc]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    return block


# ---------------------------------------------------------------------------------------------------- vectorisation


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


def by_hand(block: KroneckerBlock, x: Tensor) -> Tensor:
    """The definition, written with matrices and loops over terms (two factors)."""
    total = x.new_zeros(*x.shape[:-2], *block.shape.outputs)
    for chain in block.chains:
        left, turned = chain.factors()
        bias = chain.natural_bias(chain.layout.gaps[0])
        for t in range(chain.layout.terms):
            c = 0.0 if bias is None else bias[t]
            right = turned[t].T
            if chain.layout.order == (0, 1):
                total = total + torch.tanh(left[t] @ x + c) @ right
            else:
                total = total + left[t] @ torch.tanh(x @ right + c)
    return torch.tanh(total if block.bias is None else total + block.bias.reshape(block.shape.outputs))


# ------------------------------------------------------------------------------------------------ extended networks


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


# ----------------------------------------------------------------------------------------------------------- counts

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


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("order", ["left", "right"])
def test_kronecker_6_five_formulas(order: str) -> None:
    k, (n, p), (m, q) = 3, (5, 4), (2, 7)
    block = random_block(in_shape=(n, p), out_shape=(m, q), terms=k, order=order)
    x = torch.randn(6, n, p, dtype=F64, requires_grad=True)
    (chain,) = block.chains
    y = block(x)
    g = torch.randn_like(y)
    assert block.bias is not None
    names = [chain.factor0, chain.factor1, chain.bias0, block.bias, x]
    found = torch.autograd.grad(y, names, g)  # type: ignore[arg-type]
    with torch.no_grad():
        lefts, turned = chain.factors()
        rights, bias = turned.mT, chain.natural_bias(chain.layout.gaps[0])
        assert bias is not None
        du = g * (1 - y**2)
        dl, dr, dc, dx = [], [], [], torch.zeros_like(x)
        for t in range(k):
            if order == "left":
                z = torch.tanh(lefts[t] @ x + bias[t])
                ds = (du @ rights[t].T) * (1 - z**2)
                dr.append((z.mT @ du).sum(0))
                dl.append((ds @ x.mT).sum(0))
                dx += lefts[t].T @ ds
            else:
                z = torch.tanh(x @ rights[t] + bias[t])
                ds = (lefts[t].T @ du) * (1 - z**2)
                dl.append((du @ z.mT).sum(0))
                dr.append((x.mT @ ds).sum(0))
                dx += ds @ rights[t].T
            dc.append(ds.sum(0))
    copied = copy.deepcopy(chain)
    copied.set_factors([torch.stack(dl), torch.stack(dr).mT])
    gap = chain.layout.gaps[0]
    wanted = [copied.factor0, copied.factor1, gap.from_natural(torch.stack(dc)), du.sum(0).reshape(-1), dx]
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).detach().norm()) < 1e-13 * float(b.detach().norm())


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", SHAPES)
def test_kronecker_6_gradcheck(name: str, bias: str) -> None:
    block = random_block(**{**SHAPES[name], "bias": bias, "terms": 4 if name == "mixed" else 2})
    names = [n for n, _ in block.named_parameters()]
    x = torch.randn(2, block.in_features, dtype=F64, requires_grad=True)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(block, dict(zip(names, tensors, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))
    if name in ("left", "three factors"):
        assert torch.autograd.gradgradcheck(run, (x, *block.parameters()))


@pytest.mark.parametrize("recompute", [True, False])
def test_kronecker_6_recomputing_changes_nothing(recompute: bool) -> None:
    plain = random_block(in_shape=(3, 5), out_shape=(4, 2), recompute=False, inner=Slopes(0.3))
    other = random_block(in_shape=(3, 5), out_shape=(4, 2), recompute=recompute, inner=Slopes(0.3))
    other.load_state_dict(plain.state_dict())
    x = torch.randn(7, 15, dtype=F64)
    gradients = []
    for block in (plain, other):
        gradients.append(torch.autograd.grad(block(x).square().sum(), list(block.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    """Numbers kept by the graph of a block, parameters apart."""

    def kept(recompute: bool) -> int:
        block = KroneckerBlock(784, 784, 2, inner=torch.tanh, outer=None, recompute=recompute)
        own = {p.data_ptr() for p in block.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own and tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.data_ptr()] = tensor.numel()
            return tensor

        x = torch.randn(64, 784)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(x)
        return sum(seen.values())

    assert kept(True) == 64 * 784
    assert kept(False) >= 64 * 784 * 3


@pytest.mark.parametrize("order", ["left", "right", MIXED])
def test_kronecker_7_gauge_identity(order: object) -> None:
    block = random_block(in_shape=(3, 5), out_shape=(4, 2), terms=4, order=order, inner=torch.relu)
    block(torch.randn(9, 15, dtype=F64)).square().sum().backward()
    for chain in block.chains:
        first, last = chain.layout.order
        gap = chain.layout.gaps[0]
        weight = [(chain.get_parameter(f"factor{i}"), chain.factors()[i]) for i in (0, 1)]
        products = []
        for index in (first, last):
            held, shown = weight[index]
            assert held.grad is not None
            with torch.no_grad():
                grads = copy.deepcopy(chain)
                grads.get_parameter(f"factor{index}").copy_(held.grad)
                products.append((shown * grads.factors()[index]).sum((1, 2)))
        bias = chain.get_parameter("bias0")
        assert bias.grad is not None
        inner = (gap.to_natural(bias) * gap.to_natural(bias.grad)).sum((1, 2))
        torch.testing.assert_close(products[0] + inner, products[1], rtol=1e-11, atol=1e-11)


# ----------------------------------------------------------------------------------------------------------- theory


def shifted(block: KroneckerBlock, x: Tensor) -> None:
    """The bias shift of the inclusion theorem."""
    with torch.no_grad():
        for chain in block.chains:
            (gap,) = chain.layout.gaps
            chain.get_parameter("bias0").zero_()
            hidden = chain.hidden(x)[0][1].unflatten(-1, gap.sizes)
            chain.get_parameter("bias0").copy_((-hidden.amin(0)).clamp(min=0))
        assert block.bias is not None
        block.bias.zero_()
        block.bias.sub_(block.linear(x[:1])[0] - linear_sum(block, x[:1])[0])


def linear_sum(block: KroneckerBlock, x: Tensor) -> Tensor:
    """The sum of Kronecker products alone, by the dense matrix."""
    dense = sum(kron(a, b) for a, b in zip(*block.factors(), strict=True))
    return x @ dense.T


def test_kronecker_13_linear_sums_are_contained() -> None:
    block = random_block(in_shape=(3, 5), out_shape=(4, 2), terms=3, inner=torch.relu, outer=None, order="left")
    x = torch.randn(40, 15, dtype=F64)
    shifted(block, x)
    torch.testing.assert_close(block(x), linear_sum(block, x), rtol=1e-12, atol=1e-12)

    # phi(L X) R - phi(-L X) R, everywhere, with twice the terms.
    pair = random_block(
        in_shape=(3, 5), out_shape=(4, 2), terms=6, inner=torch.relu, outer=None, bias="none", order="left"
    )
    left, right = (f.detach() for f in random_block(in_shape=(3, 5), out_shape=(4, 2), terms=3).factors())
    pair.chains[0].set_factors([torch.cat([left, -left]), torch.cat([right, -right])])
    dense = sum(kron(a, b) for a, b in zip(left, right, strict=True))
    x = 10 * torch.randn(40, 15, dtype=F64)
    torch.testing.assert_close(pair(x), x @ dense.T, rtol=1e-12, atol=1e-11)

    # A smooth activation near 0: the error falls with the square of the scale.
    errors = []
    for scale in (1e-2, 1e-3):
        small = random_block(in_shape=(3, 5), out_shape=(4, 2), terms=3, outer=None, bias="none", order="left")
        small.chains[0].set_factors([scale * left, right / scale])
        errors.append(float((small(x / 10) - x @ dense.T / 10).detach().norm()))
    assert errors[0] / errors[1] == pytest.approx(100, abs=5)


def test_kronecker_15_ranks_and_orders() -> None:
    a, b = torch.randn(3, 4, dtype=F64), torch.randn(5, 2, dtype=F64)
    values = (torch.linalg.svdvals(a)[:, None] * torch.linalg.svdvals(b)).flatten().sort(descending=True)[0]
    torch.testing.assert_close(torch.linalg.svdvals(kron(a, b))[: len(values)], values)
    assert int(torch.linalg.matrix_rank(kron(a, b))) == 3 * 2
    x = torch.randn(9, 15, dtype=F64)
    for inner, agree in ((None, True), (torch.tanh, False)):
        blocks = [
            random_block(in_shape=(3, 5), out_shape=(4, 2), terms=2, bias="none", inner=inner, order=order)
            for order in ("left", "right")
        ]
        blocks[1].chains[0].set_factors(blocks[0].factors())
        difference = float((blocks[0](x) - blocks[1](x)).detach().abs().max())
        assert (difference < 1e-12) if agree else (difference > 1e-3)


def test_kronecker_16_dimension_is_the_rank_of_the_jacobian() -> None:
    for k, (m, n), (p, q) in ((2, (3, 2), (2, 4)), (1, (3, 2), (2, 2)), (3, (2, 2), (3, 3)), (4, (2, 2), (2, 3))):
        shape = block_shape(n * p, m * q, k, in_shape=(n, p), out_shape=(m, q), bias="none")

        def product(flat: Tensor, k: int = k, sizes: tuple[int, ...] = (m, n, q, p)) -> Tensor:
            a, b = flat.split([k * sizes[0] * sizes[1], k * sizes[2] * sizes[3]])
            return torch.einsum("tmn,tqp->mqnp", a.view(k, *sizes[:2]), b.view(k, *sizes[2:]))

        jacobian = torch.autograd.functional.jacobian(product, torch.randn(shape.weights, dtype=F64))
        assert int(torch.linalg.matrix_rank(jacobian.reshape(-1, shape.weights))) == shape.degrees_of_freedom
        assert shape.degrees_of_freedom == k * (m * n + p * q - k)


def test_kronecker_17_decay_of_factors_is_the_nuclear_norm() -> None:
    from structmat.projection.kronecker import rearrange

    pairs = ((3, 4), (5, 2))
    matrix = torch.randn(15, 8, dtype=F64)
    nuclear = float(torch.linalg.svdvals(rearrange(matrix, pairs)).sum())
    found = sm.project(matrix, Kronecker(10, pairs))
    linear = sm.nn.StructuredLinear.from_matrix(found.matrix)
    block = KroneckerBlock.from_structured(linear)
    factors = [f.detach().flatten(1) for f in block.factors()]
    assert 0.5 * sum(float(f.square().sum()) for f in factors) == pytest.approx(nuclear, rel=1e-10)
    for _ in range(20):  # any other factors of the same matrix: mixed over the terms by an invertible matrix
        mix = torch.randn(10, 10, dtype=F64)
        mixed = [mix @ factors[0], torch.linalg.inv(mix).T @ factors[1]]
        torch.testing.assert_close(mixed[0].T @ mixed[1], factors[0].T @ factors[1], rtol=1e-7, atol=1e-7)
        assert 0.5 * sum(float(f.square().sum()) for f in mixed) >= nuclear * (1 - 1e-9)


# ----------------------------------------------------------------------------------------------------------- starts


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


# ----------------------------------------------------------------------------------------------------- as a module


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 3)])
def test_kronecker_21_batch_shapes(lead: tuple[int, ...]) -> None:
    block = random_block(in_shape=(3, 5), out_shape=(4, 2))
    x = torch.randn(*lead, 15, dtype=F64)
    y = block(x)
    assert y.shape == (*lead, 8)
    as_matrices = block(x.unflatten(-1, (3, 5)))
    assert as_matrices.shape == (*lead, 4, 2)
    torch.testing.assert_close(as_matrices.flatten(-2), y)
    turned = torch.randn(15, *lead, dtype=F64).movedim(0, -1)
    torch.testing.assert_close(block(turned), block(turned.contiguous()))
    gradient = torch.autograd.grad(y.sum(), list(block.parameters()))
    assert all(g.isfinite().all() for g in gradient)
    network = KroneckerNetwork([(3, 5), 12, (2, 2)], dtype=F64)
    torch.testing.assert_close(network(x), network(x.unflatten(-1, (3, 5))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_kronecker_21_dtypes(dtype: torch.dtype) -> None:
    exact = KroneckerBlock(784, 784, 2, inner=torch.tanh, dtype=F64)
    block = copy.deepcopy(exact).to(dtype)
    x = torch.randn(16, 784, dtype=F64).to(dtype)
    rounded = copy.deepcopy(block).to(F64)
    wanted = rounded(x.to(F64))
    error = float((block(x).to(F64) - wanted).norm() / wanted.norm())
    assert error < 2 * 3 * torch.finfo(dtype).eps, "two roundings a stage, and one of the activation"
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(exact).float()(x.float()).dtype == torch.bfloat16


def test_kronecker_21_transforms_and_state() -> None:
    block = random_block(in_shape=(3, 5), out_shape=(4, 2), terms=2)
    x = torch.randn(6, 15, dtype=F64)
    wanted = block(x)
    torch.testing.assert_close(torch.func.vmap(block)(x), wanted)
    by_rows = torch.func.vmap(torch.func.grad(lambda row: block(row).sum()))(x)
    torch.testing.assert_close(by_rows, torch.autograd.functional.jacobian(lambda v: block(v).sum(), x))
    other = random_block(in_shape=(3, 5), out_shape=(4, 2), terms=2)
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), wanted)
    assert torch.equal(copy.deepcopy(block)(x), wanted)
    with torch.device("meta"):
        empty = KroneckerBlock(15, 8)
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.slow
def test_kronecker_21_compiles() -> None:
    block = random_block(in_shape=(3, 5), out_shape=(4, 2), terms=2)
    x = torch.randn(6, 15, dtype=F64, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    found, wanted = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, block))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("out_features", [1, 2, 3, 7, 13, 97, 1021])
def test_kronecker_20_blocks_of_any_size(out_features: int) -> None:
    for in_features in (1, 5, 10, 64, 97, 784):
        for factors in (2, 3):
            block = KroneckerBlock(in_features, out_features, factors=factors, inner=torch.tanh, dtype=F64)
            x = torch.randn(3, in_features, dtype=F64)
            y = block(x)
            assert y.shape == (3, out_features)
            if in_features * out_features < 5000:
                torch.testing.assert_close(block.extended()(x), y, rtol=1e-11, atol=1e-12)


def test_what_is_refused_says_why() -> None:
    with pytest.raises(ShapeError, match=r"holds 6 numbers, the block has 7"):
        KroneckerBlock(7, 6, in_shape=(2, 3))
    with pytest.raises(ShapeError, match="2 axes"):
        KroneckerBlock(8, 6, in_shape=(2, 4), out_shape=(2, 3, 1))
    with pytest.raises(StructureError, match="1 to 4 terms"):
        KroneckerBlock(6, 6, 5, in_shape=(2, 3), out_shape=(2, 3))
    for order in ("up", (0, 0), (0, 1, 2)):
        with pytest.raises(StructureError, match="no order of 2 factors"):
            KroneckerBlock(6, 6, order=order)
    with pytest.raises(StructureError, match="3 orders"):
        KroneckerBlock(6, 6, 2, order=("left", "right", "left"))
    with pytest.raises(ShapeError, match="in_features=6"):
        KroneckerBlock(6, 6)(torch.randn(4, 7))
    with pytest.raises(ShapeError, match="padded"):
        KroneckerBlock(7, 7)(torch.randn(2, 4))
    with pytest.raises(StructureError, match="at least two factors"):
        KroneckerBlock(6, 6, factors=1)
    with pytest.raises(StructureError, match="places between stages"):
        KroneckerBlock(6, 6, activated=(True, True))
    with pytest.raises(StructureError, match="between the factors"):
        KroneckerBlock(6, 6, outer=Slopes())
    with pytest.raises(ValueError, match="wide"):
        KroneckerBlock(6, 6, bias="wide")
    with pytest.raises(ShapeError, match="at least two sizes"):
        KroneckerNetwork([784])
    with pytest.raises(ShapeError, match="got 2 terms"):
        KroneckerNetwork([784, 10], (1, 2))
    with pytest.raises(ShapeError, match="20 outputs"):
        KroneckerNetwork.of([block_shape(10, 20), block_shape(30, 10)])


# ------------------------------------------------------------------------------------------------- budgets, sources


@pytest.mark.parametrize("bias", BIASES)
def test_chosen_shapes_are_within_the_budget_and_none_is_better(bias: str) -> None:
    for unit in ("parameters", "macs"):
        for budget in (300, 1000):
            found = choose(60, 48, **{unit: budget}, bias=bias)  # type: ignore[arg-type]
            best = found[0]
            assert all(getattr(shape, unit) <= budget for shape in found)
            even = [s for s in found if min(*s.inputs, *s.outputs) > 1 and max(*s.inputs, *s.outputs) <= 32]
            assert best.degrees_of_freedom == max(s.degrees_of_freedom for s in even)
            block = KroneckerBlock.for_budget(60, 48, **{unit: budget}, bias=bias)  # type: ignore[arg-type]
            assert block.shape == best
            again = dict.fromkeys((s.inputs, s.outputs, s.orders[0]) for s in found)
            assert len(again) == len(found)
    assert any((s.inputs, s.outputs) == ((1, 60), (48, 1)) for s in choose(60, 48, macs=2000)), "the low-rank corner"
    with pytest.raises(StructureError, match="the smallest has"):
        choose(60, 48, parameters=10)
    with pytest.raises(StructureError, match="not both"):
        choose(60, 48)


def test_networks_for_a_budget() -> None:
    for unit, budget in (("parameters", 8000), ("parameters", 30_000), ("macs", 120_000)):
        network = KroneckerNetwork.for_budget([784, 784, 784, 10], **{unit: budget})  # type: ignore[arg-type]
        spent = getattr(network.counts, unit)
        assert 0.95 * budget <= spent <= budget
        assert network(torch.randn(2, 784)).shape == (2, 10)
    # Brute force on a small case: the product of degrees of freedom is largest.
    sizes = (12, 8, 6)
    best = math.prod(s.degrees_of_freedom for s in choose_all(sizes, parameters=150, bias="none"))
    options = [
        [
            block_shape(a, b, k, in_shape=n, out_shape=m, bias="none")
            for n in [(i, a // i) for i in range(2, a) if a % i == 0]
            for m in [(i, b // i) for i in range(2, b) if b % i == 0]
            for k in range(1, min(m[0] * n[0], m[1] * n[1], a * b // (m[0] * n[0] + m[1] * n[1])) + 1)
        ]
        for a, b in itertools.pairwise(sizes)
    ]
    brute = max(
        math.prod(s.degrees_of_freedom for s in pick)
        for pick in itertools.product(*options)
        if sum(s.parameters for s in pick) <= 150
    )
    assert best == brute
    with pytest.raises(StructureError, match="the smallest has"):
        choose_all([784, 784, 10], macs=100)


def test_published_layout_round_trips() -> None:
    block = random_block(in_shape=(3, 5), out_shape=(4, 2), terms=4, order=MIXED)
    terms = to_source(block)
    assert [t.order for t in terms] == ["left", "left", "right", "right"]
    again = from_source(terms)
    x = torch.randn(6, 3, 5, dtype=F64)
    torch.testing.assert_close(again(x), block(x))
    # The published formula, with an outer bias for every term.
    given = [
        SourceTerm(*(torch.randn(s, dtype=F64) for s in ((4, 3), (5, 2), (4, 5), (4, 2)))),
        SourceTerm(*(torch.randn(s, dtype=F64) for s in ((4, 3), (5, 2), (3, 2), (4, 2))), order="right"),
    ]
    a, b = given
    wanted = torch.tanh(
        torch.tanh(a.left @ x + a.inner_bias) @ a.right
        + a.outer_bias
        + b.left @ torch.tanh(x @ b.right + b.inner_bias)
        + b.outer_bias
    )
    torch.testing.assert_close(from_source(given)(x), wanted)
    with pytest.raises(ShapeError, match="Term 1"):
        from_source([a, SourceTerm(a.left, a.right, b.inner_bias, a.outer_bias)])
    with pytest.raises(ShapeError, match="without padding"):
        to_source(KroneckerBlock(7, 7))


def test_linear_relatives_round_trip() -> None:
    for pairs in (((3, 5), (4, 2)), ((5, 3), (2, 4)), ((2, 3), (3, 2), (2, 2))):
        shape = (math.prod(m for m, _ in pairs), math.prod(n for _, n in pairs))
        layer = sm.nn.StructuredLinear(shape[1], shape[0], structure=Kronecker(2, pairs), dtype=F64)
        x = torch.randn(5, shape[1], dtype=F64)
        block = KroneckerBlock.from_structured(layer)
        torch.testing.assert_close(block(x), layer(x), rtol=1e-12, atol=1e-13)
        assert block.is_linear()
        torch.testing.assert_close(block.to_structured()(x), layer(x), rtol=1e-12, atol=1e-13)
        if len(pairs) > 2:  # too short for activations by default
            assert not list(block.slopes())
            continue
        for slope in block.slopes():
            slope.data.fill_(0.5)
        assert not block.is_linear()
        with pytest.raises(StructureError, match="not linear"):
            block.to_structured()
    # Inner biases and orders are absorbed.
    block = random_block(in_shape=(3, 5), out_shape=(4, 2), terms=4, order=MIXED, inner=None, outer=None)
    x = torch.randn(5, 15, dtype=F64)
    torch.testing.assert_close(block.to_structured()(x), block(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(StructureError, match="LowRank"):
        KroneckerBlock.from_structured(sm.nn.StructuredLinear(8, 8, structure=sm.LowRank(2)))


@pytest.mark.parametrize("inner", [None, torch.relu, Slopes(0.2)])
@pytest.mark.parametrize("name", SHAPES)
def test_balancing_keeps_the_function(name: str, inner: Callable[[Tensor], Tensor] | None) -> None:
    block = random_block(**{**SHAPES[name], "inner": inner})
    with torch.no_grad():
        block.chains[0].get_parameter("factor0").mul_(100)
    x = torch.randn(7, block.in_features, dtype=F64)
    before, norms = block(x), block.term_norms()
    block.balance_()
    torch.testing.assert_close(block(x), before, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(block.term_norms(), norms)
    for others in block.factors()[1:]:
        torch.testing.assert_close(others.flatten(1).norm(dim=1), block.factors()[0].flatten(1).norm(dim=1))


def test_explain_says_what_runs() -> None:
    text = KroneckerBlock(784, 784, 2, inner=torch.tanh).explain(128)
    assert "the input alone" in text
    assert f"{128 * 2 * 43_904} multiply-adds" in text
    assert "then tanh" in text
    assert text.count("with gradients: PyTorch operations without a graph inside") == 2
    other = KroneckerBlock(784, 784, 2, inner=nn.GELU()).explain(128)
    assert "without gradients: " in other
    assert "without a graph" not in other
    assert "slope" in repr(KroneckerBlock(8, 8, inner=Slopes())).lower()


def test_modules_as_activations() -> None:
    block = KroneckerBlock(64, 64, 2, inner=nn.Sequential(nn.GELU(), nn.Dropout(0.5)), outer=nn.Tanh())
    x = torch.randn(4, 64)
    block.eval()
    assert torch.equal(block(x), block(x))
    block.train()
    assert not torch.equal(block(x), block(x))
    learned = KroneckerBlock(64, 64, inner=nn.PReLU())
    learned(x).sum().backward()
    assert all(p.grad is not None for p in learned.parameters())


def test_a_start_is_reproducible() -> None:
    for initialize in (balanced_, source_):
        first, second = (
            KroneckerNetwork([64, 64, 10], 2, initialize=initialize, generator=torch.Generator().manual_seed(3))
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@given(*(st.integers(1, 5) for _ in range(4)), st.integers(2, 4))
@settings(max_examples=15, deadline=None)
def test_kronecker_19_mixed_orders_are_a_sum_of_chains(m: int, n: int, p: int, q: int, terms: int) -> None:
    """Form 4: terms of one order are stacked in one chain; its stages have the stated shapes."""
    k = min(terms, m * n, p * q)
    block = random_block(
        in_shape=(n, p), out_shape=(m, q), order=MIXED[:k], terms=k, inner=None, outer=None, bias="none"
    )
    dense = sum(kron(a, b) for a, b in zip(*block.factors(), strict=True))
    x = torch.randn(3, n * p, dtype=F64)
    torch.testing.assert_close(block(x), x @ dense.T, rtol=1e-11, atol=1e-11)
    assert len(block.chains) == len(set(MIXED[:k]))
    for chain in block.chains:
        (program,) = chain.programs
        t = chain.layout.terms
        found = [(s.a, s.b, s.c, s.d) for s in stages(program) if isinstance(s, Contraction)]
        if chain.layout.order == (0, 1):
            assert found == [(1, m * t, n, p), (m, q, t * p, 1)]
        else:
            assert found == [(n, q * t, p, 1), (1, m, n * t, q)]


@pytest.mark.parametrize("inner", [torch.tanh, Slopes(0.5), nn.GELU()])
def test_kronecker_19_blocks_form_no_product(inner: Callable[[Tensor], Tensor]) -> None:
    """Nothing of a 1024 x 1024 block, forward or backward, comes near the size of the matrix."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    block = KroneckerBlock(1024, 1024, 4, inner=inner)
    x = torch.randn(2, 1024, requires_grad=True)
    with Watch():
        block(x).square().sum().backward()
    assert 2 * 1024 <= largest < 1024 * 1024 // 4
    with Watch(), sm.backend("reference"):
        block(x).square().sum().backward()
    assert 2 * 4 * 1024 <= largest < 1024 * 1024 // 4  # all hidden values of the terms


def test_kronecker_21_saving_and_loading(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return KroneckerNetwork([(8, 8), 64, (2, 5)], 2, inner=Slopes(0.3), outer=torch.relu)

    model = build()
    sm.save(model, tmp_path / "saved")
    again = sm.load(tmp_path / "saved", build())
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))


def test_the_way_without_a_graph_gives_the_same_gradients() -> None:
    """Against the generic way, which modules take: for every order, bias and activation that it knows."""
    pairs = ((torch.tanh, nn.Tanh()), (torch.relu, nn.ReLU()), (None, nn.Identity()))
    for (fast, module), bias, order, recompute in itertools.product(
        pairs, BIASES, ("left", "right", MIXED), (True, False)
    ):
        options = {"in_shape": (3, 5), "out_shape": (4, 2), "terms": 4, "order": order, "bias": bias}
        first = random_block(**options, inner=fast, recompute=recompute)
        second = random_block(**options, inner=module)
        second.load_state_dict(first.state_dict())
        x = torch.randn(2, 3, 15, dtype=F64, requires_grad=True)
        found = [torch.autograd.grad(b(x).square().sum(), [x, *b.parameters()]) for b in (first, second)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        frozen = first.chains[0].factor0
        frozen.requires_grad_(False)
        loss = first(x.detach()).square().sum()
        assert all(g is not None for g in torch.autograd.grad(loss, [p for p in first.parameters() if p.requires_grad]))
