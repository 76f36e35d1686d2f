"""Several budgets at once, groups of layers, bytes, a quality to keep, the frontier: each holds what it promises."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compression_models import labelled, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import structmat as sm
from structmat.compression.allocate import Limit, allocate, curve
from structmat.compression.budget import parse_bytes
from structmat.compression.candidates import Candidate, LayerScreen
from structmat.compression.difference import difference, read_side
from structmat.compression.goals import Goals, read_goals
from structmat.compression.seek import Judge, Size, Tried, judge_of, seek
from structmat.errors import BudgetError, DataError, FormatError, ModelError, StructureError
from structmat.io import size_on_disk
from structmat.program import Call
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import Normal, ParameterSpec, Shape, count_stored

CLOSED = ("LowRank", "PivotedLowRank", "BlockDiagonal")


def compressed(**options: Any) -> sm.Result[Any]:
    given: dict[str, Any] = {"calibration": labelled(), "structures": CLOSED, **options}
    if "budget" not in given and "plan" not in given:
        given["budget"] = sm.Parameters(0.4)
    return sm.compress(given.pop("model", None) or mlp(), **given)


def error_of(model: nn.Module) -> dict[str, float]:
    """Relative squared error of the outputs: lower is better."""
    x = torch.cat([x for x, _ in labelled()])
    with torch.no_grad():
        before = mlp()(x)
        return {"error": float((model(x) - before).square().mean() / before.square().mean())}


# ------------------------------------------------------------------------------------------------ several limits


def screening_of(seed: int, layers: int, options: int) -> tuple[dict[str, LayerScreen], dict[tuple[str, int], float]]:
    """Candidates of given loss and cost, told apart by their ranks, and costs of another kind."""
    draw, found, second = random.Random(seed), {}, {}
    for i in range(layers):
        items = []
        for j in range(options):
            cost = float(draw.randint(1, 99))
            items.append(Candidate(sm.LowRank(j + 1), 1, 1, 0.0, 0.0, "none", "", draw.random(), cost))
            second[f"l{i}", j + 1] = float(draw.randint(1, 99))
        items.append(Candidate(sm.Dense(), 100, 100, 0.0, 0.0, "optimal", "kept", 0.0, 100.0))
        second[f"l{i}", 0] = 100.0
        found[f"l{i}"] = LayerScreen(f"l{i}", (64, 64), "weights", tuple(sorted(items, key=lambda c: c.cost)), {})
    return found, second


def two_limits(second: Mapping[tuple[str, int], float], layers: int, shares: tuple[float, float]) -> list[Limit]:
    dense = 100.0 * layers

    def other(name: str, candidate: Candidate) -> float:
        return second[name, getattr(candidate.structure, "rank", 0)]

    return [
        Limit(sm.Parameters(shares[0]), shares[0] * dense, dense, lambda _, c: c.cost),
        Limit(sm.Latency(shares[1]), shares[1] * dense, dense, other),
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_several_limits_agree_with_brute_force(seed: int, layers: int, options: int, a: float, b: float) -> None:
    screening, second = screening_of(seed, layers, options)
    limits = two_limits(second, layers, (a, b))
    names = list(screening)

    def spent(choice: tuple[Candidate, ...], one: Limit) -> float:
        return sum(one.spend(name, c) for name, c in zip(names, choice, strict=True))

    choices = list(itertools.product(*(s.candidates for s in screening.values())))
    legal = [c for c in choices if all(spent(c, one) <= one.most for one in limits)]
    if not legal:
        with pytest.raises(BudgetError):
            allocate(screening, limits)
        return
    found = allocate(screening, limits)
    for one in found.spent:
        assert one.cost <= one.limit.most
        assert one.cost == spent(tuple(found.chosen[n] for n in names), one.limit)
    assert found.loss == pytest.approx(min(sum(c.loss for c in choice) for choice in legal), rel=1e-6, abs=1e-12)


def test_budgets_that_only_fail_together_say_by_how_much() -> None:
    """Cheap in one is dear in the other: each alone can be met."""
    items = [Candidate(sm.LowRank(r), 1, 1, 0.0, 0.0, "none", "", 1.0, cost) for r, cost in ((1, 10.0), (2, 90.0))]
    dense = Candidate(sm.Dense(), 100, 100, 0.0, 0.0, "optimal", "kept", 0.0, 100.0)
    screening = {"x": LayerScreen("x", (64, 64), "weights", (*items, dense), {})}
    limits = two_limits({("x", 1): 90.0, ("x", 2): 10.0, ("x", 0): 100.0}, 1, (0.3, 0.3))
    with pytest.raises(BudgetError, match=r"at once.*each alone can be met.*Raise each of them to 3\.0000"):
        allocate(screening, limits)
    assert allocate(screening, two_limits({("x", 1): 90.0, ("x", 2): 10.0, ("x", 0): 100.0}, 1, (0.9, 0.9))).loss == 1.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5))
def test_every_choice_of_the_curve_is_the_best_for_what_it_spends(seed: int, layers: int, options: int) -> None:
    screening, _ = screening_of(seed, layers, options)
    everything = list(itertools.product(*(s.candidates for s in screening.values())))
    found = curve(screening)
    costs = [sum(c.cost for c in chosen.values()) for chosen in found]
    losses = [sum(c.loss for c in chosen.values()) for chosen in found]
    assert costs == sorted(costs)
    assert losses == sorted(losses, reverse=True)
    assert costs[0] == sum(min(c.cost for c in s.candidates) for s in screening.values())
    assert losses[-1] == 0.0
    for cost, loss in zip(costs, losses, strict=True):
        best = min(sum(c.loss for c in choice) for choice in everything if sum(c.cost for c in choice) <= cost)
        assert loss == pytest.approx(best, abs=1e-12)


def test_parameters_and_operations_at_once() -> None:
    result = compressed(budget=(sm.Parameters(0.5), sm.Flops(0.35)))
    report = result.report
    assert report.parameters.after <= 0.5 * report.parameters.before
    assert report.flops.after <= 0.35 * report.flops.before
    assert [g["unit"] for g in report.budget["goals"]] == ["parameters", "FLOPs"]
    alone = compressed(budget=sm.Parameters(0.5))
    assert alone.report.flops.after > 0.35 * report.flops.before  # the second budget did something
    data = json.loads(json.dumps(result.plan.to_json()))
    assert sm.Plan.from_json(data) == result.plan


def test_groups_of_layers_have_their_own_budgets() -> None:
    result = compressed(budget={"0": sm.Parameters(0.3), "[24]": (sm.Parameters(0.6), sm.Flops(0.55))})
    spent = {n: count_stored(s, result.plan.shapes[n]) for n, s in result.plan.layers.items()}
    assert spent["0"] <= 0.3 * 48 * 32
    assert spent["2"] + spent["4"] <= 0.6 * (40 * 48 + 10 * 40)
    free = compressed(budget={"2": sm.Parameters(0.3)})
    assert [n for n, s in free.plan.layers.items() if isinstance(s, sm.Dense)] == ["0", "4"]
    with pytest.raises(ModelError, match=r"'\*attn\*' of a budget matches none of the 3"):
        compressed(budget={"*attn*": sm.Parameters(0.3)})


@pytest.mark.parametrize(
    "goal",
    [
        0.4,
        (),
        {},
        "20MB",
        {"0": sm.Memory("1MB")},
        {"0": sm.Quality(loss=0.1)},
        {"": sm.Parameters(0.5)},
        (sm.Parameters(0.5), 3),
        (sm.Quality(loss=0.1), sm.Quality(at_least=1.0)),
    ],
)
def test_goals_that_make_no_sense_are_refused(goal: Any) -> None:
    with pytest.raises(BudgetError):
        read_goals(goal)


@pytest.mark.parametrize(
    "goal",
    [
        sm.Parameters(0.5),
        sm.Memory("20MB"),
        sm.Quality(loss=0.1, better="lower", of="bits", minimise=sm.Latency(0.5, batch=4)),
        (sm.Quality(at_least=0.9), sm.Flops(100)),
        {"a*": sm.Parameters(0.5), "b": (sm.Flops(0.5), sm.Latency(0.7, batch=2))},
    ],
)
def test_goals_travel_as_json(goal: Any) -> None:
    goals = read_goals(goal)
    data = json.loads(json.dumps(goals.to_json()))
    assert Goals.from_json(data).to_json() == data
    with pytest.raises(FormatError):
        Goals.from_json({**data, "budget": "Nothing"})


# ----------------------------------------------------------------------------------------------------- bytes


def test_sizes_are_parsed_strictly() -> None:
    assert parse_bytes("20MB") == 20_000_000
    assert parse_bytes("1.5 kB") == 1500
    assert parse_bytes("2MiB") == 2 * 2**20
    for text, meant in (("20mb", "20MB"), ("20KB", "20kB"), ("3gib", "3GiB")):
        with pytest.raises(BudgetError, match=f"Did you mean {meant}"):
            sm.Memory(text)
    for text in ("", "MB", "20", "-1MB", "20  MB", "1e6B", "20MBs", "0MB"):
        with pytest.raises(BudgetError):
            sm.Memory(text)
    assert sm.Memory("20MB") == sm.Memory(20_000_000)


class Tied(nn.Module):
    """An embedding that is not compressed, a layer under two names, half precision."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.again = self.up
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.again(self.embedding(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structures", [CLOSED, ("Sparse", "Sum")])
def test_the_saved_model_has_at_most_the_bytes_of_the_budget(
    dtype: torch.dtype, structures: tuple[str, ...], tmp_path: Path
) -> None:
    model = Tied(dtype)
    before = size_on_disk(sm.save(model, tmp_path / "before"))
    for number, amount in enumerate((0.6, before // 2)):
        result = sm.compress(model, budget=sm.Memory(amount), structures=structures, include=("up", "down"))
        written = size_on_disk(sm.save(result.model, tmp_path / str(number)))
        limit = result.report.budget["limit"]
        assert limit == pytest.approx(amount if number else 0.6 * before, rel=0.02)
        # Headers are counted as long as they can be, and sizes lie on a grid.
        assert 0.85 * limit < written <= result.report.budget["spent"] <= limit
        assert result.report.budget["spent"] - written < 700


def test_bytes_that_the_rest_alone_exceeds() -> None:
    """The message names an amount that is enough, and the least that is."""
    with pytest.raises(BudgetError, match=r"of what is not compressed.*compress more layers") as caught:
        sm.compress(Tied(), budget=sm.Memory("2kB"), structures=CLOSED)
    found = re.search(r"Memory\((\d+)\) or more", str(caught.value))
    assert found is not None
    least = int(found[1])
    assert sm.compress(Tied(), budget=sm.Memory(least), structures=CLOSED).plan is not None
    with pytest.raises(BudgetError):
        sm.compress(Tied(), budget=sm.Memory(least - 1), structures=CLOSED)


# --------------------------------------------------------------------------------------------------- quality


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"loss": 0.1, "at_least": 0.5},
        {"loss": -0.1},
        {"loss": math.nan},
        {"loss": True},
        {"at_least": 0.5, "better": "higher"},
        {"at_most": 0.5, "relative": True},
        {"loss": 0.1, "better": "up"},
        {"loss": 0.1, "tries": 1},
        {"loss": 0.1, "precision": 0.0},
        {"loss": 0.1, "minimise": sm.Memory(0.5)},
    ],
)
def test_qualities_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        sm.Quality(**wrong)


def test_which_number_counts_and_the_original_is_good_enough() -> None:
    with pytest.raises(BudgetError, match=r"returns 2 numbers \(a, b\).*Quality\(of='a'"):
        judge_of(sm.Quality(loss=0.1), {"a": 1.0, "b": 2.0})
    with pytest.raises(BudgetError, match="evaluate returns a, b"):
        judge_of(sm.Quality(loss=0.1, of="c"), {"a": 1.0, "b": 2.0})
    with pytest.raises(BudgetError, match=r"original itself has q 0\.9"):
        judge_of(sm.Quality(at_least=0.95), {"q": 0.9})
    with pytest.raises(BudgetError, match="no share of it can be lost"):
        judge_of(sm.Quality(loss=0.1, relative=True), {"q": 0.0})
    assert judge_of(sm.Quality(loss=0.1, relative=True), {"q": -20.0}).allowed == pytest.approx(2.0)
    assert judge_of(sm.Quality(at_most=1.5), {"q": 1.2}).allowed == pytest.approx(0.3)


@dataclass
class World:
    """A search in numbers alone: the value at each size, on a grid; counts what is tried."""

    value: Callable[[float], float]
    grid: int = 400
    tried: int = 0

    def size(self, within: float) -> Size:
        step = math.floor(within * self.grid + 1e-9)
        cost = step / self.grid
        return Size(cost, self.loss(cost), str(step))

    def loss(self, cost: float) -> float:
        return (1.0 - cost) ** 3

    def search(self, quality: sm.Quality, before: float) -> tuple[Judge, float, list[Tried]]:
        def attempt(size: Size) -> Mapping[str, float]:
            self.tried += 1
            return {"q": self.value(size.cost)}

        points = [(s / self.grid, self.loss(s / self.grid)) for s in range(4, self.grid + 1)]
        tried: list[Tried] = []
        return *seek(judge_of(quality, {"q": before}), points, self.size, attempt, tried), tried


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 4.0), st.floats(1e-3, 0.5), st.booleans(), st.booleans())
def test_the_search_finds_the_smallest_size_in_few_tries(
    power: float, allowed: float, higher: bool, said: bool
) -> None:
    """Whatever power of the prediction the truth is, and whether or not the direction is said."""
    sign = -1.0 if higher else 1.0
    world = World(lambda cost: 3.0 + sign * 2.0 * (1.0 - cost) ** (3 * power))
    better = ("higher" if higher else "lower") if said else None
    judge, cost, tried = world.search(sm.Quality(loss=allowed, better=better, tries=14), 3.0)
    assert judge.better == ("higher" if higher else "lower")
    assert world.tried == len(tried) <= 14
    true = 1.0 - (allowed / 2.0) ** (1 / (3 * power))
    smallest = max(4 / 400, math.ceil(true * 400 - 1e-6) / 400)
    assert smallest - 1e-9 <= cost <= max(1.03 * smallest, smallest + 2.5 / 400)
    for one in tried:
        assert one.accepted == (abs(one.value - 3.0) <= allowed + 1e-12)


