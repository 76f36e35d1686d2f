"""All times of a recurrent net with gradients, in one native call each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from recurrent_layers import KINDS, UNPROJECTED, Called, calls_of, flat
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import structmat as sm
from structmat.kernels.recurrence import NativeCell
from structmat.nn import StructuredGRU, StructuredLSTM
from structmat.nn.recurrent import directions
from structmat.structure import Structure

pytestmark = pytest.mark.skipif(
    not sm.kernels.native().available or sm.kernels.native().by_address is not None,
    reason="there are no operators of the native backend",
)

STRUCTURES: tuple[Structure, ...] = (
    sm.Dense(), sm.LowRank(2), sm.Monarch(2), sm.Sparse(0.3), sm.GBLR(2), sm.Butterfly(),
    sm.Sum(sm.LowRank(1), sm.Sparse(nonzeros=7)),
)  # fmt: skip


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each direction, whether the native backend recorded it."""
    taken: list[bool] = []
    recordedly = directions.recordedly

    def counted(*given: Any, **more: Any) -> Any:
        found = recordedly(*given, **more)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(directions, "recordedly", counted)
    return taken


def gradients(layer: nn.Module, given: list[Tensor], weights: list[Tensor], call: Callable[[], Any]) -> list[Tensor]:
    """Of all outcomes, each entry with its own weight, by what was given and by the parameters."""
    outcome = flat(call())
    loss = sum(((y * w).sum() for y, w in zip(outcome, weights, strict=True)), start=torch.zeros(()))
    return list(torch.autograd.grad(loss, [*given, *layer.parameters()]))


@given(calls_of(STRUCTURES))
@settings(max_examples=120, deadline=None)
def test_gradients_are_those_of_the_reference(called: Called) -> None:
    layer, x, state = called.layer, called.x, called.state
    given = [t.requires_grad_() for t in ([x, *called.parts] if state else [x])]
    weights = [torch.randn_like(y) for y in flat(layer(x, *state))]
    found = gradients(layer, given, weights, lambda: layer(x, *state))
    with sm.backend("reference"):
        wanted = gradients(layer, given, weights, lambda: layer(x, *state))
    exact = x.dtype is torch.float64
    for ours, theirs in zip(found, wanted, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=(1e-12 if exact else 1e-4) * max(1.0, scale))


@pytest.mark.parametrize("kind", UNPROJECTED)
@pytest.mark.parametrize("structure", [sm.Monarch(2), sm.Dense()], ids=str)
def test_gradients_are_those_of_differences_twice(kind: str, structure: Structure, count: list[bool]) -> None:
    made, more = KINDS[kind]
    torch.manual_seed(1)
    layer = made(2, 4, bidirectional=True, structure=structure, dtype=torch.float64, **more)
    names = [name for name, _ in layer.named_parameters()]

    def outcome(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))))

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outcome, (x, *values))
    assert torch.autograd.gradgradcheck(outcome, (x, *values), fast_mode=True)
    assert all(count)
    assert count


@pytest.mark.parametrize("kind", UNPROJECTED)
def test_it_is_taken_where_gradients_are_usual(kind: str, count: list[bool]) -> None:
    made, more = KINDS[kind]
    layer, x = made(5, 16, 2, bidirectional=True, structure=sm.Monarch(2), **more), torch.randn(7, 9, 5)
    layer(x)
    assert count == [True] * 4
    count.clear()
    with sm.backend("reference"):
        layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    layer.half()(x.half())
    layer.float().get_submodule("hh_l1").register_full_backward_hook(lambda *_: None)
    assert count == [False] * 12
    count.clear()
    layer(x)
    assert count == [True, True, False, True]
    count.clear()
    with torch.no_grad():
        layer(x)
        layer(pack_sequence([torch.randn(3, 5), torch.randn(2, 5)]))
    assert count == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own, at the first use
def test_functional_transforms_see_operations_of_pytorch() -> None:
    torch.manual_seed(0)
    layer, x = StructuredGRU(4, 8, structure=sm.LowRank(2), dtype=torch.float64), torch.randn(5, 3, 4).double()

    def loss(x: Tensor) -> Tensor:
        y: Tensor = layer(x)[0]
        return y.square().sum()

    x.requires_grad_()
    wanted = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), wanted)
    moved = torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))[1]
    torch.testing.assert_close(moved, wanted.sum())


def test_many_gradients_at_a_time() -> None:
    torch.manual_seed(0)
    layer, x = StructuredLSTM(3, 4, structure=sm.Monarch(2), dtype=torch.float64), torch.randn(3, 2, 3).double()

    def last(x: Tensor) -> Tensor:
        y: Tensor = layer(x)[0]
        return y[-1]

    one = torch.autograd.functional.jacobian(last, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(last, x, vectorize=True), one)


