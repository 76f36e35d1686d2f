"""Learning rates that follow the structure: multipliers, parameter groups, and what recovery makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recovery_models import Classifier, batches, classifier, state, student_of
from torch import nn

import structmat as sm
from structmat.compression.distill import Rates
from structmat.compression.recover import Distill, recover
from structmat.learn import learning_rate_multipliers, parameter_groups, recovery_groups


@pytest.fixture
def original() -> Classifier:
    return classifier()


@pytest.fixture
def student(original: Classifier) -> Classifier:
    return student_of(original)


@pytest.mark.parametrize(
    ("structure", "shape", "expected"),
    [
        (sm.Dense(), (24, 16), {"weight": 1.0}),
        (sm.LowRank(rank=4), (24, 16), {"right": 0.5, "left": 16 / 8}),
        (sm.BlockDiagonal(blocks=4), (24, 16), {"weight": 4.0}),
    ],
)
def test_multipliers_are_those_of_the_paper(structure: Any, shape: tuple[int, int], expected: dict[str, float]) -> None:
    assert learning_rate_multipliers(structure, shape) == expected


def test_every_learned_tensor_of_every_family_has_a_multiplier() -> None:
    for family in sm.families().values():
        for structure in family.configurations((48, 64), 48 * 64):
            layer = sm.nn.StructuredLinear(64, 48, False, structure=structure)
            factors = learning_rate_multipliers(layer.structure, (48, 64))
            assert set(factors) == {name for name, _ in layer.named_parameters()}, structure
            assert all(0 < factor <= 64 for factor in factors.values()), structure


@pytest.mark.parametrize("width", [64, 256, 1024])
@pytest.mark.parametrize("structure", [sm.LowRank(rank=8), sm.LowRank(rank=0.5), sm.BlockDiagonal(blocks=4)], ids=str)
def test_one_step_changes_the_output_as_much_as_in_a_dense_layer(structure: Any, width: int) -> None:
    changes = []
    for kind in (sm.Dense(), structure):
        generator = torch.Generator().manual_seed(0)
        layer = sm.nn.StructuredLinear(width, width, False, structure=kind, generator=generator)
        x = torch.randn(64, width, generator=generator)
        goal = torch.randn(64, width, generator=generator)
        optimizer = torch.optim.Adam(parameter_groups(layer, lr=1e-3 / width))
        before = layer(x)
        ((before - goal) ** 2).sum().backward()
        optimizer.step()
        changes.append(float((layer(x) - before).detach().square().mean().sqrt()))
    assert 0.4 < changes[1] / changes[0] < 2.5


def test_groups_cover_each_parameter_once(student: Classifier) -> None:
    student.head.bias.requires_grad_(False)
    groups = parameter_groups(student, lr=0.1, weight_decay=0.01)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert [id(p) for p in decayed] == [id(student.head.weight)]
    torch.optim.AdamW(groups, lr=0.1)


def test_fitted_factors_of_a_layer_learn_at_one_rate(student: Classifier) -> None:
    rates = {id(p): group["lr"] for group in recovery_groups(student, lr=0.1) for p in group["params"]}
    factors = learning_rate_multipliers(student.first.structure, (32, 10))
    expected = 0.1 * (factors["left"] * factors["right"]) ** 0.5
    assert rates[id(student.first.left)] == rates[id(student.first.right)] == pytest.approx(expected)
    assert rates[id(student.second.weight)] == rates[id(student.head.weight)] == 0.1


def test_rates_follow_the_structure(original: Classifier) -> None:
    """Adam's first step moves the entries of a tensor by its rate, whatever the gradient."""
    wanted: dict[Rates, Callable[[nn.Module], list[dict[str, Any]]]] = {
        Rates.LAYER: lambda model: recovery_groups(model, lr=1.0),
        Rates.STAGE: lambda model: parameter_groups(model, lr=1.0),
        Rates.EQUAL: lambda model: [{"params": list(model.parameters()), "lr": 1.0}],
    }
    assert set(wanted) == set(Rates)
    for rates, groups in wanted.items():
        student = student_of(original)
        expected = {id(p): group["lr"] for group in groups(student) for p in group["params"]}
        before = state(student)
        recover(student, original, batches(1), Distill(rates=rates, learning_rate=1e-4, steps=1), show=False)
        moves = {name: float((p.detach() - before[name]).abs().max()) for name, p in student.named_parameters()}
        of_one = {name: moves[name] / expected[id(p)] for name, p in student.named_parameters()}
        assert min(of_one.values()) > 0
        assert max(of_one.values()) / min(of_one.values()) < 1.05, (rates, of_one)
    assert len({tuple(g["lr"] for g in groups(student)) for groups in wanted.values()}) == 3
