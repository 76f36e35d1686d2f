"""Timing in turns, size, memory, quality."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.compression.evaluate import (
    bytes_on_disk,
    evaluated,
    first_batch,
    interleaved,
    peak_memory,
    sized,
    time_models,
)
from structmat.errors import DataError


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.seen = seconds, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.seen.append(len(x))
        time.sleep(self.seconds)
        return x


def test_the_slower_model_is_measured_slower() -> None:
    slow, fast = Sleeper(0.008), Sleeper(0.002)
    slow.train()
    found = time_models(slow, fast, sized(torch.zeros(4, 3), [1, 8]), seconds=0.02)
    assert [t.batch for t in found] == [1, 8]
    for timing in found:
        assert timing.runs >= 7
        assert timing.before > timing.after
        assert 0.1 < timing.ratio < 0.7
        assert 8 <= timing.before < 40
    assert set(slow.seen) == {1, 8}
    assert slow.training  # modes are restored


def test_runs_are_interleaved_and_alternate() -> None:
    order: list[str] = []
    first, second = interleaved(lambda: order.append("a"), lambda: order.append("b"), seconds=0, fewest=4)
    assert "".join(order) == "abab" + "abbaabba"
    assert len(first) == len(second) == 4


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (torch.zeros(4, 2), {1: 1, 4: 4, 10: 10}),
        ((torch.zeros(4, 2), torch.zeros(4)), {1: 1, 10: 10}),
        ({"x": torch.zeros(4, 2), "mask": torch.zeros(4, 2)}, {3: 3, 6: 6}),
    ],
)
def test_batches_are_cut_or_repeated(batch: Any, sizes: dict[int, int]) -> None:
    for size, found in sized(batch, list(sizes)).items():
        tensors = [found] if isinstance(found, torch.Tensor) else found.values() if isinstance(found, dict) else found
        assert {len(t) for t in tensors} == {size}
        assert type(found) is type(batch)


def test_batches_that_can_not_be_cut_stay() -> None:
    batch = {"x": torch.zeros(4, 2), "scale": 2.0}
    assert sized(batch, [1, 16]) == {4: batch}
    with pytest.raises(DataError, match="without samples"):
        sized(torch.zeros(0, 2), [1])


def test_bytes_on_disk_are_those_of_the_tensors() -> None:
    dense = nn.Sequential(nn.Linear(256, 256, bias=False))
    small = nn.Sequential(sm.nn.StructuredLinear.from_linear(dense[0], sm.LowRank(rank=8)))
    assert 0 <= bytes_on_disk(dense) - 4 * 256 * 256 < 2000
    assert 0 <= bytes_on_disk(small) - 4 * 256 * 16 < 2000


def test_peak_memory_sees_what_is_freed_again() -> None:
    size = 64 * 2**20

    def allocate() -> int:
        return int(torch.ones(size // 4).sum()) * 4

    value, peak = peak_memory(allocate)
    assert value == size
    if peak is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 0.9 * size < peak < 3 * size


def test_quality_is_one_number() -> None:
    model = nn.Dropout()
    model.train()
    assert evaluated(None, model) is None
    assert evaluated(lambda m: torch.tensor(float(m.training)), model) == 0.0
    assert model.training
    with pytest.raises(DataError, match="one number"):
        evaluated(lambda m: "good", model)  # type: ignore[arg-type,return-value]


def test_first_batch() -> None:
    assert first_batch([3, 4]) == 3
    with pytest.raises(DataError, match="no batches"):
        first_batch([])