def test_the_search_ends_where_nothing_smaller_is_accepted() -> None:
    judge, cost, tried = World(lambda cost: 0.9 if cost == 1.0 else 0.1).search(sm.Quality(at_least=0.9), 0.9)
    assert cost == 1.0
    assert not any(one.accepted for one in tried)
    assert len(tried) <= judge.quality.tries
    _, cost, tried = World(lambda cost: 0.9).search(sm.Quality(loss=0.0), 0.9)
    assert (cost, len(tried)) == (4 / 400, 1)
    _, cost, tried = World(lambda cost: math.nan if cost < 0.5 else 0.9).search(sm.Quality(loss=0.01), 0.9)
    assert 0.5 <= cost <= 0.52


def test_a_direction_that_is_contradicted_is_an_error() -> None:
    with pytest.raises(DataError, match=r"better='higher' takes for a gain of 1\.98\. Say better='lower'"):
        World(lambda cost: 3.0 + 2.0 * (1.0 - cost)).search(sm.Quality(loss=0.1, better="higher"), 3.0)


def test_the_smallest_model_that_evaluate_accepts(tmp_path: Path) -> None:
    counted = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        counted.append(model)
        return error_of(model)

    options: dict[str, Any] = {"budget": sm.Quality(loss=0.02), "evaluate": evaluate, "folder": tmp_path}
    result = compressed(**options)
    report, first = result.report, len(counted)
    assert error_of(result.model)["error"] == report.quality["after"]["error"] <= 0.02
    assert first == 1 + len(report.tried) <= 9  # nothing is evaluated twice
    assert report.budget["better"] == "lower"
    refused = max(t["cost"] for t in report.tried if not t["accepted"])
    assert refused < report.budget["spent"] == min(t["cost"] for t in report.tried if t["accepted"])
    # Resumed from the folder: nothing is built or evaluated again, and the result is the same.
    again = compressed(**options)
    assert len(counted) == first
    assert again.plan == result.plan
    for one, other in zip(result.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.report.tried == report.tried


def test_quality_with_recovery_and_another_budget() -> None:
    result = compressed(
        budget=(sm.Quality(at_most=0.05, tries=5, precision=0.2), sm.Flops(0.7)),
        evaluate=error_of,
        recover=sm.Distill(steps=4),
    )
    report = result.report
    assert error_of(result.model)["error"] == pytest.approx(report.quality["recovered"]["error"])
    assert report.quality["recovered"]["error"] <= 0.05
    assert report.flops.after <= 0.7 * report.flops.before
    assert report.recovery is not None
    with pytest.raises(BudgetError, match="largest model within the other budgets"):
        compressed(budget=(sm.Quality(loss=1e-9), sm.Flops(0.3)), evaluate=error_of)
    with pytest.raises(BudgetError, match="which is missing"):
        compressed(budget=sm.Quality(loss=0.1))
    with pytest.raises(BudgetError, match="windows"):
        compressed(budget=sm.Quality(loss=0.1), evaluate=error_of, recover=sm.Distill(steps=3, windows=True))


# --------------------------------------------------------------------------------- the frontier and plans


def test_the_frontier_is_whole_and_any_point_can_be_built_without_fitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compressed(evaluate=error_of, folder=tmp_path, frontier=(0.2, 0.6))
    points = result.frontier
    assert [p.cost for p in points] == sorted(p.cost for p in points)
    assert len(points) > 10
    assert points[0].share < 0.1
    assert points[-1].share == 1.0
    measured = [p for p in points if p.quality is not None]
    assert len(measured) == 3
    assert sum(p.chosen for p in points) == 1
    assert [p.quality["error"] for p in measured if p.quality] == sorted(
        (p.quality["error"] for p in measured if p.quality), reverse=True
    )
    (own,) = (p for p in points if p.chosen)
    assert own.plan.layers == result.plan.layers
    assert own.quality == result.report.quality["after"]
    # A measured point is fitted already: its plan is followed with what the folder holds.
    from structmat.compression import replace, screen

    def no_fit(*_: Any, **__: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(replace, "project_target", no_fit)
    monkeypatch.setattr(screen, "fit", no_fit)
    built = compressed(plan=measured[0].plan, folder=tmp_path, evaluate=error_of)
    assert built.plan.layers == measured[0].plan.layers
    assert built.report.quality["after"] == measured[0].quality
    # So is the first result after all that.
    once_more = compressed(plan=result.plan, folder=tmp_path, evaluate=error_of)
    for one, other in zip(result.model.parameters(), once_more.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert once_more.frontier == ()
    plans = sorted((tmp_path / "frontier").glob("*.json"))
    assert len(plans) == len(points)
    assert sm.Plan.read(plans[0]).layers == points[0].plan.layers


def test_a_plan_is_followed_and_checked() -> None:
    plan = sm.Plan({"2": sm.LowRank(rank=5)}, {"2": (40, 48)})
    result = compressed(plan=plan)
    assert result.plan.layers == {"0": sm.Dense(), "2": sm.LowRank(rank=5), "4": sm.Dense()}
    with pytest.raises(ModelError, match="names the layer 7"):
        compressed(plan=sm.Plan({"7": sm.LowRank(rank=2)}, {"7": (40, 48)}))
    with pytest.raises(ModelError, match="has the shape"):
        compressed(plan=sm.Plan({"2": sm.LowRank(rank=2)}, {"2": (48, 48)}))
    with pytest.raises(BudgetError, match="not both"):
        sm.compress(mlp(), budget=sm.Parameters(0.5), plan=plan)
    with pytest.raises(BudgetError, match="budget= or plan="):
        sm.compress(mlp())
    with pytest.raises(BudgetError, match="evaluate=, which is missing"):
        compressed(frontier=(0.5,))


def test_fits_behind_other_prefixes_do_not_meet(tmp_path: Path) -> None:
    """A layer with one structure behind two different layers is two fits, whatever the folder has seen before."""
    shapes = {"0": (48, 32), "2": (40, 48)}
    plans = [sm.Plan({"0": sm.LowRank(rank=r), "2": sm.LowRank(rank=8)}, shapes) for r in (3, 12)]
    together = [compressed(plan=plan, folder=tmp_path) for plan in plans]
    apart = compressed(plan=plans[1])
    for one, other in zip(together[1].model.parameters(), apart.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(together[0].model[2].matrix.to_dense(), together[1].model[2].matrix.to_dense())


# ------------------------------------------------------------------------------------------------ again, families


def test_choosing_again_never_makes_it_worse_on_what_it_measures() -> None:
    once, more = compressed(), compressed(rounds=3)
    distances = [r["distance"] for r in more.report.again]
    assert 1 <= len(distances) <= 4
    kept = [r["distance"] for r in more.report.again if r["better"]]
    assert kept == sorted(kept, reverse=True)
    assert more.report.budget["spent"] <= more.report.budget["limit"]
    if len(kept) == 1:
        assert more.plan == once.plan
    assert compressed(rounds=3).plan == more.plan  # nothing of it is random
    with pytest.raises(DataError, match="on calibration data"):
        compressed(rounds=1, calibration=None)


def spread(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Every row of the matrix holds one number."""
    return x.sum(-1, keepdim=True) * level


@dataclass(frozen=True)
class EqualRows(sm.Structure):
    """A family that is defined here and installed nowhere: every row holds one number."""

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return {"level": ParameterSpec((shape[0],), Normal(0.1))}

    def program(self, shape: Shape) -> Call:
        rows, columns = shape
        return Call(spread, (("level", rows),), rows, columns, rows, columns - 1, 4)

    def project(self, target: Target) -> Fit:
        level = target.weight.mean(1)
        return Fit({"level": level}, Certificate.NONE, target.error(level[:, None].expand(target.native)), "means")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> list[EqualRows]:
        return [cls()] if shape[0] <= budget else []


def test_a_family_that_is_only_defined_here_can_be_chosen() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.copy_(torch.linspace(-1, 1, 40)[:, None].expand(40, 48))
    result = compressed(model=model, structures=(EqualRows, "LowRank"), budget=sm.Parameters(0.5))
    assert result.plan.layers["2"] == EqualRows()
    with pytest.raises(StructureError, match="Unknown family 'EqualRows'"):
        compressed(structures=("EqualRows",))


def test_difference_of_results_and_of_saved_models(tmp_path: Path) -> None:
    small, large = compressed(folder=tmp_path / "a"), compressed(budget=sm.Parameters(0.7), folder=tmp_path / "b")
    found = difference(read_side(tmp_path / "a"), read_side(tmp_path / "b"))
    totals = {name: (a, b) for name, a, b in found.totals}
    assert totals["parameters, compressible layers"] == (small.report.parameters.after, large.report.parameters.after)
    for name, a, b in found.layers:
        assert a is not None
        assert b is not None
        assert (a.structure, b.structure) == (str(small.plan.layers[name]), str(large.plan.layers[name]))
        assert a.parameters == count_stored(small.plan.layers[name], a.shape)
    assert found.changed == sum(small.plan.layers[n] != large.plan.layers[n] for n in small.plan.layers)
    json.dumps(found.to_json())
    sm.save(small.model, tmp_path / "small")
    sm.save(mlp(), tmp_path / "dense")
    saved = difference(read_side(tmp_path / "dense"), read_side(tmp_path / "small"))
    assert [name for name, _, _ in saved.layers] == [n for n, s in small.plan.changed.items()]
    for name, a, b in saved.layers:
        assert a is not None
        assert b is not None
        assert (a.structure, b.structure) == ("Dense()", str(small.plan.layers[name]))
    assert difference(read_side(tmp_path / "small"), read_side(tmp_path / "small")).changed == 0
    with pytest.raises(FormatError, match="holds neither"):
        read_side(tmp_path)
