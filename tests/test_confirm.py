"""What is chosen is measured, and chosen again where it does what was not predicted."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import structmat as sm
from structmat.compression import confirm
from structmat.compression.choose import Check, between
from structmat.compression.effects import Effects, Probe
from structmat.compression.scan import Site
from structmat.structure import Structure, count_stored

compress_module = importlib.import_module("structmat.compression.compress")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.head = nn.Linear(24, 64), nn.Linear(64, 64), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(64, 24, generator=generator), torch.arange(64) % 6) for _ in range(count)]


class Watched(Effects):
    """Notes what is measured; says of one family that it does far more than it does."""

    blamed: type[Structure] | None = None
    asked: list[tuple[str, Structure]] = []  # noqa: RUF012 (set anew for each test)

    def of(self, site: Site, structures: Sequence[Structure]) -> list[float]:
        self.asked.extend((site.name, structure) for structure in structures)
        found = super().of(site, structures)
        return [
            e * 1e3 if self.blamed and isinstance(s, self.blamed) else e for s, e in zip(structures, found, strict=True)
        ]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setattr(Watched, "asked", [])
    monkeypatch.setattr(Watched, "blamed", None)
    monkeypatch.setattr(compress_module, "Effects", Watched)
    return Watched


def compressed(**options: Any) -> sm.Result[Any]:
    asked: dict[str, Any] = {
        "budget": sm.Parameters(0.4),
        "calibration": batches(),
        "structures": ("LowRank", "Sparse"),
        **options,
    }
    return sm.compress(Net(), **asked)


def families(result: sm.Result[Any]) -> set[str]:
    return {type(structure).__name__ for structure in result.plan.layers.values()}


def test_a_family_that_does_what_was_not_predicted_is_left(watched: type[Watched]) -> None:
    plain = families(compressed())
    for family in (sm.LowRank, sm.Sparse):
        watched.asked.clear()
        watched.blamed = family
        result = compressed()
        assert family.__name__ not in families(result)
        assert result.report.budget["spent"] <= result.report.budget["limit"]
        if family.__name__ in plain:
            assert any(isinstance(structure, family) for _, structure in watched.asked)
    assert plain & {"LowRank", "Sparse"}


def test_all_that_is_chosen_was_measured(watched: type[Watched]) -> None:
    plan = compressed().plan
    assert plan.changed
    for name in plan.changed:
        structure, shape = plan.layers[name], plan.shapes[name]
        size = count_stored(structure, shape)
        sizes = [count_stored(s, shape) for n, s in watched.asked if n == name and type(s) is type(structure)]
        assert any(other / confirm.NEAR <= size <= other * confirm.NEAR for other in sizes), (name, sizes)


def test_what_is_predicted_is_what_single_layers_do() -> None:
    result = compressed()
    assert result.report.calibration is not None
    probe = Probe(Net(), batches(), None, None, result.report.calibration["temperature"])
    predicted = {layer.name: layer.predicted_loss for layer in result.report.layers}
    total = 0.0
    for name in result.plan.changed:
        one = sm.Plan({name: result.plan.layers[name]}, {name: result.plan.shapes[name]})
        effect = probe.distance(compressed(budget=None, plan=one).model)
        assert predicted[name] == pytest.approx(effect, rel=0.25), name
        total += effect
    assert result.report.predicted_loss == pytest.approx(total, rel=0.15)


def test_nothing_is_measured_twice_in_a_folder(tmp_path: Path, watched: type[Watched]) -> None:
    first = compressed(folder=tmp_path)
    assert watched.asked
    watched.asked.clear()
    again = compressed(folder=tmp_path)
    assert not watched.asked
    assert again.plan == first.plan
    assert again.report.predicted_loss == first.report.predicted_loss
    assert len(list((tmp_path / "confirm").iterdir())) >= 1


def test_nothing_is_measured_where_nobody_wants_it(watched: type[Watched]) -> None:
    compressed(measure=False)
    compressed(calibration=None)
    compressed(budget=None, plan=sm.Plan({"first": sm.LowRank(rank=4)}, {"first": (64, 24)}))
    assert not watched.asked


def test_fixed_layers_are_not_measured(watched: type[Watched]) -> None:
    plan = compressed(overrides={"second": sm.Sparse(nonzeros=1000)}).plan
    names = {name for name, _ in watched.asked}
    assert set(plan.changed) - {"second"} <= names <= {"first", "head"}


def test_rounds_end(watched: type[Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though no measurement ever agrees with the last one: the choice that was measured best is taken."""
    noise = iter(range(10**6))

    def of(self: Watched, site: Site, structures: Sequence[Structure]) -> list[float]:
        return [(7.0 if next(noise) % 2 else 1e-4) for _ in structures]

    monkeypatch.setattr(Watched, "of", of)
    monkeypatch.setattr(confirm, "NEAR", 1.0)
    result = compressed()
    assert result.report.budget["spent"] <= result.report.budget["limit"]
    assert next(noise) <= 1 + 3 * confirm.ROUNDS


def test_a_quality_is_sought_among_confirmed_choices(watched: type[Watched]) -> None:
    def error(model: nn.Module) -> float:
        x = torch.cat([x for x, _ in batches()])
        with torch.no_grad():
            return float((model(x) - Net()(x)).square().mean() / Net()(x).square().mean())

    watched.blamed = sm.LowRank
    result = compressed(budget=sm.Quality(at_most=0.05), evaluate=error)
    assert error(result.model) <= 0.05
    assert "LowRank" not in families(result)


@given(
    costs=st.lists(st.floats(1.0, 1e6), min_size=1, max_size=5, unique=True),
    factors=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5),
    cost=st.floats(0.5, 2e6),
)
def test_factors_between_checks(costs: list[float], factors: list[float], cost: float) -> None:
    checks = [Check(c, f) for c, f in zip(sorted(costs), factors, strict=False)]
    found = between(checks, cost)
    assert min(c.factor for c in checks) * (1 - 1e-9) <= found <= max(c.factor for c in checks) * (1 + 1e-9)
    for check in checks:
        assert between(checks, check.cost) == pytest.approx(check.factor)
    assert between((), cost) == 1.0
    middle = between([Check(10.0, 2.0), Check(1000.0, 8.0)], 100.0)
    assert middle == pytest.approx(math.sqrt(16.0))
