"""Timing in turns."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.compression.timing import interleaved, layer_microseconds, sized, time_models
from structmat.errors import DataError
from structmat.structures.dense import Dense


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


def test_a_layer_s_time_is_that_of_the_dense_one_times_their_ratio() -> None:
    shape, rows = (512, 512), 256
    dense = layer_microseconds(Dense(), shape, rows)
    assert dense > 0
    assert layer_microseconds(sm.LowRank(rank=8), shape, rows) < 0.7 * dense
    assert layer_microseconds(Dense(), shape, rows) == dense  # measured once a process
