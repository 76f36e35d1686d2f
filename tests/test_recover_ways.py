"""Further ways to recover: block by block, hidden states, annealing, closed forms, batch statistics."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_models import Classifier, KilledError, batches, classifier, far, same, shuffled, state, student_of
from torch import nn

import structmat as sm
from structmat.compression.fading import Fading
from structmat.compression.objectives import Parts, block_names
from structmat.compression.recover import Distill, recover
from structmat.compression.running import outputs_at
from structmat.compression.statistics import reestimate
from structmat.errors import ModelError, StructureError


@pytest.fixture
def original() -> Classifier:
    return classifier()


@pytest.fixture
def student(original: Classifier) -> Classifier:
    return student_of(original)


class Stack(nn.Module):
    """Blocks of two layers in a list, as transformers have them."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x + self.down(torch.tanh(self.up(x))), None

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


def stacks(rank: int = 2) -> tuple[Stack, Stack]:
    """A network, and the same with every layer in blocks of low rank."""
    torch.manual_seed(3)
    original = Stack()
    student = copy.deepcopy(original)
    for block in student.blocks:
        for name in ("up", "down"):
            setattr(block, name, sm.nn.StructuredLinear.from_linear(getattr(block, name), sm.LowRank(rank=rank)))
    return original, student


def hidden_error(model: Stack, original: Stack) -> float:
    """Of the last block's outputs, as a share of the original's."""
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(9))
    outputs = []
    for net in (model, original):
        y = x
        with torch.no_grad():
            for block in net.blocks:
                y, _ = block(y)
        outputs.append(y)
    return float((outputs[0] - outputs[1]).square().sum() / outputs[1].square().sum())


def test_blocks_are_found() -> None:
    _, student = stacks()
    assert block_names(student) == ["blocks.0", "blocks.1", "blocks.2"]
    assert block_names(student, ["blocks.[02]"]) == ["blocks.0", "blocks.2"]
    assert block_names(nn.Sequential(sm.nn.StructuredLinear(4, 4, structure=sm.LowRank(1)), nn.ReLU())) == ["0"]
    with pytest.raises(ModelError, match="matches no module"):
        block_names(student, ["layers.*"])


def test_blockwise_reconstruction_brings_the_blocks_nearer() -> None:
    original, student = stacks()
    before = hidden_error(student, original)
    head = student.head.weight.clone()
    settings = Distill(steps=1, blockwise=120, learning_rate=1e-2)
    done = recover(student, original, batches(20), settings, show=False)
    assert (done.blockwise_steps, done.layerwise_steps, done.steps) == (120, 0, 1)
    assert hidden_error(student, original) < 0.6 * before
    # No gradient passes from block to block, nor into what is in none.
    torch.testing.assert_close(student.head.weight, head, rtol=0.02, atol=0.02)


def test_no_gradient_passes_from_block_to_block() -> None:
    original, student = stacks()
    parts = Parts(student, original, block_names(student, ["blocks.2"]), apart=True)
    parts.error(batches(1)[0], None).backward()
    assert student.blocks[2].up.left.grad is not None
    assert all(p.grad is None for block in student.blocks[:2] for p in block.parameters())
    whole = Parts(student, original, block_names(student, ["blocks.2"]), apart=False)
    whole.error(batches(1)[0], None).backward()
    assert student.blocks[0].up.left.grad is not None


def test_activations_in_place_leave_the_outputs_to_imitate_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    x = torch.randn(16, 8)
    assert Parts(model, copy.deepcopy(model), ["0", "2"], apart=True).error(x, None).detach() == 0

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).relu_()).relu_()

    twice = Twice()
    with torch.no_grad():
        first, _ = outputs_at(twice, "layer", 2, x, None)
        assert torch.equal(first, twice.layer(x))


def test_hidden_states_are_distilled_too() -> None:
    errors = []
    for weight in (0.0, 3.0):
        original, student = stacks()
        recover(student, original, batches(20), Distill(steps=80, hidden=weight, learning_rate=1e-2), show=False)
        errors.append(hidden_error(student, original))
    assert errors[1] < 0.8 * errors[0]


