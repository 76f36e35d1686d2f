"""The gates of many times are made a few times after another, in memory that is used again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_layers import KINDS, dense, flat
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import structmat as sm
from structmat.kernels.operator import FEW_ROWS
from structmat.nn import StructuredGRU, StructuredLSTM
from structmat.nn.recurrent import parts
from structmat.structure import Structure

STRUCTURES: tuple[Structure, ...] = (sm.Dense(), sm.LowRank(2), sm.Monarch(2), sm.Toeplitz(), sm.Butterfly())


@given(
    st.sampled_from(sorted(KINDS)), st.sampled_from(STRUCTURES), st.integers(1, 60), st.integers(1, 20),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["auto", "reference"]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a_few_times_after_another_give_what_all_at_once_do(
    kind: str, structure: Structure, times: int, rows: int, batch_first: bool, both: bool, per_gate: bool,
    freezes: bool, backend: str,
) -> None:  # fmt: skip
    made, more = KINDS[kind]
    torch.manual_seed(times)
    layer = made(
        5, 8, 2, batch_first=batch_first, bidirectional=both, structure=structure, per_gate=per_gate,
        dtype=torch.float64, **more,
    ).eval()  # fmt: skip
    x = torch.randn(*((rows, times) if batch_first else (times, rows)), 5, dtype=torch.float64)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch, sm.backend(backend):
        patch.setattr(parts, "AT_ONCE", 600)
        found = flat((layer.freeze() if freezes else layer)(x))
        wanted = flat(dense(layer)(x))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@given(st.integers(1, 70), st.integers(1, 30), st.integers(1, 40), st.booleans(), st.integers(1, 2000))
@settings(max_examples=80, deadline=None)
def test_parts_hold_every_time_once_and_are_no_larger_than_asked(
    times: int, rows: int, wide: int, backwards: bool, most: int
) -> None:
    layer, x = nn.Linear(3, wide), torch.randn(times, rows, 3)
    seen: list[int] = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "AT_ONCE", most)
        wanted = layer(x)
        for now, gates in parts.in_parts(layer, x, backwards=backwards):
            torch.testing.assert_close(gates, wanted[now])
            own = range(times)[now]
            seen += reversed(own) if backwards else own
            fewest = 2 * -(-FEW_ROWS // rows)
            assert gates.numel() <= max(most, fewest * rows * wide) or len(own) == times == 1
            assert len(own) == times or len(own) * rows >= FEW_ROWS
    assert seen == (list(reversed(range(times))) if backwards else list(range(times)))


def test_parts_share_their_memory() -> None:
    layer, x = sm.nn.StructuredLinear(32, 64, structure=sm.LowRank(4)), torch.randn(1000, 64, 32)
    with torch.no_grad():
        places = [gates.data_ptr() for _, gates in parts.in_parts(layer, x, backwards=False)]
    assert len(places) == 8
    assert len(set(places)) == 1


@pytest.mark.parametrize("kind", [StructuredLSTM, StructuredGRU])
def test_memory_grows_with_the_outputs_alone(kind: type[StructuredLSTM] | type[StructuredGRU]) -> None:
    layer, x = kind(16, 64, structure=sm.LowRank(8)).eval(), torch.randn(2000, 16, 16)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y = layer(x)[0]
    taken = sum(e.self_cpu_memory_usage for e in seen.events() if e.self_cpu_memory_usage > 0)
    assert taken <= 4 * (y.numel() + 2 * parts.AT_ONCE), "gates are 3 and 4 times as many as outputs"


def test_a_layer_with_hooks_is_called_once_for_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = StructuredGRU(4, 6, structure=sm.LowRank(2)).eval(), torch.randn(50, 8, 4)
    monkeypatch.setattr(parts, "AT_ONCE", 300)
    seen: list[torch.Size] = []

    def hook(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen.append(made.shape)

    with torch.no_grad():
        wanted = layer(x)[0]
        layer.get_submodule("ih_l0").register_forward_hook(hook)
        found = layer(x)[0]
    torch.testing.assert_close(found, wanted)
    assert seen == [torch.Size((50, 8, 18))]
