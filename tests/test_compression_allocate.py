"""The solver is exact; budgets are kept."""

from __future__ import annotations

import itertools
import os
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structmat as sm
from structmat.compression.allocate import allocate, water_filling
from structmat.compression.candidates import Candidate, LayerScreen
from structmat.compression.quiet import without_lines
from structmat.errors import BudgetError


def layer(name: str, options: list[tuple[int, float]], dense: int) -> LayerScreen:
    """Candidates of given cost and loss; structures only tell them apart."""
    found = [
        Candidate(sm.LowRank(i + 1), cost, cost, 0.0, 0.0, "none", "", loss, float(cost))
        for i, (cost, loss) in enumerate(options)
    ]
    found.append(Candidate(sm.Dense(), dense, dense, 0.0, 0.0, "optimal", "kept", 0.0, float(dense)))
    return LayerScreen(name, (64, 64), "weights", tuple(sorted(found, key=lambda c: (c.cost, c.loss))), {})


def random_screening(seed: int, layers: int, options: int) -> dict[str, LayerScreen]:
    draw = random.Random(seed)
    return {
        f"l{i}": layer(
            f"l{i}",
            [(draw.randint(1, 99), draw.choice([draw.random(), 10.0 ** draw.uniform(-9, 2)])) for _ in range(options)],
            100,
        )
        for i in range(layers)
    }


def brute_force(screening: dict[str, LayerScreen], most: float) -> float:
    choices = itertools.product(*(s.candidates for s in screening.values()))
    return min(sum(c.loss for c in choice) for choice in choices if sum(c.cost for c in choice) <= most)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.floats(0.05, 0.95))
def test_learned_C19_solver_agrees_with_brute_force(seed: int, layers: int, options: int, share: float) -> None:
    screening = random_screening(seed, layers, options)
    most = share * (100 * layers)
    if sum(s.candidates[0].cost for s in screening.values()) > most:
        with pytest.raises(BudgetError):
            allocate(screening, sm.Parameters(share))
        return
    found = allocate(screening, sm.Parameters(share))
    assert found.cost <= most
    assert found.loss == pytest.approx(brute_force(screening, most), rel=1e-6, abs=1e-15)


def test_learned_C19_loss_never_rises_with_the_budget() -> None:
    screening = random_screening(5, 12, 8)
    losses = [allocate(screening, sm.Parameters(share / 20)).loss for share in range(9, 20)]
    assert losses == sorted(losses, reverse=True)
    assert allocate(screening, sm.Parameters(1200)).loss == 0.0


def test_learned_C19_budget_is_used_where_candidates_allow() -> None:
    screening = {f"l{i}": layer(f"l{i}", [(c, 1.0 / c) for c in range(1, 100)], 100) for i in range(6)}
    for share in (0.25, 0.5, 0.75):
        found = allocate(screening, sm.Parameters(share))
        assert 0.98 * found.limit <= found.cost <= found.limit


def test_the_smallest_feasible_budget_is_named_and_feasible() -> None:
    screening = random_screening(1, 3, 3)
    with pytest.raises(BudgetError, match=r"can't be met.*Use Parameters\(0\.\d+\) or more") as failure:
        allocate(screening, sm.Parameters(0.001))
    share = float(str(failure.value).split("Use Parameters(")[1].split(")")[0])
    assert allocate(screening, sm.Parameters(share)).cost <= share * 300
    with pytest.raises(BudgetError, match=r"Use Parameters\(\d+\) or more") as failure:
        allocate(screening, sm.Parameters(1))
    amount = int(str(failure.value).split("Use Parameters(")[1].split(")")[0])
    assert allocate(screening, sm.Parameters(amount)).cost <= amount
    with pytest.raises(BudgetError):
        allocate(screening, sm.Parameters(amount - 1))