def test_annealing_begins_as_the_original_and_ends_as_the_compressed_model() -> None:
    original, student = stacks()
    x = batches(1)[0][0]
    fading = Fading(student, original)
    with torch.no_grad():
        own, wanted = student(x), original(x)
        with fading.added(1.0):
            torch.testing.assert_close(student(x), wanted, rtol=1e-4, atol=1e-5)
        with fading.added(0.0):
            assert torch.equal(student(x), own)
        with fading.added(0.5):
            assert 0 < float((student(x) - wanted).norm()) < float((own - wanted).norm())
        assert torch.equal(student(x), own)
    names = [name for name, _ in student.named_modules()]
    before = far(student, original)
    settings = Distill(steps=150, anneal=0.5, learning_rate=1e-2, held_out=batches(2, seed=1), check_every=10)
    done = recover(student, original, batches(20), settings, show=False)
    assert far(student, original) < 0.5 * before
    assert [name for name, _ in student.named_modules()] == names
    # What still fades is not judged.
    assert all(step == 0 or step >= 80 for step, _ in done.held_out)
    assert abs(done.losses[0][1]) < done.held_out[0][1]  # the losses begin near zero, as the original


def test_recovery_ends_when_nothing_is_nearer(original: Classifier, student: Classifier) -> None:
    held = batches(2, seed=1)
    wild = Distill(steps=400, learning_rate=5.0, clip=1e9, held_out=held, check_every=2, patience=3)
    done = recover(student, original, batches(), wild, show=False)
    assert done.steps < 400
    values = [value for _, value in done.held_out]
    assert len(values) - 1 - values.index(min(values)) == 3
    assert done.kept_step == done.held_out[values.index(min(values))][0]


def test_closed_form_is_kept_only_where_it_helps(original: Classifier, student: Classifier) -> None:
    with torch.no_grad():
        student.second.weight.mul_(0.5)  # which the last factor of it can undo
    before = far(student, original)
    settings = Distill(steps=1, closed_form=True, learning_rate=1e-9, held_out=batches(6, seed=1))
    done = recover(student, original, batches(30), settings, show=False)
    assert done.closed_form is not None
    assert done.closed_form["kept"]
    assert done.closed_form["after"] == done.held_out[0][1] < 0.7 * done.closed_form["before"]
    assert far(student, original) < 0.7 * before
    exact = copy.deepcopy(original)
    held = state(exact)
    done = recover(exact, original, batches(30), settings, show=False)
    assert done.closed_form is not None
    assert not done.closed_form["kept"]  # nothing can be nearer
    assert done.kept_step == 0
    assert same(held, state(exact))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(10, 24, False), nn.BatchNorm1d(24), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.first(x))))


def normalised() -> tuple[Normalised, Normalised]:
    original = Normalised().train()
    for x, _ in batches(40):
        original(x)
    student = copy.deepcopy(original)
    student.first = sm.nn.StructuredLinear.from_linear(student.first, sm.LowRank(rank=2))
    return original.eval(), student.eval()


def test_statistics_are_estimated_again_where_that_is_nearer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    data = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    model.train()
    for _ in range(30):
        for x in data:
            model(x)
    model.eval()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.mul_(0.5)  # which normalisation undoes, if it knows
        changed[0].bias.add_(1.0)
    found = reestimate(changed, model, data)
    assert found is not None
    assert found.kept
    assert found.after < 0.05 * found.before
    assert changed[1].momentum == model[1].momentum
    assert not changed[1].training
    same = copy.deepcopy(model)
    held = {n: b.clone() for n, b in same.named_buffers()}
    found = reestimate(same, model, data)
    assert found is not None
    assert not found.kept  # nothing can be nearer
    assert all(torch.equal(b, held[n]) for n, b in same.named_buffers())
    assert reestimate(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)), [torch.zeros(1, 2)]) is None


