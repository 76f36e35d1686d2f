"""The layer: conversion from and to nn.Linear, freezing, explanations, complex weights, names of its state."""

from __future__ import annotations

import copy
import pickle

import market
import pytest
import torch
from torch import nn

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.nn import StructuredLinear
from structmat.structure import Structure
from structmat.testing.case import Case, allowed_error, roundings


@pytest.fixture
def linear(generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 6, generator=generator, dtype=torch.float64))
    return layer


def test_from_linear_and_back(linear: nn.Linear) -> None:
    layer = StructuredLinear.from_linear(linear, sm.LowRank(4))
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    back = layer.eval().to_linear()
    assert isinstance(back, nn.Linear)
    assert not back.training
    torch.testing.assert_close(back.weight, linear.weight)
    assert torch.equal(back.bias, linear.bias)


def test_from_linear_without_bias_in_the_weighted_norm(linear: nn.Linear) -> None:
    linear.bias = None  # type: ignore[assignment]
    moment = torch.zeros(6, 6, dtype=torch.float64)
    moment[:2, :2] = torch.eye(2, dtype=torch.float64)
    layer = StructuredLinear.from_linear(linear, sm.LowRank(2), second_moment=moment)
    assert layer.bias is None
    assert layer.to_linear().bias is None
    x = torch.zeros(3, 6, dtype=torch.float64)
    x[:, :2] = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))  # inputs of rank 2: rank 2 is enough


def test_a_layer_owns_its_tensors(linear: nn.Linear) -> None:
    found = sm.project(linear.weight, sm.Dense())
    layer = StructuredLinear.from_matrix(found.matrix, linear.bias)
    with torch.no_grad():
        layer.get_parameter("weight").zero_()
        assert layer.bias is not None
        layer.bias.zero_()
    assert float(linear.weight.detach().abs().sum()) > 0
    assert float(linear.bias.detach().abs().sum()) > 0
    assert float(found.matrix.to_dense().abs().sum()) > 0


def test_a_transposed_matrix_is_a_clear_error(generator: torch.Generator) -> None:
    matrix = sm.StructuredMatrix.random(sm.LowRank(2), (4, 4), generator=generator)
    with pytest.raises(StructureError, match=r"given transposed.*Give matrix\.T, or project"):
        StructuredLinear.from_matrix(matrix.T)
    StructuredLinear.from_matrix(matrix.T.T)


@pytest.mark.parametrize(("structure", "shape"), market.cases(((12, 10), (16, 16))), ids=str)
def test_frozen_equals_trained(structure: Structure, shape: tuple[int, int]) -> None:
    layer = Case(structure, shape).layer(torch.float64)
    frozen = layer.freeze()
    assert list(frozen.parameters()) == []
    x = torch.randn(5, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert layer.bias is not None
    # Merging stages multiplies weights: each of them rounds once more.
    allowed = 2 * allowed_error(layer.matrix.program, layer.tensors(), x, torch.float64)
    allowed += roundings(layer.matrix.program) * torch.finfo(torch.float64).eps * layer.bias.detach().abs()
    difference = (frozen(x) - layer(x)).abs()
    assert bool((difference <= allowed).all())
    assert frozen(x[0]).shape == (shape[0],)


def test_explain_counts_the_batch() -> None:
    layer = StructuredLinear(6, 4, structure=sm.LowRank(2))
    text = layer.explain(batch=10)
    assert "one matrix product" in text
    assert f"10 rows: {10 * layer.matrix.flops} FLOPs, {10 * layer.matrix.macs} multiply-adds" in text
    assert "left" in text
    assert "right" in text


def test_names_of_the_state_are_the_structures_own() -> None:
    layer = StructuredLinear(6, 4, structure=sm.PivotedLowRank(2))
    assert set(layer.state_dict()) == {"basis", "extension", "places", "bias"}
    assert {name for name, _ in layer.named_buffers()} == {"places"}
    assert set(StructuredLinear(6, 4, False, structure=sm.Dense()).state_dict()) == {"weight"}
    assert "structure=PivotedLowRank(rank=2)" in repr(layer)
    assert "bias=True" in repr(layer)


def test_fractions_are_resolved_by_the_layer() -> None:
    layer = StructuredLinear(100, 64, structure=sm.LowRank(0.5))
    assert layer.structure == sm.LowRank(19)
    with pytest.raises(ShapeError, match=r"last axis must hold in_features=100"):
        layer(torch.ones(3, 64))


def test_complex_layers_store_real_parameters(generator: torch.Generator) -> None:
    layer = StructuredLinear(6, 4, structure=sm.LowRank(2), dtype=torch.complex64, generator=generator)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert {p.shape[-1] for p in layer.parameters()} == {2}
    x = torch.randn(3, 6, dtype=torch.complex64, generator=generator)
    y = layer(x)
    assert y.dtype == torch.complex64
    y.abs().square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in layer.parameters())
    torch.testing.assert_close(layer.to_linear()(x), y)
    torch.testing.assert_close(layer.freeze()(x), y)
    again = StructuredLinear.from_matrix(layer.matrix, layer.to_linear().bias)
    torch.testing.assert_close(again(x), y)


def test_equal_seeds_give_equal_layers() -> None:
    first, second = (
        StructuredLinear(6, 4, structure=sm.LowRank(2), generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_bias_starts_as_that_of_a_linear_layer() -> None:
    layer = StructuredLinear(16, 5000, structure=sm.LowRank(1), generator=torch.Generator().manual_seed(0))
    assert layer.bias is not None
    bias = layer.bias.detach()
    assert float(bias.abs().max()) <= 16**-0.5
    assert abs(float(bias.std()) - 16**-0.5 / 3**0.5) < 0.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_layer_on_the_meta_device_in_every_dtype(dtype: torch.dtype) -> None:
    layer = StructuredLinear(6, 4, structure=sm.LowRank(2), device="meta", dtype=dtype)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(3, 6, device="meta", dtype=dtype)).shape == (3, 4)


@pytest.mark.parametrize("structure", [sm.LowRank(2), sm.Butterfly(), sm.Toeplitz(), sm.Monarch(2, 4)], ids=str)
def test_a_frozen_layer_that_was_used_can_be_pickled_and_copied(structure: sm.Structure) -> None:
    x = torch.randn(3, 16)
    frozen = sm.nn.StructuredLinear(16, 16, structure=structure).eval().freeze()
    y = frozen(x)  # keeps with its program what was found out about it
    for again in (pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen)):
        assert torch.equal(again(x), y)
        assert again.program == frozen.program
