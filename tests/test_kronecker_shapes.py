"""Shapes of Kronecker blocks for a budget, and blocks in other people's layouts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from kronecker_blocks import BIASES, F64, MIXED, SHAPES, random_block
from torch import Tensor

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.nn import KroneckerBlock, KroneckerNetwork
from structmat.nn.kronecker import Slopes, SourceTerm, block_shape, choose, choose_all, from_source, to_source
from structmat.structures import Kronecker


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