class TwoHeads(nn.Module):
    """One of whose heads runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.other = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.first(x))
        return self.head(y) + self.other(y) if self.training else self.head(y)


@pytest.mark.parametrize("last", [64, 1])
def test_statistics_that_no_batch_shows_stay(last: int) -> None:
    torch.manual_seed(0)
    model = TwoHeads().train()
    data = [torch.randn(size, 8) for size in (64, 64, 64, 64, last)]
    for x in data[:4]:
        model(x)
    changed = copy.deepcopy(model.eval())
    with torch.no_grad():
        changed.first.weight.mul_(0.5)
        changed.first.bias.add_(1.0)
    found = reestimate(changed, model, data)
    assert found is not None
    assert found.kept
    assert changed.norm.num_batches_tracked == 4 + (last > 1)
    for key, buffer in changed.other[0].named_buffers():
        assert torch.equal(buffer, model.other[0].get_buffer(key)), key


def test_batches_of_one_sample_are_normalised_by_the_running_statistics() -> None:
    original, student = normalised()
    before = {n: b.clone() for n, b in student.named_buffers()}
    one = [(x[:1], y[:1]) for x, y in batches(4)]
    found = reestimate(student, original, one)
    assert found is not None
    assert not found.kept
    recover(student, original, one, Distill(steps=2, normalise=True, statistics=False), show=False)
    assert all(torch.equal(buffer, before[name]) for name, buffer in student.named_buffers())
    recover(student, original, [batches(1)[0], *one], Distill(steps=2, normalise=True), show=False)
    assert not torch.equal(student.norm.running_mean, before["norm.running_mean"])
    assert not student.norm.training


def test_batch_statistics_are_estimated_again_at_the_end() -> None:
    results = {}
    for statistics in (False, True):
        torch.manual_seed(0)
        original, student = normalised()
        with torch.no_grad():
            student.norm.running_var.mul_(9.0)  # statistics of other activations
        settings = Distill(steps=3, statistics=statistics, learning_rate=1e-6)
        done = recover(student, original, batches(20), settings, show=False)
        results[statistics] = far(student, original)
        assert (done.statistics is not None) == statistics
        if done.statistics is not None:
            assert done.statistics["kept"]
    assert results[True] < 0.9 * results[False]


def test_batch_statistics_are_learned_and_kept_with_the_best_state(tmp_path: Path) -> None:
    original, student = normalised()
    again = copy.deepcopy(student)
    before = student.norm.running_mean.clone()
    settings = Distill(steps=20, normalise=True, save_every=0)
    recover(student, original, batches(20), settings, folder=tmp_path, show=False)
    assert not torch.equal(student.norm.running_mean, before)
    assert not student.norm.training
    recover(again, original, batches(20), settings, folder=tmp_path, show=False)  # a finished run is only read
    assert same(state(student), state(again))
    wild = Distill(steps=6, learning_rate=5.0, clip=1e9, normalise=True, held_out=batches(2, seed=1), check_every=2)
    _, third = normalised()
    held = state(third)
    assert recover(third, original, batches(), wild, show=False).kept_step == 0
    assert same(held, state(third))


@pytest.mark.parametrize("at", [9, 21, 33])
def test_every_way_goes_on_exactly_after_it_was_killed(tmp_path: Path, at: int) -> None:
    original, student = normalised()
    settings = Distill(
        steps=12,
        layerwise=4,
        blockwise=4,
        hidden=0.3,
        anneal=0.3,
        normalise=True,
        patience=5,
        held_out=batches(2, seed=1),
        check_every=3,
        save_every=0,
    )
    whole = copy.deepcopy(student)
    expected = recover(whole, original, shuffled(), settings, show=False)
    calls = 0

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KilledError
        return model(batch[0])

    model = copy.deepcopy(student)
    with pytest.raises(KilledError):
        recover(model, original, shuffled(), settings, forward=forward, folder=tmp_path, show=False)
    model = copy.deepcopy(student)
    result = recover(model, original, shuffled(), settings, folder=tmp_path, show=False)
    assert same(state(whole), state(model))
    assert (result.losses, result.held_out, result.kept_step) == (
        expected.losses,
        expected.held_out,
        expected.kept_step,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"blockwise": -1},
        {"hidden": math.inf},
        {"anneal": 1.0},
        {"rates": "equally"},
        {"patience": 0, "held_out": []},
        {"patience": 3},
        {"blocks": "layer.*"},
        {"anneal": 0.5, "closed_form": True},
    ],
)
def test_settings_of_all_ways_are_validated(options: dict[str, Any]) -> None:
    with pytest.raises(StructureError, match=next(iter(options))):
        Distill(**options)
