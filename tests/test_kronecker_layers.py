"""Kronecker blocks and networks as modules: shapes, dtypes, transforms, state, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from kronecker_blocks import F64, random_block
from torch import nn

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.nn import KroneckerBlock, KroneckerNetwork
from structmat.nn.kronecker import Slopes, block_shape


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


def test_kronecker_21_saving_and_loading(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return KroneckerNetwork([(8, 8), 64, (2, 5)], 2, inner=Slopes(0.3), outer=torch.relu)

    model = build()
    sm.save(model, tmp_path / "saved")
    again = sm.load(tmp_path / "saved", build())
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
