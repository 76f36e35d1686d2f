"""What Kronecker blocks contain, and what their parameters are worth."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kronecker_blocks import F64, MIXED, Largest, random_block
from torch import Tensor, nn

import structmat as sm
from structmat.nn import KroneckerBlock
from structmat.nn.kronecker import Slopes, block_shape
from structmat.nn.kronecker.extended import kron
from structmat.program import Contraction, stages
from structmat.structures import Kronecker


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
    block = KroneckerBlock(1024, 1024, 4, inner=inner)
    x = torch.randn(2, 1024, requires_grad=True)
    with Largest() as watch:
        block(x).square().sum().backward()
    assert 2 * 1024 <= watch.numbers < 1024 * 1024 // 4
    with Largest() as watch, sm.backend("reference"):
        block(x).square().sum().backward()
    assert 2 * 4 * 1024 <= watch.numbers < 1024 * 1024 // 4  # all hidden values of the terms
