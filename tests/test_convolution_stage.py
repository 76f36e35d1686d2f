"""The stages of displacement structure: blocks of Toeplitz and Hankel matrices, and matrices that tensors generate."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.func import grad, vmap

import structmat as sm
from structmat.errors import ShapeError
from structmat.program import (
    Chain,
    Contraction,
    Convolution,
    Generated,
    apply,
    convolution,
    cost,
    fuse,
    rename,
    stages,
    table,
    transpose,
)
from structmat.program.circuit import to_circuit
from structmat.program.reference import Form, form
from structmat.program.scaling import scaling_cut
from structmat.sizes import smooth_size
from structmat.testing.oracle import explicit

F64, C128 = torch.float64, torch.complex128

sizes = st.integers(1, 9)


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    height, width = draw(sizes), draw(sizes)
    twist = draw(st.sampled_from([None, 1.0, -1.0, 0.0, 0.5, -2.0]))
    period = 0 if twist is None else max(height, width) + draw(st.integers(0, 3))
    flags = [draw(st.booleans()) for _ in range(3)]
    return Convolution("w", draw(st.integers(1, 3)), draw(st.integers(1, 3)), height, width, twist, period, *flags)


def weight_of(stage: Convolution, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(stage.height * 100 + stage.width)
    return {"w": torch.randn(stage.outputs, stage.inputs, stage.entries, dtype=dtype, generator=generator)}


@given(stage=convolutions(), dtype=st.sampled_from([F64, C128]), given_complex=st.booleans())
def test_convolutions_equal_their_matrices(stage: Convolution, dtype: torch.dtype, given_complex: bool) -> None:
    tensors = weight_of(stage, dtype)
    dense = explicit(stage, tensors)
    assert dense.shape == (stage.out_features, stage.in_features)
    x = torch.randn(3, stage.in_features, dtype=C128 if given_complex else F64)
    wide = torch.promote_types(x.dtype, dtype)
    if given_complex == dtype.is_complex or stage.transform:
        expected = x.to(wide) @ dense.to(wide).T
        torch.testing.assert_close(apply(stage, tensors, x), expected, rtol=1e-11, atol=1e-12)
    assert stage.transpose().transpose() == stage
    torch.testing.assert_close(explicit(stage.transpose(), tensors), dense.T)
    assert cost(stage.transpose()).multiplications == cost(stage).multiplications
    assert form(stage) is (Form.TRANSFORM if stage.transform else Form.MATERIALISED)
    assert apply(stage, tensors, x[:0].to(dtype)).shape == (0, stage.out_features)


@given(stage=convolutions())
def test_gradients_of_convolutions(stage: Convolution) -> None:
    tensors = weight_of(stage)
    x = torch.randn(2, stage.in_features, dtype=F64, requires_grad=True)
    weight = tensors["w"].requires_grad_()
    dense = explicit(stage, tensors)
    y = torch.randn(2, stage.out_features, dtype=F64)
    wanted = torch.autograd.grad(((x @ dense.T) * y).sum(), (x, weight))
    found = torch.autograd.grad((apply(stage, tensors, x) * y).sum(), (x, weight))
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)

    def loss(w: Tensor, row: Tensor) -> Tensor:
        return (apply(stage, {"w": w}, row) * y[0]).sum()

    alone = torch.stack([grad(loss)(weight.detach(), row) for row in x.detach()])
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(weight.detach(), x.detach()), alone, rtol=1e-11, atol=1e-12)


@given(stage=convolutions())
def test_circuits_of_convolutions(stage: Convolution) -> None:
    """Gate by gate, with the counts of the plan where it is not a model of what a library does."""
    tensors = weight_of(stage)
    circuit = to_circuit(stage, tensors)
    np.testing.assert_allclose(circuit.to_dense(), explicit(stage, tensors).numpy(), rtol=1e-10, atol=1e-10)
    assert circuit.depth <= cost(stage).depth
    if stage.transform:
        return
    counted = cost(stage)
    assert (circuit.multiplications, circuit.additions) == (counted.multiplications, counted.additions)
    assert {g.name: g.size for g in circuit.groups} == {"w": stage.weights["w"]}


@given(stage=convolutions())
def test_complex_circuits_of_convolutions(stage: Convolution) -> None:
    tensors = weight_of(stage, C128)
    circuit = to_circuit(stage, tensors)
    np.testing.assert_allclose(circuit.to_dense(), explicit(stage, tensors).numpy(), rtol=1e-10, atol=1e-10)


def test_large_batches_are_transformed_in_parts() -> None:
    """Where nothing is recorded the batch is cut up, with the same results."""
    stage = convolution("w", 2, 1, 500, 700)
    assert stage.transform
    tensors = weight_of(stage)
    x = torch.randn(301, 700, dtype=F64)
    whole = apply(stage, tensors, x.clone().requires_grad_())
    torch.testing.assert_close(apply(stage, tensors, x), whole.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(whole.detach(), x @ explicit(stage, tensors).T, rtol=0, atol=1e-10)


def test_the_way_is_chosen_by_size() -> None:
    """Small blocks are written out, large ones transformed, and the count is that of the way taken."""
    small, large = convolution("w", 1, 1, 64, 64), convolution("w", 1, 1, 1024, 1024)
    assert not small.transform
    assert small.multiplications == 64 * 64
    assert large.transform
    assert large.multiplications < 1024 * 1024 / 20
    assert "Fourier" in str(large)
    assert "written out" in str(small)
    assert "2048" in table(large)


def test_lengths_of_transforms() -> None:
    numbers = [n for n in range(1, 3000) if _is_smooth(n)]
    for size in range(1, 2000):
        assert smooth_size(size) == next(n for n in numbers if n >= size)


def _is_smooth(number: int) -> bool:
    for prime in (2, 3, 5):
        while number % prime == 0:
            number //= prime
    return number == 1


def test_half_precision_goes_through_single() -> None:
    stage = replace(convolution("w", 1, 2, 6, 5), transform=True)
    tensors = {"w": weight_of(stage)["w"].bfloat16()}
    x = torch.randn(3, 10).bfloat16()
    y = apply(stage, tensors, x)
    assert y.dtype == torch.bfloat16
    exact = x.double() @ explicit(stage, {"w": tensors["w"].double()}).T
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-7)


def test_fusion_writes_small_blocks_out() -> None:
    small = convolution("w", 1, 1, 7, 5)
    tensors = weight_of(small)
    program, made = fuse(small, tensors)
    assert isinstance(program, Contraction)
    torch.testing.assert_close(explicit(program, made), explicit(small, tensors))
    large = convolution("w", 1, 1, 1000, 1000)
    assert fuse(large, weight_of(large))[0] == large


# ------------------------------------------------------------------------------------------------ generated matrices


def powers(nodes: Tensor, scale: Tensor, width: int) -> Tensor:
    return scale[:, None] * nodes[:, None] ** torch.arange(width)


def as_diagonal(nodes: Tensor, scale: Tensor, width: int) -> tuple[Contraction, dict[str, Tensor]] | None:
    if float(nodes.abs().max()) > 1:
        return None
    return Contraction("m", 1, len(nodes), width, 1), {"m": powers(nodes, scale, width)}


GENERATED = Generated(powers, (("n", 4), ("s", 4)), (3,), 4, 3, linear=("s",), fast=as_diagonal)


def generated_tensors(most: float = 0.9) -> dict[str, Tensor]:
    return {"n": torch.linspace(-most, most, 4, dtype=F64), "s": torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=F64)}


def test_generated_matrices() -> None:
    tensors = generated_tensors()
    dense = torch.from_numpy(np.vander(tensors["n"].numpy(), 3, increasing=True)) * tensors["s"][:, None]
    torch.testing.assert_close(explicit(GENERATED, tensors), dense)
    x, y = torch.randn(5, 3, dtype=F64), torch.randn(5, 4, dtype=F64)
    torch.testing.assert_close(apply(GENERATED, tensors, x), x @ dense.T)
    torch.testing.assert_close(apply(transpose(GENERATED), tensors, y), y @ dense)
    assert GENERATED.transpose().transpose() == GENERATED
    assert cost(GENERATED).multiplications == cost(GENERATED.transpose()).multiplications == 12
    assert (cost(GENERATED).additions, cost(GENERATED.transpose()).additions) == (8, 9)
    assert cost(GENERATED).parameters == 8
    assert form(GENERATED) is Form.MATERIALISED
    assert str(GENERATED) == "Powers written out"
    renamed = rename(GENERATED, lambda name: f"a_{name}")
    assert scaling_cut(renamed) == {"a_s"}
    assert set(renamed.weights) == {"a_n", "a_s"}
    x32 = x.bfloat16()
    assert apply(GENERATED, {k: t.bfloat16() for k, t in tensors.items()}, x32).dtype == torch.bfloat16

    def run(n: Tensor, s: Tensor) -> Tensor:
        return apply(GENERATED, {"n": n, "s": s}, x)

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in tensors.values()))


def test_circuits_of_generated_matrices() -> None:
    tensors = generated_tensors()
    for stage in (GENERATED, GENERATED.transpose()):
        circuit = to_circuit(stage, tensors)
        np.testing.assert_allclose(circuit.to_dense(), explicit(stage, tensors).numpy(), atol=1e-14)
        counted = cost(stage)
        assert (circuit.multiplications, circuit.additions) == (counted.multiplications, counted.additions)
        assert [group.name for group in circuit.groups] == ["n+s.matrix"]


@pytest.mark.parametrize("most", [0.9, 1.1])
def test_fusion_of_generated_matrices(most: float) -> None:
    """The fast form where the stage's own rule allows it, else the matrix."""
    tensors = generated_tensors(most)
    for stage in (GENERATED, GENERATED.transpose()):
        program, made = fuse(stage, tensors)
        assert all(isinstance(s, Contraction) for s in stages(program))
        assert not set(made) & set(tensors)
        torch.testing.assert_close(explicit(program, made), explicit(stage, tensors))
    both = Chain((GENERATED, GENERATED.transpose()))
    program, made = fuse(both, tensors)
    torch.testing.assert_close(explicit(program, made), explicit(both, tensors))


