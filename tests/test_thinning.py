"""Sparse layers that begin with every entry of the original and lose entries while they learn."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_models import Classifier, KilledError, batches, classifier, far, same, shuffled, state
from torch import nn

import structmat as sm
from structmat.compression.plan import Plan
from structmat.compression.recover import Distill, Optimizer, recover
from structmat.compression.replace import replace_layers
from structmat.compression.scan import scan
from structmat.compression.split import split_apart
from structmat.compression.teaching import Teaching
from structmat.compression.thinning import Thinning
from structmat.errors import StructureError


def planned(original: nn.Module, density: float = 0.3, only: tuple[str, ...] | None = None) -> nn.Module:
    """The same with sparse layers."""
    model = copy.deepcopy(original)
    shared = [name for name in ("0",) if original.__class__ is nn.Sequential and original[0] is original[-1]]
    sites = [site for site in scan(model, include=shared).sites if only is None or site.name in only]
    layers = {site.name: sm.Sparse(density=density).resolve(site.shape) for site in sites}
    replace_layers(model, Plan(layers, {site.name: site.shape for site in sites}))
    return model


@pytest.fixture
def original() -> Classifier:
    return classifier()


@pytest.fixture
def student(original: Classifier) -> nn.Module:
    return planned(original, only=("first", "second"))


def sparse(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "structure", None), sm.Sparse)}


def test_other_entries_are_chosen_and_as_many_remain(original: Classifier, student: nn.Module) -> None:
    fixed, before = copy.deepcopy(student), sparse(student)
    numbers = {name: (layer.structure, layer.places.clone()) for name, layer in before.items()}
    settings = Distill(steps=200, learning_rate=3e-3)
    recover(fixed, original, batches(), settings, show=False)
    recover(student, original, batches(), Distill(steps=200, learning_rate=3e-3, thin=0.5), show=False)
    after = sparse(student)
    assert list(after) == ["first", "second"]
    for name, layer in after.items():
        structure, places = numbers[name]
        assert layer.structure == structure
        assert layer.matrix.num_parameters == structure.nonzeros == int((layer.matrix.to_dense() != 0).sum())
        assert not torch.equal(layer.places, places)
        assert layer.values.requires_grad
        assert layer.bias.requires_grad
    assert far(student, original) < far(fixed, original)
    assert type(student.head) is nn.Linear


def test_what_is_missed_least_is_dropped() -> None:
    """Features that never occur cost nothing, however large their weights are."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(12, 8))
    with torch.no_grad():
        original[0].weight[:, 6:] = 10.0
    silent = torch.ones(12).index_fill_(0, torch.arange(6, 12), 0)
    data = [torch.randn(32, 12) * silent for _ in range(5)]
    model = planned(original, 0.5)
    assert bool((sparse(model)["0"].places % 12 >= 6).all())  # the largest
    recover(model, original, data, Distill(steps=60, learning_rate=1e-4, thin=0.8), show=False)
    assert bool((sparse(model)["0"].places % 12 < 6).all())
    x = data[0]
    with torch.no_grad():
        assert float((model(x) - original(x)).norm() / original(x).norm()) < 1e-3


