"""Circuits of Python functions: NumPy and PyTorch operations, parameters, and what has no circuit."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from scipy import linalg
from torch import Tensor, nn

from structmat.circuit import Builder, Rationals, Tracer, equal, trace
from structmat.circuit.torch_trace import trace_torch
from structmat.circuit.tracer import as_tracer
from structmat.errors import CircuitError

A = np.arange(12.0).reshape(3, 4) - 5
EXACT = Rationals()

LINEAR: dict[str, tuple[Callable[[Any], Any], int | tuple[int, ...]]] = {
    "matrix": (lambda x: A @ x, 4),
    "matrix from the right": (lambda x: x @ A, (2, 3)),
    "arithmetic": (lambda x: 2 * x[::2] - x[1::2] / 4 + -x[:2], 4),
    "sums": (lambda x: [np.sum(x), x.sum(axis=0), np.mean(x, axis=1, keepdims=True), np.add.reduce(x)], (3, 4)),
    "moves": (lambda x: np.roll(np.flip(x.T, 0), 1).reshape(-1)[[0, 3, 3]], (2, 3)),
    "stacks": (lambda x: np.stack([np.concatenate([x, 2 * x]), np.tile(x, 2)]), 3),
    "constants beside": (lambda x: np.concatenate([x, np.zeros(2)]), 3),
    "pad": (lambda x: [np.pad(x, 2), np.pad(x, 2, mode="wrap")], 3),
    "einsum": (lambda x: [np.einsum("ij,kj->ik", A, x), np.einsum("ii", x[:2, :2]), np.einsum("ij->j", x)], (2, 4)),
    "differences": (lambda x: [np.diff(x, 2), np.cumsum(x), np.cumsum(x.reshape(2, 2), axis=1)], 4),
    "running sums": (lambda x: [np.cumsum(2 * x, axis=1), np.cumsum(x[::-1] * A, axis=0), x.cumsum()], (3, 4)),
    "products": (lambda x: [np.kron(A, x), np.outer(A[0], x[0]), np.inner(A, x), np.dot(x, A.T)], (2, 4)),
    "vectors": (lambda x: [np.vdot(A[0], x), np.dot(3, x), np.dot(x, A[0])], 4),
    "split": (lambda x: np.split(x, 2)[1] + np.trace(A[:3, :3]) * np.split(x, 2)[0], 4),
    "unknown but linear": (lambda x: np.gradient(x), 5),
    "fourier": (lambda x: [np.fft.fft(x, axis=0), np.fft.ifft(np.fft.fft(x) * A[0])], (3, 4)),
    "methods": (lambda x: [x.copy(), x.repeat(2), x.cumsum(0), x.astype(float), x.squeeze()], 3),
    "chosen": (lambda x: np.where(A[0] > -4, x, 2 * x[::-1]), 4),
    "convolution": (lambda x: [np.convolve(x, [1, 2]), np.convolve([1, 2, 3, 4, 5], x)], 3),
    "in parts": (lambda x: [v * k for k, v in enumerate(x)], 3),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_numpy_functions_of_arrays(name: str) -> None:
    function, shape = LINEAR[name]
    circuit = trace(function, shape, linear=True)
    x = np.random.default_rng(0).standard_normal(shape)
    result = function(x)
    expected = np.concatenate([np.ravel(r) for r in result]) if isinstance(result, list) else np.ravel(result)
    assert circuit.is_linear
    assert circuit.evaluate(x.ravel()) == pytest.approx(expected, abs=1e-12)


def test_gates_are_those_that_the_function_writes() -> None:
    assert trace(lambda x: A[:, :2] @ x, 2).gates == 3, "a * x + b * y is one gate, and the zero row none"
    butterfly = trace(lambda x: np.concatenate([x[:2] + x[2:], x[:2] - x[2:]]), 4)
    assert (butterfly.gates, butterfly.multiplications, butterfly.additions) == (4, 0, 4)
    assert trace(lambda x: 3 * x - x, 1).gates == 1
    assert trace(lambda x: x[::-1], 5).gates == 0
    assert trace(lambda x: x.reshape(2, 2) @ np.array([[1, 0], [0, 1]]), 4).gates == 0


@given(st.integers(0, 10_000))
def test_polynomials_are_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-3, 4, (4, 3))

    def function(x: Any) -> Any:
        y = weights @ x
        return [y[:2] * y[2:] - 1, (x[0] + 2) ** 3, x[1] * 0 + 5, (y[0] + 1) * x[2] / 1]

    circuit = trace(function, 3)
    x = rng.integers(-5, 6, 3)
    assert circuit.evaluate(x, EXACT).tolist() == [int(v) for r in function(x) for v in np.ravel(r)]


def test_products_of_many_entries() -> None:
    x = [2, 3, 5, 7, 11]
    assert trace(lambda x: x.prod(), 5).evaluate(x, EXACT).tolist() == [2310]
    assert trace(np.prod, 5).depth == 3, "a tree"
    assert trace(np.cumprod, 5).evaluate(x, EXACT).tolist() == [2, 6, 30, 210, 2310]
    assert trace(lambda x: np.prod(x, axis=1), (2, 2)).evaluate(x[:4], EXACT).tolist() == [6, 35]
    assert trace(lambda x: np.convolve(x[:3], x[3:]), 5).evaluate(x, EXACT).tolist() == [14, 43, 68, 55]


def test_a_traced_fourier_transform_is_fast() -> None:
    for circuit in (trace(np.fft.fft, 64), trace_torch(torch.fft.fft, 64)):
        assert (circuit.gates, circuit.depth) == (64 * 6, 6)


def test_errors_of_the_function_itself_are_its_own() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        trace(lambda x: x[7], 3)
    with pytest.raises(ValueError, match="cannot reshape"):
        trace(lambda x: x.reshape(5), 3)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trace(lambda x: x.nothing, 3)


def test_rational_functions_and_fractions() -> None:
    circuit = trace(lambda x: [(1 - x[0]) / (2 + x[1] ** 2), x[0] ** -2, 1 / x[1], Fraction(1, 3) * x[0]], 2)
    assert circuit.evaluate([2, 3], EXACT).tolist() == [
        Fraction(-1, 11), Fraction(1, 4), Fraction(1, 3), Fraction(2, 3)
    ]  # fmt: skip


def test_large_integers_stay_exact() -> None:
    circuit = trace(lambda x: x * 10**12 * 10**12 + x * 10**18 * 9, 1)
    assert circuit.to_dense(EXACT).tolist() == [[10**24 + 9 * 10**18]]
    twice = trace(lambda x: x * (1 << 61) + x * (1 << 61) + x * (1 << 62), 1).simplify()
    assert twice.to_dense(EXACT).tolist() == [[1 << 63]]


def test_parameters_become_parameters() -> None:
    w, b = A[:, :2], np.array([1.0, 2.0, 3.0])
    circuit = trace(lambda x, w, b: w @ x + b, 2, parameters={"w": w, "b": b})
    assert [(g.name, g.shape) for g in circuit.groups] == [("w", (3, 2)), ("b", (3,))]
    assert circuit.evaluate([1, -1]) == pytest.approx(w @ [1, -1] + b)
    assert circuit.evaluate([1, -1], parameters=np.ones(9)).tolist() == [1, 1, 1]
    assert circuit.multiplications == 9
    product = trace(lambda x, w: w[0] * w[1] * x[0] * x[1] - 2 * w[0], 2, parameters={"w": [3.0, 5.0]})
    assert product.evaluate([2, 7]).tolist() == [204]
    linear = trace(lambda x, w: w @ x, 2, parameters={"w": w}, linear=True)
    assert linear.T.to_dense() == pytest.approx(w.T)


def test_a_linear_map_written_with_products_becomes_linear() -> None:
    circuit = trace(lambda x: (x[0] + 1) * (x[1] + 1) - x[0] * x[1] - 1, 2, linear=True)
    assert circuit.is_linear
    assert circuit.to_dense().tolist() == [[1, 1]]
    ratio = trace(lambda x: (x[0] ** 2 - x[1] ** 2) / (x[0] - x[1]), 2, linear=True)
    assert ratio.to_dense(EXACT).tolist() == [[1, 1]]
    half = trace(lambda x: (x[0] * x[1] + x[0]) / (2 * x[1] + 2), 2, linear=True)
    assert half.to_dense(EXACT).tolist() == [[Fraction(1, 2), 0]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * x, "the function is not linear. Its terms of degree 1"),
        (lambda x: x + 1, "this one is affine: it is not 0 at 0"),
        (lambda x: np.exp(x), "np.exp is not known to be polynomial"),
        (lambda x: np.maximum(x, 0), "np.maximum is not known to be polynomial"),
        (lambda x: np.linalg.norm(x), "np.norm is not linear"),
        (lambda x: np.sort(x), "np.sort is not linear"),
        (lambda x: np.median(x), "np.median is not linear"),
        (lambda x: abs(x), "abs is not known to be polynomial"),
        (lambda x: x if x[0] > 0 else -x, "can't compare the values"),
        (lambda x: x if x[0] else -x, "can't branch on the values"),
        (lambda x: x == 0, "can't compare the values"),
        (lambda x: x**0.5, r"x \*\* 0.5 is not polynomial"),
        (lambda x: np.array(x), "has no number yet"),
        (lambda x: float(x[0]), "can't become a float"),
        (lambda x: x / 0, "divides by the number zero"),
        (lambda x: "x", "returns arrays; got str"),
        (lambda x: A @ x, r"Shapes \(3, 4\) and \(3,\) have no matrix product"),
        (lambda x: np.einsum("...i->...", x), "ellipsis"),
        (lambda x: np.pad(x, 1, constant_values=2), "with zeros only"),
        (lambda x: np.multiply.reduce(x), "np.multiply.reduce is not known"),
        (lambda x: np.where(x, x, x), "for a condition that is known"),
        (lambda x: np.gradient(np.pad(x, 5000)), "more than 4096 are not replaced"),
        (lambda x: np.fft.fft(x, norm="ortho"), "without n and norm"),
        (lambda x: np.convolve(x, x, "same"), "in mode 'full'; got mode 'same'"),
        (lambda x: x.max(), "np.max is not linear"),
        (lambda x: torch.relu(x), "relu is a function of PyTorch.*Use trace_torch"),
        (lambda x: linalg.norm(x), "other libraries by their matrix"),
        (lambda x: np.zeros(3).__setitem__(0, x[0]), "nor an entry of an array of floats"),
        (lambda x: x.__setitem__(0, 1), "can't be changed in place"),
        (lambda x: np.kron(x, A), "as many axes; got 1 and 2"),
    ],
)
def test_what_has_no_linear_circuit_is_refused(function: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        trace(function, 3, linear=True)


def test_a_tracer_by_hand() -> None:
    builder = Builder(3)
    x = as_tracer(builder, builder.inputs)
    y = 2 * x + 1
    assert isinstance(y, Tracer)
    assert (len(y), y.ndim, y.size, y.shape) == (3, 1, 3, (3,))
    assert repr(y) == "<Tracer of shape (3,)>"
    assert builder.build(y.nodes()).evaluate([1, 2, 3]).tolist() == [3, 5, 7]
    other = Builder(3)
    with pytest.raises(CircuitError, match="two circuits"):
        x + as_tracer(other, other.inputs)


# ----------------------------------------------------------------------------------------------------------- PyTorch


def written_in_place(x: Tensor) -> Tensor:
    y = torch.zeros(6, dtype=x.dtype)
    y[::2] = x
    y[1] += 3 * x[0]
    y[torch.tensor([3, 5])] -= x[:2]
    return y


SPECTRUM = torch.randn(5, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))

TORCH_LINEAR: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "moves": (lambda x: x.flip(0) + 2 * x.roll(1) - x[[2, 1, 0, 0, 4]], (5,)),
    "several": (lambda x: (x.cumsum(0), x.mean(), torch.stack([x, x * 0]), F.pad(x, (1, 2)), x.unbind()[1]), (4,)),
    "fourier": (lambda x: torch.fft.fft(x), (8,)),
    "fourier of planes": (lambda x: torch.fft.fft2(x, norm="ortho"), (3, 4)),
    "half of a fourier transform": (lambda x: torch.fft.rfft(x, norm="forward"), (3, 5)),
    "circulant": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * SPECTRUM[0], n=8), (8,)),
    "circulant, complex": (lambda x: torch.fft.ifft(torch.fft.fft(x) @ SPECTRUM.T).imag, (2, 5)),
    "parts": (lambda x: torch.view_as_real(torch.cat([torch.fft.fft(x), 1j * x]).conj().resolve_conj()), (4,)),
    "conv1d": (lambda x: F.conv1d(x[None, None], torch.tensor([[[1.0, 2, 3]]]).to(x), padding=1)[0, 0], (6,)),
    "conv2d": (nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (1, 2, 5, 5)),
    "transposed": (nn.ConvTranspose1d(2, 3, 3, stride=2, bias=False), (1, 2, 4)),
    "linear": (nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 5, bias=False)), (2, 6)),
    "in place": (written_in_place, (3,)),
    "einsum": (lambda x: torch.einsum("ij,jk->ik", x, torch.ones(3, 2).to(x)), (2, 3)),
    "pooling": (lambda x: F.avg_pool2d(x[None], 2), (1, 4, 4)),
    "interpolation": (lambda x: F.interpolate(x[None, None], scale_factor=2, mode="linear"), (4,)),
    "triangle": (lambda x: torch.where(torch.eye(3, dtype=torch.bool), x.tril(), 2 * x.T), (3, 3)),
    "gather": (lambda x: x.gather(0, torch.tensor([[1, 0], [0, 0]])) + x.repeat(2, 1)[1:3], (2, 2)),
    "products": (lambda x: torch.bmm(x.expand(2, 3, 4), torch.ones(2, 4, 1).to(x)).squeeze(-1) / 3, (3, 4)),
    "integers beside": (lambda x: torch.stack([x, torch.zeros(3, dtype=torch.int64)]), (3,)),
    "likes": (lambda x: torch.zeros_like(x) + x - x.new_zeros(3) + torch.ones_like(x) - x.new_full((3,), 1.0), (3,)),
}


@pytest.mark.parametrize("name", TORCH_LINEAR)
def test_torch_functions_of_tensors(name: str) -> None:
    function, shape = TORCH_LINEAR[name]
    circuit = trace_torch(function, shape, linear=True)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        result = function.double()(x) if isinstance(function, nn.Module) else function(x)
    parts = result if isinstance(result, tuple) else (result,)
    expected = torch.cat([p.reshape(-1) for p in parts]).numpy()
    assert circuit.is_linear
    assert np.abs(circuit.evaluate(x.numpy().ravel()) - expected).max() <= 1e-12


def test_a_convolution_has_a_gate_for_each_term() -> None:
    circuit = trace_torch(lambda x: F.conv1d(x[None, None], torch.tensor([[[1.0, 2, 3]]]).to(x), padding=1)[0, 0], 6)
    assert (circuit.multiplications, circuit.additions) == (11, 10)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), (1, 6)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), (1, 4, 7, 7)),
    ],
    ids=["linear", "convolution"],
)
def test_parameters_of_modules(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = module.double()
    x = torch.randn(shape, dtype=torch.float64)
    circuit = trace_torch(module, shape, parameters=dict(module.named_parameters()))
    expected = module(x)
    assert [(g.name, g.shape) for g in circuit.groups] == [(n, tuple(p.shape)) for n, p in module.named_parameters()]
    assert np.abs(circuit.evaluate(x.numpy().ravel()) - expected.detach().numpy().ravel()).max() <= 1e-12
    values = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
    for parameter in module.parameters():
        parameter.data.mul_(2)
    doubled = circuit.evaluate(x.numpy().ravel(), parameters=2 * values)
    assert np.abs(doubled - module(x).detach().numpy().ravel()).max() <= 1e-12


def test_torch_products_of_complex_values() -> None:
    """The autocorrelation by two transforms: a polynomial of degree 2."""
    circuit = trace_torch(lambda x: (torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(x).conj())).real, 6)
    x = np.arange(1.0, 7.0)
    expected = [(x * np.roll(x, -k)).sum() for k in range(6)]
    assert circuit.evaluate(x) == pytest.approx(expected)
    scaled = trace_torch(lambda x: (x.to(torch.complex128) * torch.fft.fft(x) * x.prod()).imag, 4)
    y = x[:4]
    assert scaled.evaluate(y) == pytest.approx((y * np.fft.fft(y)).imag * 24)


def test_torch_polynomials() -> None:
    circuit = trace_torch(lambda x: x[..., 0] * x[..., 1] / (1 + x[..., 0] ** 2), (4, 2))
    x = torch.randn(4, 2, dtype=torch.float64)
    expected = x[..., 0] * x[..., 1] / (1 + x[..., 0] ** 2)
    assert circuit.evaluate(x.numpy().ravel()) == pytest.approx(expected.numpy(), abs=1e-14)
    integers = trace_torch(lambda x: torch.stack([x, torch.arange(3)]), 3)
    assert integers.evaluate([5, 6, 7]).tolist() == [5, 6, 7, 0, 1, 2]
    attention = trace_torch(lambda x, q: x @ q @ x.T, (3, 2), parameters={"q": torch.eye(2)})
    assert attention.evaluate(np.arange(6.0)).reshape(3, 3).tolist() == [[1, 3, 5], [3, 13, 23], [5, 23, 41]]
    same = trace(lambda x: x[..., 0] * x[..., 1] / (1 + x[..., 0] ** 2), (4, 2))
    assert equal(circuit, same)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (torch.relu, "relu is not linear"),
        (lambda x: torch.fft.fft(x).abs(), "abs is not linear"),
        (lambda x: torch.linalg.eig(torch.complex(x, x)[None] * torch.ones(4, 1)).eigenvalues.real, "several results"),
        (torch.exp, "exp is not linear"),
        (torch.abs, "abs is not linear"),
        (lambda x: x.softmax(0), "_softmax is not linear"),
        (lambda x: F.layer_norm(x, (4,)), "native_layer_norm gives several results"),
        (lambda x: x.sort().values, "sort gives several results"),
        (lambda x: x.max(), "max is not linear"),
        (lambda x: torch.maximum(x, 2 * x), "maximum of 2 traced arguments is not known"),
        (lambda x: torch.where(x > 0, x, 2 * x), "gt is not known to be polynomial"),
        (lambda x: x.to(torch.int32), "conversion to torch.int32"),
        (lambda x: x + 1, "this one is affine"),
        (lambda x: x * x, "the function is not linear"),
        (lambda x: x if x.sum() > 0 else -x, "PyTorch can't take the function apart"),
        (lambda x: x * float(x[0]), "PyTorch can't take the function apart"),
        (lambda x: F.pad(x, (1, 1), value=2.0), "constant_pad_nd that adds or fills with a number"),
        (lambda x: x.clone().index_put((torch.tensor([0, 0]),), x[:2], accumulate=True), "index_put that adds"),
    ],
)
def test_torch_functions_without_linear_circuit_are_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        trace_torch(function, 4, linear=True)


def test_the_tracer_of_torch_stays_a_function() -> None:
    """Its module is loaded at the first use, and must not take its name."""
    import structmat.circuit as circuits

    assert all(callable(circuits.trace_torch) for _ in range(2))
