"""Gradients of Kronecker blocks: the formulas, what is kept for them, and what they do not see."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from kronecker_blocks import BIASES, F64, MIXED, SHAPES, random_block
from torch import Tensor, nn

from structmat.nn import KroneckerBlock
from structmat.nn.kronecker import Slopes


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
