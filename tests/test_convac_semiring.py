"""Semirings: range, exactness and gradients."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from structmat.errors import DataError
from structmat.nn import ConvAC, ModeTree
from structmat.nn.convac.semiring import (
    Log,
    MaxProduct,
    Plain,
    RootMeanSquare,
    Scaled,
    Semiring,
    SignedLog,
    State,
    power_of_two,
    shift,
)
from structmat.nn.convac.weights import Weights, dirichlet_, normal_, orthogonal_
from structmat.nn.convac.windows import window_product

F64 = torch.float64


def random_network(
    modes: int, channels: int, width: int, outputs: int, dtype: torch.dtype, seed: int = 0, window: int = 2,
    **options: object,
) -> ConvAC:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    options.setdefault("sharing", "unshared")
    signed = options.get("constraint", "none") == "none"
    draw = normal_ if signed else dirichlet_
    options.setdefault("initialize", lambda w: draw(w, generator=generator))
    tree = ModeTree.sequence(modes, window)
    return ConvAC(None, tree, width, outputs, channels=channels, dtype=dtype, **options)  # type: ignore[arg-type]


def inputs(*shape: int, dtype: torch.dtype = F64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("modes", [1, 3, 8, 32])
@pytest.mark.parametrize("window", [2, 3, 4, 32])
@pytest.mark.parametrize("sharing", ["shared", "window", "unshared"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_convac_12_scaled_is_bit_identical_to_plain(modes: int, window: int, sharing: str, dtype: torch.dtype) -> None:
    net = random_network(modes, 4, 5, 3, dtype, window=window, sharing=sharing)
    x = inputs(6, 4, modes, dtype=dtype)
    scaled = net(x)
    scaled.sum().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.semiring = Plain()
    net.zero_grad()
    plain = net(x)
    plain.sum().backward()
    assert bool((plain != 0).any())
    assert torch.equal(scaled, plain)
    tolerance = 1e-12 if dtype == F64 else 1e-4
    for got, parameter in zip(gradients, net.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(got, parameter.grad, rtol=tolerance, atol=tolerance * float(parameter.grad.abs().max()))


def reference(net: ConvAC, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sign and logarithm by 80-bit arithmetic on the same rounded numbers."""
    state = x.permute(2, 0, 1).numpy().astype(np.longdouble)  # (locations, batch, channels)
    for level in range(len(net.tree.levels)):
        matrices = net.edge_matrices(level)
        state = np.stack(
            [
                (state[2 * w] @ matrices[w, 0].detach().numpy().astype(np.longdouble).T)
                * (state[2 * w + 1] @ matrices[w, 1].detach().numpy().astype(np.longdouble).T)
                for w in range(len(net.tree.levels[level]))
            ]
        )
    scores = state[0] @ net.output_matrix().detach().numpy().astype(np.longdouble).T
    return np.sign(scores), np.log(np.abs(scores))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-2)])
def test_convac_12_a_thousand_patches_with_signed_weights(dtype: torch.dtype, tolerance: float) -> None:
    net = random_network(1024, 8, 16, 10, dtype)
    x = inputs(16, 8, 1024, dtype=dtype)
    sign, log = reference(net, x)
    with torch.no_grad():
        got = net.signed_log(x)
        assert bool((got.sign.double().numpy() == sign).all())
        assert float(np.abs(got.log.numpy() - log).max()) <= tolerance
        if dtype == torch.float32:
            net.semiring = Plain()
            assert bool((net(x) == 0).all()), "plain float32 underflows here"
        else:
            net.semiring = SignedLog()
            other = net.signed_log(x)
            assert bool((other.sign.numpy() == sign).all())
            assert float((other.log - got.log).abs().max()) <= 1e-9


def test_convac_12_gradients_of_a_thousand_patches_in_float32() -> None:
    net = random_network(1024, 4, 6, 2, torch.float32)
    x = inputs(4, 4, 1024, dtype=torch.float32).requires_grad_()
    net.signed_log(x).log.mean().backward()
    assert x.grad is not None
    in_double = random_network(1024, 4, 6, 2, F64)
    in_double.load_state_dict({n: t.double() for n, t in net.state_dict().items()})
    y = x.detach().double().requires_grad_()
    in_double.signed_log(y).log.mean().backward()
    assert y.grad is not None
    assert float((x.grad - y.grad).norm() / y.grad.norm()) < 1e-3