@pytest.mark.parametrize("classes", [True, False])
def test_sensitivities_are_the_fisher_information(classes: bool) -> None:
    """Of a layer of logits p_i (1 - p_i) x_j^2, of one that is compared by squares x_j^2, but for a factor."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3, bias=False).double(), torch.randn(20, 5).double()
    data = (x, torch.zeros(20, dtype=torch.long)) if classes else x
    teaching = Teaching(layer, copy.deepcopy(layer), Distill(), None, None)
    mean = sum(teaching.sensitivities(data, [layer.weight], seed)[0] for seed in range(4000)) / 4000
    with torch.no_grad():
        p = layer(x).softmax(-1)
        expected = (p * (1 - p)).T @ x.square() if classes else torch.ones(3, 20).double() @ x.square()
    assert torch.allclose(mean / mean.sum(), (expected / expected.sum()).float(), rtol=0.15)


def test_the_number_of_entries_falls_along_a_cubic_and_nothing_comes_back(
    original: Classifier, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    supports: list[torch.Tensor] = []
    step = Thinning.step

    def watched(self: Thinning, values: Any, share: float) -> None:
        step(self, values, share)
        supports.append(values[1].detach().reshape(-1) != 0)

    monkeypatch.setattr(Thinning, "step", watched)
    settings = Distill(steps=100, thin=0.4, held_out=batches(2, seed=1), check_every=10)
    done = recover(student, original, batches(), settings, show=False)
    counts = [int(support.sum()) for support in supports]
    whole, last = 32 * 32, int(0.3 * 32 * 32)
    assert counts[:40] == [last + round((whole - last) * (1 - (i + 1) / 40) ** 3) for i in range(40)]
    assert set(counts[39:]) == {last}
    assert all(bool((earlier | ~later).all()) for earlier, later in itertools.pairwise(supports))
    assert [step for step, _ in done.held_out] == [0, 40, 50, 60, 70, 80, 90, 100]  # no looks at denser ones


def test_it_begins_as_the_original(original: Classifier, student: nn.Module) -> None:
    start = far(student, original)
    thinning = Thinning(student, original, 0.5)
    assert far(student, original) == pytest.approx(start)
    thinning.begin()
    assert far(student, original) < 1e-6 < start
    thinning.harden()
    assert list(sparse(student)) == ["first", "second"]


def test_the_best_state_may_be_the_first(original: Classifier, student: nn.Module) -> None:
    before = state(student)
    settings = Distill(steps=20, learning_rate=5.0, thin=0.5, held_out=batches(2, seed=1), check_every=5)
    assert recover(student, original, batches(), settings, show=False).kept_step == 0
    assert same(before, state(student))


def test_after_a_step_back_the_entries_are_those_of_the_better_state(
    original: Classifier, student: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By scripted looks: the first state is taken up again, with its own entries."""
    script, followed = iter([1.0, 2.0, 2.0, 2.0, 2.0, 2.0]), []
    monkeypatch.setattr(Teaching, "held_out", lambda _: next(script))
    follow = Thinning.follow

    def watched(self: Thinning, values: Any) -> None:
        follow(self, values)
        followed.append([int((value != 0).sum()) for value in values])

    monkeypatch.setattr(Thinning, "follow", watched)
    count = {name: layer.structure.nonzeros for name, layer in sparse(student).items()}
    before = state(student)
    settings = Distill(steps=40, thin=0.5, held_out=batches(1), check_every=5)
    with caplog.at_level("INFO", logger="structmat.compression.recover"):
        recover(student, original, batches(), settings, show=False)
    assert ["step 30 is farther" in r.getMessage() for r in caplog.records].count(True) == 1
    assert len(followed) == 2  # and at the end
    assert all(found == list(count.values()) for found in followed)
    assert same(before, state(student))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(6, 10, num_layers=2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(20, 4, batch_first=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.net(x)
        return self.head(y + self.attention(y, y, y, need_weights=False)[0]).mean(1)


def images() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, dilation=2),
        nn.Flatten(),
        nn.Linear(54, 3),
    )
    return model, torch.randn(8, 4, 5, 5)


def series() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Conv1d(3, 8, 5), nn.ReLU(), nn.Conv1d(8, 4, 3, groups=4), nn.Flatten()), torch.randn(
        8, 3, 12
    )


def sequences() -> tuple[nn.Module, torch.Tensor]:
    return Sequence(), torch.randn(8, 7, 6)


def shared() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer), torch.randn(8, 6)


