"""Choosing again from what layers add in the compressed model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.compression import again
from structmat.compression.choose import Chooser
from structmat.compression.effects import Probe


def net() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6)
    )


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(64, 24, generator=generator), torch.arange(64) % 6) for _ in range(count)]


def compressed(**options: Any) -> sm.Result[nn.Sequential]:
    asked = {"budget": sm.Parameters(0.3), "structures": ("LowRank", "Sparse", "Monarch"), **options}
    return sm.compress(net(), calibration=batches(), **asked)


def test_what_layers_add_is_the_distance_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as they are called; the model is as it was afterwards."""
    plain, seen = again._added, []

    def added(chooser: Chooser, allocation: Any, model: nn.Module, original: nn.Module, probe: Probe) -> Any:
        before = [id(module) for module in model.modules()]
        found = plain(chooser, allocation, model, original, probe)
        assert [id(module) for module in model.modules()] == before
        seen.append((sum(found.values()), probe.distance(model), probe.distance(original), list(found)))
        return found

    monkeypatch.setattr(again, "_added", added)
    compressed(rounds=2)
    assert seen
    for total, distance, nothing, names in seen:
        assert total == pytest.approx(distance - nothing, rel=1e-4)
        assert names == sorted(names)  # of this model the order of the calls


def test_a_family_that_adds_more_than_it_should_is_left_at_that_layer_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    once = compressed()
    name = max(once.plan.changed, key=lambda n: once.plan.shapes[n][0] * once.plan.shapes[n][1])
    family = type(once.plan.layers[name])
    built = []

    def added(chooser: Chooser, allocation: Any, *_: Any) -> dict[str, float]:
        built.append({n: type(c.structure) for n, c in allocation.chosen.items()})
        found = {n: c.loss for n, c in allocation.chosen.items() if c.loss > 0}
        if isinstance(allocation.chosen[name].structure, family):
            found[name] *= 1e6
        return found

    monkeypatch.setattr(again, "_added", added)
    monkeypatch.setattr(again, "MOST", 1e6)
    compressed(rounds=2)
    assert built[0][name] is family
    assert built[1][name] is not family
    others = [n for n in once.plan.changed if n != name]
    assert any(built[1][n] is built[0][n] for n in others)


def test_a_layer_that_makes_up_for_others_keeps_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    plain = Chooser.scaled

    def scaled(self: Chooser, factors: Any) -> Chooser:
        found.append(factors)
        return plain(self, factors)

    def added(chooser: Chooser, allocation: Any, *_: Any) -> dict[str, float]:
        return {n: -1.0 for n, c in allocation.chosen.items() if c.loss > 0}

    monkeypatch.setattr(again, "_added", added)
    monkeypatch.setattr(Chooser, "scaled", scaled)
    more = compressed(rounds=3)
    assert found == [{}]  # nothing was learnt, so that the same choice comes back
    assert more.plan == compressed().plan


class Choices:
    """In the place of a chooser: one choice after the other."""

    seen, sites = None, ()

    def __init__(self, ranks: list[int]) -> None:
        self.left = list(ranks)

    def scaled(self, _factors: Any) -> Choices:
        return self

    def filled(self, _limits: Any) -> tuple[Any, Any]:
        rank = self.left.pop(0)
        return f"screening {rank}", SimpleNamespace(chosen={"0": SimpleNamespace(structure=sm.LowRank(rank=rank))})


@pytest.mark.parametrize(
    ("ranks", "rounds", "expected"),
    [
        ([2, 3, 4], 3, [(4.0, True), (9.0, False), (2.0, True), (3.0, False)]),  # a worse one does not end the search
        ([2, 3, 4], 2, [(4.0, True), (9.0, False), (2.0, True)]),
        ([2, 1, 3], 3, [(4.0, True), (9.0, False)]),  # what comes back does
    ],
)
def test_the_nearest_of_all_that_were_built_is_kept(
    ranks: list[int], rounds: int, expected: list[tuple[float, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = {1: 4.0, 2: 9.0, 3: 2.0, 4: 3.0}
    monkeypatch.setattr(again, "Probe", lambda *_: SimpleNamespace(distance=lambda model: distances[model]))
    monkeypatch.setattr(again, "_factors", lambda *_: {})
    screening, allocation = Choices([1]).filled(())
    chooser: Any = Choices(ranks)
    found, best, how = again.choose_again(
        chooser, (), screening, allocation, lambda a: a.chosen["0"].structure.rank, net(), [], rounds
    )
    assert [(r.distance, r.better) for r in how] == expected
    nearest = min((d for d, _ in expected), default=4.0)
    assert distances[best.chosen["0"].structure.rank] == nearest  # type: ignore[index]
    assert found == f"screening {best.chosen['0'].structure.rank}"  # type: ignore[comparison-overlap,attr-defined]