@pytest.mark.parametrize("factor", [1e-30, 1e30])
@pytest.mark.parametrize("window", [2, 4, 64])
def test_weights_and_inputs_far_from_one_stay_in_range(factor: float, window: int) -> None:
    net = random_network(64, 3, 4, 1, torch.float32, window=window)
    x = inputs(2, 3, 64, dtype=torch.float32)
    before = net.signed_log(x).log
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(factor)
    after = net.signed_log(x * factor).log
    edges = sum(1 for level in range(len(net.tree.levels)) for _ in net.tree.edges(level)) + 1
    # Each leaf passes all levels; each edge's matrix is multiplied in once.
    shift_of_log = (64 + edges) * math.log(factor)
    assert torch.allclose(after - before, torch.tensor(shift_of_log, dtype=F64), rtol=1e-5)


def exact(net: ConvAC, x: Tensor) -> Fraction:
    """The first output in rational arithmetic."""
    rows = [[Fraction(float(v)) for v in column] for column in x[0].T]
    for level in range(len(net.tree.levels)):
        matrices = {k: m.tolist() for k, m in net.edge_matrices(level).items()}
        pooled = []
        for w in range(len(net.tree.levels[level])):
            factors = [
                [
                    sum((Fraction(a) * v for a, v in zip(row, rows[2 * w + p], strict=True)), Fraction(0))
                    for row in matrices[w, p]
                ]
                for p in range(2)
            ]
            pooled.append([a * b for a, b in zip(*factors, strict=True)])
        rows = pooled
    return sum((Fraction(a) * v for a, v in zip(net.output_matrix()[0].tolist(), rows[0], strict=True)), Fraction(0))


def test_scaled_agrees_with_rational_arithmetic() -> None:
    net = random_network(16, 3, 3, 1, F64)
    x = inputs(1, 3, 16)
    true = exact(net, x)
    assert abs(Fraction(float(net(x).detach())) / true - 1) < Fraction(1, 10**12)


@pytest.mark.parametrize("semiring", [Plain(), Scaled(), Log(), SignedLog()], ids=str)
def test_convac_13_gradients_by_finite_differences(semiring: Semiring) -> None:
    constraint = "simplex" if semiring == Log() else "none"
    net = random_network(8, 2, 2, 1, F64, semiring=semiring, constraint=constraint)
    x = (inputs(2, 2, 8).abs() + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: net.signed_log(v).log, (x,))
    names = [n for n, _ in net.named_parameters()]

    def of_weights(*values: Tensor) -> Tensor:
        changed = dict(zip(names, values, strict=True))
        return torch.func.functional_call(net, changed, (x.detach(),))

    assert torch.autograd.gradcheck(of_weights, tuple(p for p in net.parameters()))


def test_convac_13_gradients_of_normalised_networks() -> None:
    """Differentiated through the normalisation, for inputs and weights."""
    net = random_network(8, 2, 2, 2, F64, semiring=RootMeanSquare())
    x = (inputs(2, 2, 8).abs() + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(net, (x,))
    names = [n for n, _ in net.named_parameters()]

    def of_weights(*values: Tensor) -> Tensor:
        scores: Tensor = torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x.detach(),))
        return scores

    assert torch.autograd.gradcheck(of_weights, tuple(net.parameters()))


def test_convac_13_max_product_passes_the_gradient_to_the_maximum() -> None:
    net = random_network(8, 2, 3, 1, F64, semiring=MaxProduct(), constraint="simplex")
    x = (inputs(2, 2, 8).abs() + 0.2).log().exp().requires_grad_()
    assert torch.autograd.gradcheck(net, (x,))


