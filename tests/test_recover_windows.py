"""Windows that move while a model recovers: within their budget, to the best state, resumable."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_models import Classifier, KilledError, batches, classifier, far, same, shuffled, state, student_of
from torch import nn

import structmat as sm
from structmat.compression.recover import Distill, distance, recover
from structmat.compression.report_html import render
from structmat.compression.running import Outcome
from structmat.errors import StructureError
from structmat.structure import count_stored


@pytest.fixture
def original() -> Classifier:
    return classifier()


@pytest.fixture
def student(original: Classifier) -> Classifier:
    return student_of(original)


def test_windows_move_while_distilling(original: Classifier) -> None:
    """The numbers that the layers hold stay within what they held, and the windows of the fit are left behind."""

    def compressed() -> Classifier:
        model = copy.deepcopy(original)
        for name in ("first", "second"):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            setattr(model, name, sm.nn.StructuredLinear.from_linear(linear, sm.GBLR(terms=12, rows=96, columns=48)))
        return model

    model, still = compressed(), compressed()
    before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith("windows")}
    start = far(model, original)
    done = recover(model, original, batches(), Distill(steps=80, windows=True, learning_rate=3e-3), show=False)
    recover(still, original, batches(), Distill(steps=80, learning_rate=3e-3), show=False)
    assert far(model, original) < 0.9 * start
    spent = sum(getattr(model, n).matrix.num_parameters for n in ("first", "second"))
    assert 0.99 * 288 - 1 <= spent <= 288
    moved = {n: t for n, t in model.state_dict().items() if n.endswith("windows")}
    assert any(t.shape != before[n].shape or not torch.equal(t, before[n]) for n, t in moved.items())
    for n, t in still.state_dict().items():
        assert not n.endswith("windows") or torch.equal(t, before[n])
    assert {film["layer"] for film in done.windows} == {"first", "second"}
    for film in done.windows:
        steps = [frame["step"] for frame in film["frames"]]
        assert steps[0] == 0
        assert steps[-1] == 80
        assert len(steps) >= 6
        assert film["moved"] > 0
        last = torch.tensor(film["frames"][-1]["windows"])
        alive = last[(last[:, 1] > 0) & (last[:, 3] > 0)]
        assert torch.equal(alive.sort(0)[0], moved[f"{film['layer']}.windows"].sort(0)[0].to(alive.dtype))


def windowed(original: Classifier) -> Classifier:
    model = copy.deepcopy(original)
    for name in ("first", "second"):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model, name, sm.nn.StructuredLinear.from_linear(linear, sm.GBLR(terms=12, rows=96, columns=48)))
    return model


def test_moving_windows_keep_the_best_on_held_out_batches(original: Classifier) -> None:
    """What is kept is what was judged, windows in whole numbers: no farther than the start, and each layer's size."""
    for rate in (3e-3, 3.0):  # the second leads away at once, so that the first state is the best
        model, held = windowed(original), batches(3, seed=2)
        before = far_on(model, original, held)
        settings = Distill(steps=40, windows=True, learning_rate=rate, held_out=held, check_every=5)
        result = recover(model, original, batches(), settings, show=False)
        best = min(value for _, value in result.held_out)
        assert far_on(model, original, held) == pytest.approx(best, rel=1e-4)
        assert best < 0.95 * before if rate < 1 else result.held_out[-1][1] <= 1e3
        assert best <= result.held_out[0][1] == pytest.approx(before, rel=1e-4)
        for name in ("first", "second"):
            assert model.get_submodule(name).matrix.num_parameters <= 144


def far_on(model: nn.Module, original: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    model.eval(), original.eval()
    with torch.no_grad():
        values = [float(distance(Outcome(model(x), True), Outcome(original(x), True), 1.0, None)) for x, _ in data]
    return sum(values) / len(values)


@pytest.mark.parametrize("at", [3, 9, 17, 40])
def test_moving_windows_of_a_killed_run_go_on_exactly(original: Classifier, tmp_path: Path, at: int) -> None:
    settings = Distill(
        steps=15,
        layerwise=4,
        windows=True,
        held_out=batches(2, seed=1),
        check_every=4,
        save_every=0,
        learning_rate=3e-2,
    )
    whole = windowed(original)
    expected = recover(whole, original, shuffled(), settings, show=False)
    calls = 0

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        if model is not original and len(batch[0]) == 8:
            calls += 1
            if calls == at:
                raise KilledError
        return model(batch[0])

    model = windowed(original)
    with pytest.raises(KilledError) if at < 19 else contextlib.nullcontext():
        recover(model, original, shuffled(), settings, forward=forward, folder=tmp_path, show=False)
    model = windowed(original)  # a new process starts from the projected weights; at 40 the run was over
    result = recover(model, original, shuffled(), settings, folder=tmp_path, show=False)
    assert same(state(whole), state(model))
    assert (result.losses, result.held_out, result.kept_step) == (
        expected.losses,
        expected.held_out,
        expected.kept_step,
    )
    assert result.layerwise_steps == 4
    assert result.windows == expected.windows


def test_windows_in_recovery_refuse(original: Classifier, student: Classifier) -> None:
    with pytest.raises(StructureError, match="needs GBLR layers"):
        recover(student, original, batches(), Distill(steps=2, windows=True), show=False)
    with pytest.raises(StructureError, match="need a number of steps"):
        Distill(steps=None, minutes=1.0, windows=True)


def test_compress_with_windows_that_move(original: Classifier) -> None:
    """Under one budget, which the moving windows keep, too; the report and what is saved know the new windows."""
    settings = Distill(steps=20, windows=True, learning_rate=3e-3)
    result = sm.compress(
        original, budget=sm.Parameters(0.6), calibration=batches(), structures=("GBLR",), recover=settings
    )
    chosen = [m for m in result.model.modules() if isinstance(m, sm.nn.StructuredLinear)]
    assert any(isinstance(m.structure, sm.GBLR) for m in chosen)
    dense = sum(m.weight.numel() for m in original.modules() if isinstance(m, nn.Linear))
    kept = sum(m.weight.numel() for m in result.model.modules() if isinstance(m, nn.Linear))
    assert sum(count_stored(m.structure, (m.out_features, m.in_features)) for m in chosen) + kept <= 0.6 * dense
    named = dict(result.model.named_modules())
    for layer in result.report.layers:
        module = named[layer.name]
        if isinstance(module, sm.nn.StructuredLinear):
            assert layer.parameters == count_stored(module.structure, (module.out_features, module.in_features))
            assert result.plan.layers[layer.name] == module.structure
    page = render(result.report)
    assert "Windows of <code>" in page
    assert "step 20" in page
    assert render(json.loads(json.dumps(result.report.to_json()))) == page
