"""The temperature at which a classifier says something of most of its data, and what goes by it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import structmat as sm
from structmat.compression.calibrate import calibrate
from structmat.compression.effects import Probe
from structmat.compression.recover import Distill, recover
from structmat.compression.scan import scan
from structmat.compression.softening import SHARE, TEMPERATURES, TERMS, effective_share, peeked, temperature_for
from structmat.errors import BudgetError


def logits_of(certainty: float, terms: int = 400, classes: int = 10) -> Tensor:
    """Most terms are certain of one class; a few are not."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(terms, classes, generator=generator)
    values[torch.arange(terms), torch.randint(classes, (terms,), generator=generator)] += certainty
    values[: terms // 20] = torch.randn(terms // 20, classes, generator=generator)
    return values


class Net(nn.Module):
    """Certain of its classes by the factor of its head."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.head = nn.Linear(12, 48), nn.Linear(48, 48), nn.Linear(48, 5)
        self.factor, self.calls = factor, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def batches(count: int = 8, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(size, 12, generator=generator), torch.arange(size) % 5) for _ in range(count)]


# -------------------------------------------------------------------------------------------------- the temperature


@settings(deadline=None, max_examples=40)
@given(terms=st.integers(1, 60), classes=st.integers(2, 9), scale=st.floats(0.1, 200.0), seed=st.integers(0, 2**20))
def test_it_is_the_least_at_which_half_of_the_terms_count(terms: int, classes: int, scale: float, seed: int) -> None:
    logits = scale * torch.randn(terms, classes, generator=torch.Generator().manual_seed(seed))
    chosen = temperature_for(logits)
    assert chosen in TEMPERATURES
    assert chosen == TEMPERATURES[-1] or effective_share(logits / chosen) >= SHARE
    assert all(effective_share(logits / lower) < SHARE for lower in TEMPERATURES if lower < chosen)


def test_the_share_is_that_of_terms_that_weigh_alike() -> None:
    doubtful, certain = torch.zeros(3, 4), torch.tensor([[100.0, 0.0, 0.0, 0.0]]).repeat(9, 1)
    assert effective_share(doubtful) == pytest.approx(1.0)
    assert effective_share(torch.cat([doubtful, certain])) == pytest.approx(3 / 12)
    assert effective_share(certain.double() * 1e6) == 0.0


def test_doubt_needs_no_temperature_and_certainty_does() -> None:
    assert temperature_for(logits_of(0.0)) == 1.0
    found = [temperature_for(logits_of(certainty)) for certainty in (8.0, 12.0, 20.0)]
    assert 1.0 < found[0] < found[1] < found[2]


def test_a_scale_of_the_logits_is_a_scale_of_the_temperature() -> None:
    one, two = temperature_for(logits_of(12.0)), temperature_for(2.0 * logits_of(12.0))
    assert two == pytest.approx(2.0 * one)


def test_terms_that_say_nothing_at_any_temperature_are_left_aside() -> None:
    logits = logits_of(8.0)
    ruled_out = torch.full((4000, 10), -math.inf)
    ruled_out[:, 2] = 3.0
    broken = torch.full((50, 10), math.nan)
    assert temperature_for(torch.cat([logits, ruled_out, broken])) == temperature_for(logits) > 1
    assert temperature_for(broken) == temperature_for(ruled_out) == 1.0


class Counted(list[Any]):
    """How many batches of each pass were read."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.read: list[int] = []

    def __iter__(self) -> Any:
        self.read.append(0)
        for item in super().__iter__():
            self.read[-1] += 1
            yield item


def test_peeking_reads_no_more_than_it_needs() -> None:
    data = Counted(batches(200))
    temperature, again = peeked(Net(60.0), data, None)
    assert temperature > 1
    assert again is data
    assert data.read == [math.ceil(TERMS / 32)]


def test_peeking_gives_back_what_can_be_read_only_once() -> None:
    read: list[int] = []

    def once() -> Any:
        for number, batch in enumerate(batches()):
            read.append(number)
            yield batch

    temperature, again = peeked(Net(60.0), once(), None)
    assert temperature > 1
    assert read == [0]
    assert [torch.equal(x, y) for (x, _), (y, _) in zip(again, batches(), strict=True)] == [True] * 8
    unlabelled, rest = peeked(Net(60.0), iter([x for x, _ in batches()]), None)
    assert unlabelled == 1.0
    assert len(list(rest)) == 8


# ---------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_are_those_of_the_distance_at_the_temperature(temperature: float) -> None:
    """Their second moment in the last layer is the Fisher information of the softened softmax, exactly in the mean."""
    net = Net(8.0).double()
    data = [(torch.randn(2000, 12, dtype=torch.float64), torch.zeros(2000, dtype=torch.long)) for _ in range(6)]
    seen = calibrate(net, scan(net, include=["head"]).sites, data, temperature=temperature)
    p = torch.softmax(torch.cat([net(x) for x, _ in data]).detach() / temperature, -1)
    fisher = net.factor**2 * (torch.diag(p.mean(0)) - p.T @ p / len(p))
    found = seen.moments["head"].gradient_moment
    assert found is not None
    assert seen.temperature == temperature
    assert float((found - fisher).norm() / fisher.norm()) < 0.05


def test_the_quadratic_prediction_is_the_distance_of_small_changes() -> None:
    """So that what is predicted and what is measured agree at every temperature."""
    net = Net(60.0)
    data = batches(16, 64)
    seen = calibrate(net, scan(net, include=["head"]).sites, data)
    assert seen.temperature > 1
    moments = seen.moments["head"]
    assert moments.gradient_moment is not None
    change = 1e-3 * torch.randn(5, 48, generator=torch.Generator().manual_seed(5))
    probe = Probe(net, data, None, None, seen.temperature)
    measured = probe.effect(net.head, (net.head.weight + change).detach()[None])
    wide = change.double()
    # The factored moments are exact in expectation where inputs and gradients are independent: only near here.
    predicted = 0.5 * float(torch.trace(moments.gradient_moment @ wide @ moments.second_moment @ wide.T))
    assert 0.5 < predicted / measured < 2.0


def test_calibration_finds_its_temperature_and_reads_a_generator_once() -> None:
    net = Net(60.0)
    sites = scan(net).sites
    listed = calibrate(net, sites, batches())
    assert listed.temperature == temperature_for(torch.cat([net(x) for x, _ in batches()])) > 1
    read_once = calibrate(net, sites, (batch for batch in batches()))
    assert (read_once.batches, read_once.samples) == (8, 256)
    assert read_once.temperature == temperature_for(net(batches()[0][0]))
    for name, moments in listed.moments.items():
        assert moments.calls == 8
        assert torch.equal(moments.second_moment, read_once.moments[name].second_moment)
    assert calibrate(net, sites, batches(), loss=lambda y, b: functional.cross_entropy(y, b[1])).temperature == 1.0
    assert calibrate(net, sites, batches(), gradients=False).temperature == 1.0
    assert calibrate(net, sites, [x for x, _ in batches()]).temperature == 1.0
    assert calibrate(Net(1.0), sites, batches()).temperature == 1.0


# -------------------------------------------------------------------------------------------------------- compress


def test_the_report_says_the_temperature(tmp_path: Path) -> None:
    result = sm.compress(Net(60.0), budget=sm.Parameters(0.5), calibration=batches(), folder=tmp_path)
    assert result.report.calibration is not None
    found = result.report.calibration["temperature"]
    assert found > 1
    assert "calibration temperature" in (tmp_path / "report.html").read_text()
    again = sm.compress(Net(60.0), budget=sm.Parameters(0.5), calibration=batches(), folder=tmp_path)
    assert again.report.calibration == result.report.calibration
    recovered = sm.compress(
        Net(60.0), budget=sm.Parameters(0.5), calibration=batches(), recover=Distill(steps=3), folder=tmp_path / "third"
    )
    assert recovered.report.recovery is not None
    assert recovered.report.recovery["temperature"] == found
    assert f"of the logits at temperature {found:g}." in (tmp_path / "third/report.html").read_text()
    given_one = sm.compress(
        Net(60.0), budget=sm.Parameters(0.5), calibration=batches(), temperature=found, folder=tmp_path / "other"
    )
    assert given_one.report.predicted_loss == pytest.approx(result.report.predicted_loss)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, True, "4"])
def test_a_temperature_that_is_none_is_named(temperature: Any) -> None:
    with pytest.raises(BudgetError, match=r"temperature=.* is a number above 0, or None"):
        sm.compress(Net(1.0), budget=sm.Parameters(0.5), calibration=batches(), temperature=temperature)


# -------------------------------------------------------------------------------------------------------- recovery


def test_recovery_finds_its_temperature() -> None:
    """The same as by hand; and 1 for a classifier in doubt."""
    for factor in (60.0, 1.0):
        net = Net(factor)
        expected = temperature_for(torch.cat([net(x) for x, _ in batches()]))
        found = []
        for temperature in (None, expected):
            model = copy.deepcopy(net)
            model.second = sm.nn.StructuredLinear.from_linear(model.second, sm.LowRank(rank=4))
            done = recover(model, net, batches(), Distill(steps=5, temperature=temperature), show=False)
            assert done.temperature == expected
            found.append(model.second.left.detach())
        assert torch.equal(*found)
        assert (expected > 1) == (factor > 1)