def test_fixed_layers_and_floors() -> None:
    screening = {f"l{i}": layer(f"l{i}", [(10, 1e-3), (40, 5e-4), (70, 1e-4)], 100) for i in range(3)}
    found = allocate(screening, sm.Parameters(0.5), fixed={"l0": sm.Dense(), "l1": sm.LowRank(1)})
    assert found.chosen["l0"].cost == 100
    assert found.chosen["l1"].cost == 10
    assert min(c.cost for c in allocate(screening, sm.Parameters(0.5), floor=0.4).chosen.values()) == 40
    with pytest.raises(BudgetError, match="can't be met"):
        allocate(screening, sm.Parameters(0.3), floor=0.4)
    with pytest.raises(BudgetError, match="not among its"):
        allocate(screening, sm.Parameters(0.5), fixed={"l0": sm.LowRank(9)})


def test_forty_two_layers_are_solved_exactly_in_seconds() -> None:
    screening = random_screening(9, 42, 60)
    found = allocate(screening, sm.Parameters(0.4))
    assert found.exact
    assert found.loss == pytest.approx(found.bound, rel=1e-6)


@pytest.mark.parametrize("kind", [sm.Parameters, sm.Flops, sm.Latency])
@pytest.mark.parametrize("amount", [0.0, 1.0, 1.5, -0.1, 0, -3, True, "half"])
def test_budgets_that_make_no_sense_are_refused(kind: type, amount: object) -> None:
    with pytest.raises(BudgetError):
        kind(amount)


# ------------------------------------------------------------------------------------------------- closed form A1


def spectra(count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, int]]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"l{i}": (8 + 4 * (i % 3), 16) for i in range(count)}
    return {n: torch.rand(min(s), generator=generator).sort(descending=True).values for n, s in shapes.items()}, shapes


def spent(ranks: dict[str, int], shapes: dict[str, tuple[int, int]]) -> int:
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def tail(ranks: dict[str, int], values: dict[str, torch.Tensor], weights: dict[str, float] | None = None) -> float:
    return sum((weights or {}).get(n, 1.0) * float(values[n][r:].square().sum()) for n, r in ranks.items())


def test_learned_C19_A1_budget_is_respected_within_one_step() -> None:
    values, shapes = spectra(5)
    for most in range(0, 700, 50):
        used = spent(water_filling(values, shapes, most), shapes)
        assert used <= most
        assert used > most - 3 * max(map(sum, shapes.values())) or used == spent(
            {n: len(v) for n, v in values.items()}, shapes
        )


def test_learned_C19_A1_monotone_in_the_budget() -> None:
    values, shapes = spectra(5)
    losses = [tail(water_filling(values, shapes, most), values) for most in range(0, 1200, 40)]
    assert losses == sorted(losses, reverse=True)


def test_learned_C19_A1_equal_layers_get_equal_ranks() -> None:
    one, _ = spectra(1)
    values = dict.fromkeys("abc", one["l0"])
    shapes = dict.fromkeys("abc", (8, 16))
    for most in range(0, 600, 7):
        assert len(set(water_filling(values, shapes, most).values())) == 1


def test_learned_C19_A1_a_larger_weight_never_lowers_a_rank() -> None:
    values, shapes = spectra(4)
    ranks = [water_filling(values, shapes, 300, {"l2": 1.3**i})["l2"] for i in range(-8, 9)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


def test_learned_C19_A1_is_optimal_by_brute_force_when_the_budget_is_spent() -> None:
    values, shapes = spectra(3, seed=3)
    values = {n: v[:5] for n, v in values.items()}
    shapes = dict.fromkeys(shapes, (8, 16))  # equal steps: the greedy rule spends the budget exactly
    for most in range(0, 24 * 15, 24):
        ranks = water_filling(values, shapes, most)
        best = min(
            tail(dict(zip(values, choice, strict=True)), values)
            for choice in itertools.product(range(6), repeat=3)
            if 24 * sum(choice) <= most
        )
        assert tail(ranks, values) == pytest.approx(best)


def test_the_solver_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(20):
        allocate(random_screening(seed, 20, 15), sm.Parameters(0.31))
    assert capfd.readouterr() == ("", "")


def test_lines_of_compiled_code_are_left_out_and_others_come(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        os.write(1, b"Solver::step run();\nanother\n")
        sys.__stdout__.write("mine\n")  # type: ignore[union-attr]
        raise ValueError("inside")

    os.write(1, b"before\n")
    with pytest.raises(ValueError, match="inside"), without_lines(b"Solver::"):
        work()
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "before\nanother\nmine\nafter\n"
