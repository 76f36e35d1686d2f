"""All times of a recurrent net in one native call: it computes what PyTorch's layers do."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from recurrent_layers import KINDS, UNPROJECTED, Called, calls_of, dense, flat

import structmat as sm
from structmat.kernels.recurrence import NativeCell
from structmat.nn import StructuredGRU, StructuredLSTM
from structmat.nn.recurrent import directions
from structmat.nn.recurrent.cells import State
from structmat.structure import Structure

pytestmark = pytest.mark.skipif(
    not sm.kernels.native().available or sm.kernels.native().by_address is not None,
    reason="there are no operators of the native backend",
)

STRUCTURES: tuple[Structure, ...] = (
    sm.Dense(), sm.LowRank(2), sm.Monarch(2), sm.Sparse(0.3), sm.GBLR(2), sm.Butterfly(), sm.Toeplitz(),
    sm.Sum(sm.LowRank(1), sm.Sparse(nonzeros=7)),
)  # fmt: skip


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many directions the native backend took."""
    taken: list[int] = []
    recur = directions.recur

    def counted(*given: Any, **more: Any) -> State | None:
        found = recur(*given, **more)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(directions, "recur", counted)
    return taken


@given(calls_of(STRUCTURES), st.booleans())
@settings(max_examples=150, deadline=None)
def test_it_computes_what_pytorch_does(called: Called, freezes: bool) -> None:
    layer, x, parts, state = called.layer.eval(), called.x, called.parts, called.state
    kept = [part.clone() for part in parts]
    run = layer.freeze() if freezes else layer
    with torch.no_grad():
        found, wanted = flat(run(x, *state)), flat(dense(layer)(x, *state))
    exact = x.dtype is torch.float64
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9 if exact else 1e-4, atol=1e-11 if exact else 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(parts, kept, strict=True)), "a state that was given has changed"


@pytest.mark.parametrize("kind", UNPROJECTED)
@pytest.mark.parametrize("rows", [1, 9])
def test_it_runs_where_nothing_is_recorded_and_nowhere_else(kind: str, rows: int, count: list[int]) -> None:
    made, more = KINDS[kind]
    layer = made(5, 16, 2, bidirectional=True, structure=sm.Monarch(2), **more)
    x = torch.randn(7, rows, 5)
    layer(x)
    assert count == []  # gradients are recorded
    with torch.no_grad():
        layer(x)
        assert count == [1, 1, 1, 1]
        with sm.backend("reference"):
            layer(x)
        layer.half()(x.half())
    assert count == [1] * 4 + [0] * 8
    count.clear()
    frozen = layer.float().freeze()
    frozen.get_submodule("hh_l0").register_forward_hook(lambda *_: None)
    with torch.no_grad():
        frozen(x)
    assert count == [1, 1, 1]  # one has a hook to be called


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_states_are_made_time_by_time(count: list[int]) -> None:
    layer = StructuredLSTM(5, 8, proj_size=3, structure=sm.LowRank(2))
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.ones(4, 2, 5)), dense(layer)(torch.ones(4, 2, 5)))
    assert count == []


def test_what_is_no_number_stays_none_and_large_gates_saturate() -> None:
    layer = StructuredLSTM(4, 20, structure=sm.LowRank(2)).eval()
    x = torch.randn(3, 9, 4)
    x[1, 4] = float("nan")
    x[0, 2] = 1e30
    with torch.no_grad():
        found, wanted = layer(x)[0], dense(layer)(x)[0]
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found[1, 4].isnan().all()
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_threads_give_the_same_bits() -> None:
    layer = StructuredGRU(16, 128, structure=sm.Monarch(4)).freeze()
    x, threads = torch.randn(5, 100, 16), torch.get_num_threads()
    try:
        outcomes = []
        for number in (1, 2):
            torch.set_num_threads(number)
            with torch.no_grad():
                outcomes.append(layer(x)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("fault", ["cell", "width", "rows", "times", "dtype", "memory", "matrix"])
def test_the_operator_refuses_what_does_not_fit(fault: str) -> None:
    gates, start, memory = torch.randn(3, 2, 16), torch.randn(2, 4), torch.randn(2, 4)
    y, weight, kind = torch.empty(3, 2, 4), torch.randn(16, 4), int(NativeCell.LSTM)
    if fault == "cell":
        kind = 8
    elif fault == "width":
        gates = torch.randn(3, 2, 15)
    elif fault == "rows":
        start = torch.randn(3, 4)
    elif fault == "times":
        y = torch.empty(2, 2, 4)
    elif fault == "dtype":
        start = start.double()
    elif fault == "memory":
        memory = torch.randn(4, 2).T
    else:
        weight = torch.randn(12, 4)
    words = f"rows {weight.shape[0]} contract 1 {weight.shape[0]} 4 1 0 0 0 0"
    with pytest.raises(ValueError, match="structmat: "):
        torch.ops.structmat.recur.default(gates, start, memory, y, [weight], words, kind)