def test_oracle_is_the_definition() -> None:
    """A few entries by hand."""
    w: Mapping[str, Tensor] = {"w": torch.arange(1.0, 4.0, dtype=F64)}
    circulant = explicit(Convolution("w", 1, 1, 3, 3, 1.0, 3), w)
    assert circulant.tolist() == [[1, 3, 2], [2, 1, 3], [3, 2, 1]]
    skew = explicit(Convolution("w", 1, 1, 3, 3, -1.0, 3), w)
    assert skew.tolist() == [[1, -3, -2], [2, 1, -3], [3, 2, 1]]
    toeplitz = explicit(Convolution("w", 1, 1, 2, 2), w)
    assert toeplitz.tolist() == [[2, 1], [3, 2]]
    hankel = explicit(Convolution("w", 1, 1, 2, 2, hankel=True), w)
    assert hankel.tolist() == [[1, 2], [2, 3]]


def test_spectra_of_frozen_layers_are_kept_and_follow_their_weights() -> None:
    """Computed once for a weight that learns nothing; a change in place is seen."""
    layer = sm.nn.StructuredLinear(600, 600, structure=sm.Toeplitz()).freeze()
    x = torch.randn(3, 600)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        layer.weight.mul_(2.0)
        twice = 2 * (first - layer.bias) + layer.bias
        torch.testing.assert_close(layer(x), twice)
    learning = sm.nn.StructuredLinear(600, 600, bias=False, structure=sm.Toeplitz())
    optimizer = torch.optim.SGD(learning.parameters(), lr=1.0)
    before = learning(x)
    before.square().mean().backward()
    optimizer.step()
    assert not torch.allclose(learning(x), before)