@pytest.mark.parametrize("zeros", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("semiring", [Plain(), Scaled()], ids=str)
def test_convac_13_products_of_windows_with_zeros(zeros: int, semiring: Semiring) -> None:
    x = inputs(3, 4, 2)
    x[:, :zeros] = 0
    x.requires_grad_()
    got = semiring.values(window_product(semiring, semiring.lift(x, logarithm=False), 4))
    got.sum().backward()
    factors = x.detach()
    for position in range(4):
        others = [factors[:, p] for p in range(4) if p != position]
        assert x.grad is not None
        assert torch.allclose(x.grad[:, position], others[0] * others[1] * others[2], rtol=1e-14, atol=0)


def test_convac_13_scaled_gradients_at_zero_leaves_and_weights_are_those_of_plain() -> None:
    gradients = []
    for semiring in (Plain(), Scaled()):
        net = random_network(8, 2, 3, 1, F64, semiring=semiring)
        with torch.no_grad():
            net.layers[0][0].weights.weight[0, 0] = 0
        x = inputs(2, 2, 8)
        x[0, :, 3] = 0
        x[1, 0] = 0
        x.requires_grad_()
        net(x).sum().backward()
        gradients.append([x.grad, *(p.grad for p in net.parameters())])
    for plain, scaled in zip(*gradients, strict=True):
        assert torch.allclose(plain, scaled, rtol=1e-12, atol=1e-15)
    assert float(gradients[0][0][0, :, 3].abs().max()) > 0, "a zero leaf has a gradient"


@pytest.mark.parametrize("semiring", [Log(), SignedLog()], ids=str)
def test_convac_13_log_states_take_zero_gradients_at_zero_leaves(semiring: Semiring) -> None:
    net = random_network(8, 2, 3, 2, F64, semiring=semiring, constraint="simplex")
    leaves = torch.rand(2, 2, 8, dtype=F64).log()
    leaves[0, 0, 2] = -torch.inf
    leaves[1, :, 5] = -torch.inf
    leaves.requires_grad_()
    net.representation = AsLogarithms()
    log = net.signed_log(leaves).log
    assert bool((log[1] == -torch.inf).all())
    assert bool(log[0].isfinite().all())
    log[0].sum().backward()
    grad = leaves.grad
    assert grad is not None
    assert bool(grad.isfinite().all())
    assert grad[0, 0, 2] == 0
    assert bool((grad[1] == 0).all())
    net.zero_grad()
    (net.signed_log(leaves).log.clamp(min=-1e30)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


class AsLogarithms(torch.nn.Module):
    logarithm = True

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_log_leaves_mean_the_same_in_every_semiring() -> None:
    x = torch.rand(3, 2, 8, dtype=F64) * 200 - 300
    results = []
    for semiring in (Scaled(), Log(), SignedLog(), Plain()):
        net = random_network(8, 2, 3, 2, F64, semiring=semiring, constraint="simplex")
        net.representation = AsLogarithms()
        results.append(net.signed_log(x).log)
    assert torch.allclose(results[0], results[1], rtol=1e-10)
    assert torch.allclose(results[2], results[1], rtol=1e-10)
    assert bool((results[3] == -torch.inf).all()), "plain has underflown"


def test_powers_of_two_are_exact() -> None:
    for dtype, least, most in ((torch.float32, -126, 127), (F64, -1022, 1023)):
        exponents = torch.arange(least, most + 1)
        got = power_of_two(exponents, dtype)
        assert got.tolist() == [math.ldexp(1.0, e) for e in range(least, most + 1)]
    small = torch.tensor([1e-45], dtype=torch.float32)
    assert float(shift(small, torch.tensor([149]))) == 1.0


def test_a_value_out_of_range_is_infinite_or_zero_never_wrong() -> None:
    for dtype in (torch.float32, F64):
        for exponent in (-5000, -1074, -149, 0, 127, 1023, 5000):
            state = State(torch.tensor([[[1.5]]], dtype=dtype), torch.tensor([[exponent]]))
            expected = torch.tensor(math.ldexp(1.5, exponent) if exponent < 1024 else math.inf, dtype=F64).to(dtype)
            assert float(Scaled().values(state)) == float(expected)


def test_negative_leaves_are_refused_in_log_space() -> None:
    net = random_network(4, 2, 2, 1, F64, semiring=Log(), constraint="positive")
    with pytest.raises(DataError, match="negative"):
        net(-torch.ones(1, 2, 4, dtype=F64))


def test_orthogonal_weights_are_frames() -> None:
    weights = Weights(3, (5, 2), None, random_network(2, 2, 2, 1, F64).constraint, dtype=F64)
    orthogonal_(weights)
    assert torch.allclose(weights.dense().transpose(1, 2) @ weights.dense(), torch.eye(2, dtype=F64), atol=1e-14)
