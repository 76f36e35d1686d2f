"""Packed sequences in one native call: what each sequence alone gives."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from recurrent_layers import KINDS, UNPROJECTED, flat
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import structmat as sm
from structmat.nn import StructuredLSTM
from structmat.nn.recurrent import directions
from structmat.nn.recurrent.packing import packing

pytestmark = pytest.mark.skipif(
    not sm.kernels.native().available or sm.kernels.native().by_address is not None,
    reason="there are no operators of the native backend",
)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of a state's matrix for one time."""
    taken: list[int] = []
    stepped = directions._stepped

    def counted(*given: Any) -> Any:
        taken.append(1)
        return stepped(*given)

    monkeypatch.setattr(directions, "_stepped", counted)
    return taken


@given(
    kind=st.sampled_from(UNPROJECTED),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    flags=st.tuples(*[st.booleans()] * 4),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_outcomes_and_gradients_are_those_time_by_time(
    kind: str, lengths: list[int], flags: tuple[bool, ...], dtype: torch.dtype, seed: int
) -> None:
    bidirectional, given_state, bias, per_gate = flags
    made, more = KINDS[kind]
    torch.manual_seed(seed)
    layer = made(
        5,
        11,
        2,
        bias=bias,
        bidirectional=bidirectional,
        structure=sm.LowRank(2),
        per_gate=per_gate,
        dtype=dtype,
        **more,
    )
    x = pack_sequence([torch.randn(n, 5, dtype=dtype) for n in lengths], enforce_sorted=False)
    data = x.data.detach().requires_grad_()
    count = 2 * (1 + bidirectional)
    parts = [torch.randn(count, len(lengths), 11, dtype=dtype, requires_grad=True) for _ in range(1 + (kind == "LSTM"))]
    state = () if not given_state else (tuple(parts),) if kind == "LSTM" else tuple(parts)
    leaves = [data, *(parts if given_state else []), *layer.parameters()]

    def run() -> list[Tensor]:
        return flat(layer(PackedSequence(data, *x[1:]), *state))

    weights = [torch.randn_like(y) for y in run()]
    outcomes = []
    for backend in ("auto", "reference"):
        with sm.backend(backend):
            found = run()
            loss = torch.stack([(y * w).sum() for y, w in zip(found, weights, strict=True)]).sum()
            outcomes.append([*found, *torch.autograd.grad(loss, leaves)])
            with torch.no_grad():
                outcomes[-1] += run()
    for ours, theirs in zip(*outcomes, strict=True):
        scale = max(1.0, float(theirs.detach().abs().max()))
        tolerance = (1e-12 if dtype is torch.float64 else 1e-4) * scale
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", UNPROJECTED)
def test_they_are_one_call_unless_lengths_differ_much(kind: str, steps: list[int]) -> None:
    made, more = KINDS[kind]
    layer = made(4, 8, bidirectional=True, structure=sm.Monarch(2), **more)
    near, equal, far = (
        pack_sequence([torch.randn(n, 4) for n in lengths]) for lengths in ((7, 4, 4), (6, 6), (9, 1, 1, 1))
    )
    for x in (near, equal):
        layer(x)
        with torch.no_grad():
            layer(x)
    assert steps == []
    layer(far)
    assert len(steps) == 2 * 9
    steps.clear()
    with sm.backend("reference"):
        layer(near)
    assert len(steps) == 2 * 7


def test_memories_after_the_end_are_exactly_those_of_it() -> None:
    torch.manual_seed(0)
    layer = StructuredLSTM(3, 20, structure=sm.Sparse(0.3)).eval()
    sequences = [torch.randn(n, 3) for n in (40, 38, 3, 1)]
    with torch.no_grad():
        memory = layer(pack_sequence(sequences))[1][1]
        for number, sequence in enumerate(sequences):
            alone = layer(sequence[:, None].expand(-1, 4, -1).contiguous())[1][1]  # of as many rows
            assert torch.equal(memory[0, number], alone[0, 0])


def test_what_is_no_number_stays_in_its_sequence() -> None:
    torch.manual_seed(0)
    layer = StructuredLSTM(3, 8, bidirectional=True, structure=sm.LowRank(2))
    first, second = torch.full((4, 3), float("nan")), torch.randn(3, 3)
    found = torch.nn.utils.rnn.pad_packed_sequence(layer(pack_sequence([first, second]))[0])[0]
    assert found[:, 0].isnan().all()
    torch.testing.assert_close(found[:3, 1], layer(second)[0])


def test_places_of_three_sequences() -> None:
    """Lengths 3, 2 and 1: packed rows are a0 b0 c0 | a1 b1 | a2."""
    forwards, backwards = packing([3, 2, 1], False), packing([3, 2, 1], True)
    assert forwards is not None
    assert backwards is not None
    assert forwards.source.view(3, 3).tolist() == [[0, 1, 2], [3, 4, 0], [5, 0, 0]]
    assert backwards.source.view(3, 3).tolist() == [[5, 4, 2], [3, 1, 0], [0, 0, 0]]
    assert forwards.places.tolist() == [0, 1, 2, 3, 4, 6]
    assert backwards.places.tolist() == [6, 4, 2, 3, 1, 0]
    assert forwards.last.tolist() == backwards.last.tolist() == [6, 4, 2]
    assert packing([5, 1, 1, 1], False) is None