@pytest.mark.parametrize("make", [images, series, sequences, shared])
def test_every_kind_of_layer(make: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    torch.manual_seed(0)
    original, x = make()
    original.eval()
    model = planned(original, 0.4)
    kinds = {n: (type(m), m.structure) for n, m in sparse(model).items()}
    assert kinds
    untouched = copy.deepcopy(model).eval()
    names = [name for name, _ in model.named_modules()]
    with split_apart(original, names):
        thinning = Thinning(model, original, 0.5)
        thinning.begin()
        with torch.no_grad():
            assert torch.allclose(model.eval()(x), original(x), atol=1e-5)
        thinning.harden()
    assert {n: (type(m), m.structure) for n, m in sparse(model).items()} == kinds
    recover(untouched, original, [x], Distill(steps=20, thin=0.5), show=False)
    assert {n: (type(m), m.structure) for n, m in sparse(untouched).items()} == kinds
    assert [n for n, _ in untouched.named_modules(remove_duplicate=False)] == [
        n for n, _ in model.named_modules(remove_duplicate=False)
    ]
    with torch.no_grad():
        moved = (untouched(x) - original(x)).norm() / original(x).norm()
    assert float(moved) < 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(original: Classifier, student: nn.Module, dtype: torch.dtype) -> None:
    data = [(x.to(dtype), labels) for x, labels in batches()]
    recover(student.to(dtype), original.to(dtype), data, Distill(steps=20, thin=0.5), show=False)
    for layer in sparse(student).values():
        assert layer.values.dtype == dtype
        assert int((layer.matrix.to_dense() != 0).sum()) == layer.structure.nonzeros


def test_windows_move_and_sparse_layers_thin(original: Classifier) -> None:
    student = planned(original, only=("first",))
    student.second = sm.nn.StructuredLinear.from_linear(student.second, sm.GBLR(terms=16))
    done = recover(student, original, batches(), Distill(steps=20, thin=0.5, windows=True), show=False)
    assert done.windows
    assert [type(layer.structure) for layer in (student.first, student.second)] == [sm.Sparse, sm.GBLR]


@pytest.mark.parametrize("at", [9, 21, 33])
@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_it_goes_on_exactly_after_it_was_killed(
    original: Classifier, student: nn.Module, tmp_path: Path, at: int, optimizer: Optimizer
) -> None:
    settings = Distill(
        steps=24, thin=0.6, optimizer=optimizer, held_out=batches(2, seed=1), check_every=3, save_every=0
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
    assert list(sparse(model)) == ["first", "second"]  # what was interrupted has its structures
    for _ in range(2):  # the second time it is done already
        model = copy.deepcopy(student)
        result = recover(model, original, shuffled(), settings, folder=tmp_path, show=False)
        assert same(state(whole), state(model))
        assert (result.losses, result.held_out) == (expected.losses, expected.held_out)


def test_compress_takes_it(original: Classifier) -> None:
    result = sm.compress(
        original,
        budget=sm.Parameters(0.4),
        calibration=batches(),
        structures=("Sparse",),
        recover=Distill(steps=20, thin=0.5),
        progress=False,
    )
    layers = {name: layer.structure for name, layer in sparse(result.model).items()}
    assert layers
    assert {name: str(structure) for name, structure in layers.items()}.items() <= {
        layer.name: layer.structure for layer in result.report.layers
    }.items()


def test_what_can_not_be_is_refused(original: Classifier, student: nn.Module) -> None:
    with pytest.raises(StructureError, match=r"thin=\.\.\.\) needs layers of the structure Sparse that learn"):
        recover(copy.deepcopy(original), original, batches(), Distill(thin=0.5), show=False)
    for name, layer in sparse(student).items():
        layer.requires_grad_(name == "first")
    recover(student, original, batches(), Distill(steps=4, thin=0.5), show=False)
    assert not student.second.values.requires_grad
    for options in ({"closed_form": True}, {"layerwise": 3}, {"blockwise": 3}):
        with pytest.raises(StructureError, match=r"thin=\.\.\.\) begins with the original's matrices"):
            Distill(thin=0.5, **options)
    for value in (1.0, -0.1, "half"):
        with pytest.raises(StructureError, match="thin"):
            Distill(thin=value)  # type: ignore[arg-type]