@pytest.mark.parametrize("only", ["input", "state", "matrix of the state", "bias of the state"])
def test_gradients_that_are_not_wanted_are_not_made(only: str) -> None:
    torch.manual_seed(0)
    layer = StructuredLSTM(4, 9, structure=sm.Sparse(0.4), dtype=torch.float64)
    x, start = torch.randn(5, 3, 4).double(), [torch.randn(1, 3, 9).double() for _ in range(2)]
    outcomes = []
    for backend in ("reference", "auto"):
        for parameter in layer.parameters():
            parameter.requires_grad_(False).grad = None
        leaves = {
            "input": [x],
            "state": start,
            "matrix of the state": [p for n, p in layer.hh_l0.named_parameters() if n != "bias"],
            "bias of the state": [layer.hh_l0.bias],
        }
        for leaf in [x, *start]:
            leaf.requires_grad_(False).grad = None
        for leaf in leaves[only]:
            leaf.requires_grad_()
        with sm.backend(backend):
            layer(x, (start[0], start[1]))[1][1].square().sum().backward()  # of the last memory alone
        outcomes.append([leaf.grad for leaf in leaves[only]])
        every = [x, *start, *layer.parameters()]
        assert all(t.grad is None for t in every if not any(t is leaf for leaf in leaves[only]))
    for ours, theirs in zip(*outcomes, strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", UNPROJECTED)
def test_outputs_may_be_written_over(kind: str, count: list[bool]) -> None:
    """As by ``nn.ReLU(inplace=True)`` after the layer."""
    made, more = KINDS[kind]
    layer, x = made(4, 8, batch_first=True, structure=sm.LowRank(2), **more), torch.randn(5, 3, 4)
    outcomes = []
    for inplace in (False, True):
        layer.zero_grad()
        nn.functional.relu(layer(x)[0], inplace=inplace).square().sum().backward()
        outcomes.append([p.grad.clone() for p in layer.parameters()])
    assert count == [True] * 2
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, two)


def test_a_gradient_needs_a_new_pass() -> None:
    layer = StructuredGRU(4, 8, structure=sm.LowRank(2))
    y = layer(torch.randn(5, 3, 4))[0].sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_threads_give_the_same_bits() -> None:
    torch.manual_seed(0)
    layer = StructuredLSTM(16, 128, structure=sm.Monarch(4))
    x, threads = torch.randn(5, 100, 16), torch.get_num_threads()
    outcomes = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            layer.zero_grad()
            layer(x)[0].square().sum().backward()
            outcomes.append([p.grad.clone() for name, p in layer.named_parameters() if name.startswith("hh")])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*outcomes, strict=True))


def test_it_learns_as_the_reference_does() -> None:
    """Twenty steps of Adam lead to the same weights."""
    ends = []
    for backend in ("reference", "auto"):
        torch.manual_seed(0)
        layer = StructuredLSTM(6, 24, 2, structure=sm.GBLR(4), dropout=0.2, dtype=torch.float64)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        x, wanted = torch.randn(10, 12, 6).double(), torch.rand(10, 12, 24).double()
        with sm.backend(backend):
            for _ in range(20):
                optimizer.zero_grad()
                (layer(x)[0] - wanted).square().mean().backward()
                optimizer.step()
        ends.append([p.detach() for p in layer.parameters()])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fault", ["cell", "kept", "states", "memory", "gradient", "gates", "products", "matrix"])
def test_the_operator_refuses_what_does_not_fit(fault: str) -> None:
    kind = int(NativeCell.GRU if fault == "products" else NativeCell.LSTM)
    wide = 12 if fault == "products" else 16
    kept, start, memory, y = (
        torch.rand(3, 2, 16 if fault == "products" else 20),
        *torch.rand(2, 2, 4),
        torch.rand(3, 2, 4),
    )
    grad, grad_memory, grad_x = torch.rand(3, 2, 4), torch.rand(2, 4), torch.empty(3, 2, wide)
    grad_s, grad_start, weight = torch.empty(0), torch.empty(2, 4), torch.randn(4, wide)
    if fault == "cell":
        kind = -1
    elif fault == "kept":
        kept = torch.rand(3, 2, 16)
    elif fault == "states":
        y = torch.rand(2, 3, 4).transpose(0, 1)
    elif fault == "memory":
        memory = memory.double()
    elif fault == "gradient":
        grad = torch.rand(3, 4, 2).mT
    elif fault == "gates":
        grad_x = torch.empty(3, 2, 15)
    elif fault == "matrix":
        weight = torch.randn(4, 12)
    words = f"rows 4 contract 1 4 {weight.shape[1]} 1 0 0 0 0"
    with pytest.raises(ValueError, match="structmat: "):
        torch.ops.structmat.recur_backward.default(
            kept, start, memory, y, grad, grad_memory, grad_x, grad_s, grad_start, [weight], words, kind
        )


@pytest.mark.parametrize("kept", [(3, 2, 19), (6, 20)])
def test_what_is_kept_has_its_room(kept: tuple[int, ...]) -> None:
    gates, start, y, weight = torch.randn(3, 2, 16), torch.randn(2, 4), torch.empty(3, 2, 4), torch.randn(16, 4)
    with pytest.raises(ValueError, match="structmat: "):
        torch.ops.structmat.recur_keeping.default(
            gates, start, start.clone(), y, torch.empty(kept), [weight], "rows 16 contract 1 16 4 1 0 0 0 0", 0
        )
