"""Compression in steps: each fits what the one before recovered, all imitate the original, and work is resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.compression import gradual
from structmat.compression.gradual import compress_gradually
from structmat.errors import BudgetError, DataError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5))


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 12, generator=generator), torch.arange(32) % 5) for _ in range(8)]


BUDGETS = (sm.Parameters(0.5), sm.Parameters(0.25))


def test_each_step_starts_from_what_the_one_before_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = network(), data()
    held = copy.deepcopy(model.state_dict())
    given: list[nn.Module] = []
    taught: list[tuple[nn.Module, nn.Module, int]] = []
    compress, recover = gradual.compress, gradual.recover_

    def compress_and_note(current: nn.Module, **options: object) -> object:
        given.append(copy.deepcopy(current))
        return compress(current, **options)

    def recover_and_note(student: nn.Module, teacher: nn.Module, *rest: object, **options: object) -> object:
        done = recover(student, teacher, *rest, **options)
        taught.append((copy.deepcopy(student), teacher, done.steps))
        return done

    monkeypatch.setattr(gradual, "compress", compress_and_note)
    monkeypatch.setattr(gradual, "recover_", recover_and_note)
    result = compress_gradually(
        model, BUDGETS, sm.Distill(steps=40), calibration=batches, structures=["LowRank"], evaluate=lambda m: 1.0
    )
    assert all(teacher is model for _, teacher, _ in taught)
    assert [steps for *_, steps in taught] == [20, 20]
    x = batches[0][0]
    with torch.no_grad():
        torch.testing.assert_close(given[1](x), taught[0][0](x), rtol=1e-4, atol=1e-5)
        assert torch.equal(result.model(x), taught[1][0](x))
        assert not torch.allclose(given[1](x), model(x))
    assert result.report.parameters.after <= 0.25 * result.report.parameters.before
    assert set(result.report.quality) == {"before", "after", "recovered"}
    assert result.report.recovery is not None
    assert all(torch.equal(t, held[n]) for n, t in model.state_dict().items())


def test_steps_go_on_from_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, settings = network(), data(), sm.Distill(steps=20, save_every=0)

    def run(folder: Path | None) -> dict[str, torch.Tensor]:
        return compress_gradually(
            model, BUDGETS, settings, calibration=batches, structures=["LowRank"], folder=folder, seed=3
        ).model.state_dict()

    expected = run(None)
    recover, calls = gradual.recover_, 0

    def killed(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return recover(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(gradual, "recover_", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    found = run(tmp_path)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert (tmp_path / "report.json").exists()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(BudgetError, match="got none"):
        compress_gradually(network(), (), sm.Distill(), calibration=data())
    with pytest.raises(BudgetError, match="smaller from step to step"):
        compress_gradually(network(), BUDGETS[::-1], sm.Distill(), calibration=data())
    with pytest.raises(DataError, match="needs data"):
        compress_gradually(network(), BUDGETS, sm.Distill())
