"""Recovery by distillation: it helps, it is deterministic, it resumes exactly, it leaves the rest alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_models import Classifier, KilledError, batches, classifier, far, same, shuffled, state, student_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from structmat.compression.checkpoint import NAME
from structmat.compression.recover import DIVERGENCE, SQUARES, Distill, Optimizer, distance, recover
from structmat.compression.running import Outcome
from structmat.compression.teaching import Teaching
from structmat.errors import DataError, FormatError, StructureError


@pytest.fixture
def original() -> Classifier:
    return classifier()


@pytest.fixture
def student(original: Classifier) -> Classifier:
    return student_of(original)


def test_recovery_brings_the_model_nearer(original: Classifier, student: Classifier) -> None:
    before, untouched = far(student, original), state(original)
    result = recover(student, original, batches(20), Distill(steps=150, learning_rate=3e-3), show=False)
    assert far(student, original) < 0.5 * before
    assert same(untouched, original.state_dict())
    assert (result.objective, result.steps, result.kept_step) == (DIVERGENCE, 150, 150)
    assert result.losses[-1][1] < result.losses[0][1]
    assert all(parameter.grad is None for parameter in (*student.parameters(), *original.parameters()))


def test_layerwise_reconstruction_alone_helps(original: Classifier, student: Classifier) -> None:
    # Random perturbation, so that the reconstruction has something to repair.
    with torch.no_grad():
        student.second.weight.add_(0.1 * torch.randn(student.second.weight.shape))
    before = far(student, original)
    result = recover(student, original, batches(20), Distill(steps=1, layerwise=150, learning_rate=3e-3), show=False)
    assert (result.layerwise_steps, result.steps) == (150, 1)
    assert far(student, original) < 0.8 * before


def test_squared_error_for_outputs_without_labels(original: Classifier, student: Classifier) -> None:
    data = [x for x, _ in batches()]
    assert recover(student, original, data, Distill(steps=2), show=False).objective == SQUARES


def test_modes_and_the_callers_random_state_are_restored(original: Classifier, student: Classifier) -> None:
    student.train()
    student.drop.eval()
    original.eval()
    torch.manual_seed(5)
    random = torch.random.get_rng_state()
    data = DataLoader(TensorDataset(*(torch.cat(column) for column in zip(*batches(), strict=True))), 8, shuffle=True)
    recover(student, original, data, Distill(steps=5), show=False)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert student.training
    assert not student.drop.training
    assert not original.training


def test_equal_seeds_give_equal_weights(original: Classifier, student: Classifier) -> None:
    results = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(student)
        recover(model, original, shuffled(), Distill(steps=20), seed=seed, show=False)
        results.append(state(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("optimizer", Optimizer)
@pytest.mark.parametrize("at", [3, 9, 32])
def test_a_killed_run_goes_on_exactly(
    original: Classifier, student: Classifier, tmp_path: Path, at: int, optimizer: Optimizer
) -> None:
    settings = Distill(
        steps=30,
        layerwise=5,
        held_out=batches(2, seed=1),
        check_every=4,
        save_every=0,
        learning_rate=1e-2,
        optimizer=optimizer,
    )
    whole = copy.deepcopy(student)
    expected = recover(whole, original, shuffled(), settings, show=False)
    calls = 0

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        if model is not original and model.training is False and len(batch[0]) == 8:
            calls += 1
            if calls == at:
                raise KilledError
        return model(batch[0])

    model = copy.deepcopy(student)
    with pytest.raises(KilledError):
        recover(model, original, shuffled(), settings, forward=forward, folder=tmp_path, show=False)
    model = copy.deepcopy(student)  # a new process starts from the projected weights
    result = recover(model, original, shuffled(), settings, folder=tmp_path, show=False)
    assert same(state(whole), state(model))
    assert (result.losses, result.held_out, result.kept_step) == (
        expected.losses,
        expected.held_out,
        expected.kept_step,
    )
    again = copy.deepcopy(student)  # a finished run is only read
    assert recover(again, original, shuffled(), settings, folder=tmp_path, show=False) == result
    assert same(state(whole), state(again))


def test_a_checkpoint_of_another_run_is_refused(original: Classifier, student: Classifier, tmp_path: Path) -> None:
    recover(student, original, batches(), Distill(steps=2), folder=tmp_path, show=False)
    with pytest.raises(FormatError, match="another run: settings, start differ"):
        recover(student, original, batches(), Distill(steps=3), folder=tmp_path, show=False)
    with pytest.raises(FormatError, match="another run: seed, start differ"):
        recover(student, original, batches(), Distill(steps=2), seed=1, folder=tmp_path, show=False)
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError, match="Delete it to start anew"):
        recover(student, original, batches(), Distill(steps=2), folder=tmp_path, show=False)


def test_the_best_on_held_out_batches_is_kept(original: Classifier, student: Classifier) -> None:
    before = state(student)
    wild = Distill(steps=6, learning_rate=5.0, clip=1e9, held_out=batches(2, seed=1), check_every=2)
    result = recover(student, original, batches(), wild, show=False)
    assert result.kept_step == 0  # such steps only do harm
    assert same(before, state(student))
    assert [step for step, _ in result.held_out] == [0, 2, 4, 6]


def test_too_high_a_rate_is_lowered_where_it_leads_away(original: Classifier, student: Classifier) -> None:
    near = Distill(steps=300, learning_rate=3e-3)
    recover(student, original, batches(), near, show=False)
    settings = Distill(steps=120, learning_rate=1.0, warmup=0.0, held_out=batches(seed=5), check_every=10)
    found = recover(student, original, batches(), settings, show=False)
    distances = [value for _, value in found.held_out]
    assert max(distances) > distances[0]  # it was too high
    assert min(distances[1:]) < distances[0]  # and still helped in the end
    assert found.kept_step > 0


def test_users_forward_and_loss_are_honoured(original: Classifier, student: Classifier) -> None:
    seen = []

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["pixels"])

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        seen.append(len(batch["pixels"]))
        return nn.functional.cross_entropy(output, batch["digit"])

    data = [{"pixels": x, "digit": y} for x, y in batches()]
    recover(student, original, data, Distill(steps=3, own_loss=0.5), forward=forward, loss=loss, show=False)
    assert seen == [16, 16, 16]
    with pytest.raises(DataError, match="needs a loss"):
        recover(student, original, [{"x": x} for x, _ in batches()], Distill(steps=3, own_loss=0.5), show=False)


def test_what_is_held_out_judges_by_the_tasks_loss_too(original: Classifier, student: Classifier) -> None:
    (x, y), apart = batches(1, seed=3)[0], copy.deepcopy(student)
    settings = Distill(steps=1, own_loss=2.0, held_out=[(x, y)])
    result = recover(student, original, batches(), settings, show=False)
    alone = recover(apart, original, batches(), replace(settings, own_loss=0.0), show=False)
    task = float(functional.cross_entropy(student_of(original).eval()(x), y).detach())
    assert result.held_out[0][1] == pytest.approx(alone.held_out[0][1] + 2 * task, rel=1e-4)


def test_time_limit(original: Classifier, student: Classifier) -> None:
    result = recover(student, original, batches(), Distill(steps=None, minutes=0.3 / 60), show=False)
    assert result.steps >= 1
    assert 0.25 < result.seconds < 5


def test_half_precision_learns_in_float32(original: Classifier, student: Classifier) -> None:
    original, student = original.to(torch.bfloat16), student.to(torch.bfloat16)
    data = [(x.bfloat16(), y) for x, y in batches()]
    before = far(student.float(), original.float())
    original.bfloat16(), student.bfloat16()
    recover(student, original, data, Distill(steps=150, learning_rate=1e-3), show=False)
    assert student.first.left.dtype == torch.bfloat16
    assert far(student.float(), original.float()) < 0.7 * before


def test_frozen_parameters_stay(original: Classifier, student: Classifier) -> None:
    student.head.requires_grad_(False)
    before = state(student)
    recover(student, original, batches(), Distill(steps=3), show=False)
    assert torch.equal(student.head.weight, before["head.weight"])
    assert not torch.equal(student.first.left, before["first.left"])
    assert not student.head.weight.requires_grad
    student.requires_grad_(False)
    with pytest.raises(DataError, match="nothing to recover with"):
        recover(student, original, batches(), show=False)


def test_padding_does_not_count() -> None:
    teacher, student = torch.randn(4, 5), torch.randn(4, 5)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    value = distance(Outcome(student, True), Outcome(teacher, True), 1.0, mask)
    assert torch.isclose(value, distance(Outcome(student[:2], True), Outcome(teacher[:2], True), 1.0, None))


def test_distance_is_the_divergence() -> None:
    teacher, student = torch.randn(3, 5), torch.randn(3, 5)
    p, q = torch.softmax(teacher / 2, -1), torch.softmax(student / 2, -1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert torch.isclose(distance(Outcome(student, True), Outcome(teacher, True), 2.0, None), expected)
    teacher[:, 0] = -torch.inf  # a forbidden class
    assert math.isfinite(float(distance(Outcome(student, True), Outcome(teacher, True), 1.0, None)))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"minutes": 0},
        {"learning_rate": 0},
        {"learning_rate": math.nan},
        {"temperature": -1},
        {"own_loss": -1},
        {"layerwise": -1},
        {"warmup": 1},
        {"clip": 0},
        {"check_every": 0},
        {"steps": None},
    ],
)
def test_settings_are_validated(options: dict[str, Any]) -> None:
    with pytest.raises(StructureError, match=next(iter(options))):
        Distill(**options)


def test_bad_data(original: Classifier, student: Classifier) -> None:
    with pytest.raises(DataError, match="no batches"):
        recover(student, original, [], show=False)
    with pytest.raises(DataError, match="only once"):
        recover(student, original, iter(batches()), show=False)
    with pytest.raises(DataError, match="held_out has no batches"):
        recover(student, original, batches(), Distill(held_out=[]), show=False)
    bad = [(torch.full((16, 10), float("nan")), torch.arange(16) % 4)]
    with pytest.raises(DataError, match="nan at step 0"):
        recover(student, original, bad, show=False)
    with pytest.raises(DataError, match="held-out batches is NaN"):
        recover(student, original, batches(), Distill(held_out=bad), show=False)


def test_an_end_that_is_worse_than_the_start_is_said(
    original: Classifier, student: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    recover(copy.deepcopy(student), original, batches(), Distill(steps=3), show=False)
    assert not caplog.records
    recover(copy.deepcopy(student), original, batches(), Distill(steps=4, learning_rate=1e2), show=False)
    assert "ends farther from the original than it began" in caplog.text
    assert "Lower learning_rate=100" in caplog.text
    data = [(x.half(), labels) for x, labels in batches()]
    with pytest.raises(DataError, match=r"Recovery made .* NaN or infinite: lower learning_rate=1000000\.0"):
        recover(student.half(), original.half(), data, Distill(steps=1, learning_rate=1e6, warmup=0), show=False)


@pytest.mark.parametrize(
    ("distances", "lowered_at"),
    [
        ([1, 9, 9, 2, 1.2, 1.1, 1, 0.9, 0.8], []),  # shaken while the rate is high, and near in the end
        ([1, 9, 9, 9, 1.6, 1.1, 1, 0.9, 0.8], [40]),
        ([1, 9, 9, 9, 2.0, 9, 1.7, 9, 9], [40, 60]),
        ([1, 31, 9, 9, 1.0, 9, 1.0, 9, 9], [10]),
        ([1, 31, 31, 9, 1.6, 9, 1.0, 9, 9], [10, 20, 40]),
    ],
)
def test_the_rate_is_lowered_where_it_leads_away_for_good(
    original: Classifier,
    student: Classifier,
    distances: list[float],
    lowered_at: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By scripted looks: beyond 30 times the start at once, beyond 1.5 times after half and three quarters."""
    script = iter(distances)
    monkeypatch.setattr(Teaching, "held_out", lambda _: float(next(script)))
    settings = Distill(steps=80, held_out=batches(1), check_every=10)
    with caplog.at_level("INFO", logger="structmat.compression.recover"):
        found = recover(student, original, batches(), settings, show=False)
    lowered = [int(r.getMessage().split()[2]) for r in caplog.records if "farther from the original" in r.getMessage()]
    assert lowered == lowered_at
    assert found.kept_step == 10 * distances.index(min(distances))