FROZEN = [
    (sm.Circulant(), (300, 300)),
    (sm.Circulant(), (250, 300)),
    (sm.Toeplitz(), (300, 200)),
    (sm.Toeplitz(), (200, 331)),
    (sm.Hankel(), (300, 257)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("structure", "shape"), FROZEN, ids=str)
def test_a_frozen_convolution_takes_the_short_way(
    structure: sm.Structure, shape: tuple[int, int], dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = sm.nn.StructuredLinear(shape[1], shape[0], bias=bias, structure=structure, dtype=dtype).eval()
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    frozen = layer.freeze()
    rows = [torch.randn(*lead, shape[1], dtype=dtype) for lead in ((), (1,), (3,), (2, 5), (0,))]
    with torch.no_grad():
        wanted = [layer(x) for x in rows]
    monkeypatch.setattr("structmat.nn.linear.multiply", None)  # nothing but the short way is there
    for x, expected in zip(rows[:-1], wanted[:-1], strict=True):
        y = frozen(x)
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected)
    with pytest.raises(TypeError):
        frozen(rows[-1])  # no rows: the general way


def test_the_short_way_sees_another_weight_and_leaves_the_rest_to_the_general_one() -> None:
    layer = sm.nn.StructuredLinear(256, 256, structure=sm.Circulant()).eval()
    frozen = layer.freeze()
    x = torch.randn(4, 256)
    frozen(x)
    other = sm.nn.StructuredLinear(256, 256, structure=sm.Circulant()).eval()
    frozen.load_state_dict(other.freeze().state_dict())  # in place
    torch.testing.assert_close(frozen(x), other(x).detach())
    double = copy.deepcopy(frozen).double()  # other tensors
    torch.testing.assert_close(double(x.double()), other.double()(x.double()).detach())
    again = pickle.loads(pickle.dumps(frozen))
    torch.testing.assert_close(again(x), frozen(x))
    given = x.clone().requires_grad_()
    frozen(given).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(given.grad, (frozen(torch.eye(256)) - frozen.bias).sum(1).expand(4, 256))
    torch.testing.assert_close(torch.vmap(frozen)(x), frozen(x))
    assert frozen(x[:, ::2].repeat(1, 2)).shape == (4, 256)
    with pytest.raises(ShapeError, match="256"):
        frozen(x[:, :8])
