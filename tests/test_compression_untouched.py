"""Compression in place that fails or is interrupted leaves the model as it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.compression.untouched import left_as_it_was
from structmat.projection.target import Fit, Target
from structmat.structures.low_rank import LowRank


class Net(nn.Module):
    """Everything that compression changes in place: matrices in a recurrent net, batch statistics, weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.gru = nn.GRU(8, 10, batch_first=True)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(10, 2, 20, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
        )
        self.last = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mT
        logits: Tensor = self.last(self.encoder(self.gru(y)[0]))
        return logits


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for x in data():
            model(x)  # batch statistics
    model.conv.weight.requires_grad_(False)
    return model


def data() -> list[Tensor]:
    return [torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@dataclass(frozen=True)
class Seen:
    """All of a model that a user can see: objects, values, modes, attributes."""

    modules: list[tuple[str, int, bool]]
    tensors: list[tuple[str, int, bool]]
    values: dict[str, Tensor]
    hooks: int
    flags: list[Any]

    @classmethod
    def of(cls, model: Net) -> Seen:
        return cls(
            [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
            + [(name, id(b), b.requires_grad) for name, b in model.named_buffers()],
            copy.deepcopy(model.state_dict()),
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            [model.encoder.layers[0].activation_relu_or_gelu, model.encoder.use_nested_tensor],
        )

    def check(self, model: Net) -> None:
        now = Seen.of(model)
        assert (now.modules, now.tensors, now.hooks, now.flags) == (self.modules, self.tensors, self.hooks, self.flags)
        assert now.values.keys() == self.values.keys()
        for name, value in self.values.items():
            assert torch.equal(now.values[name], value), name
        assert all(p.grad is None for p in model.parameters())


OPTIONS: dict[str, Any] = {"budget": sm.Parameters(0.5), "structures": ["LowRank"], "sweeps": 1}


def calls_of(**options: Any) -> int:
    """How often a whole run calls the model."""
    count = 0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal count
        count += 1
        y: Tensor = model(batch)
        return y

    sm.compress_(net(), calibration=data(), forward=forward, **options)
    return count


def test_an_interruption_at_any_call_of_the_model_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structmat.compression.figures.MODEL_SECONDS", 0.0)  # as many calls in every run
    options = {**OPTIONS, "recover": sm.Distill(steps=2), "rounds": 1}
    total = calls_of(**options)
    points = sorted({*range(1, total, max(1, total // 9)), total})
    assert len(points) >= 9
    for stop in points:
        model, left = net(), stop
        seen = Seen.of(model)

        def forward(given: nn.Module, batch: Tensor) -> Tensor:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            y: Tensor = given(batch)
            return y

        with pytest.raises(KeyboardInterrupt):
            sm.compress_(model, calibration=data(), forward=forward, **options)
        seen.check(model)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("step", ["replace_layers", "write_html", "reestimate", "Timer", "Report"])
def test_a_failure_in_any_step_changes_nothing(
    step: str, original: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    where = {"replace_layers": "make", "reestimate": "statistics"}.get(step, "compress")

    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(f"structmat.compression.{where}.{step}", broken)
    model = net()
    seen, given = Seen.of(model), copy.deepcopy(model) if original else None
    with pytest.raises(OSError, match="no space"):
        sm.compress_(model, calibration=data(), original=given, folder=tmp_path, **OPTIONS)
    seen.check(model)


def test_a_projection_that_fails_in_the_final_fit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, project = net(), LowRank.project
    seen, fits = Seen.of(model), 0

    def failing(self: LowRank, target: Target) -> Fit:
        nonlocal fits
        fits += 1
        if target.sweeps > 1:  # as only the contest and the final fits ask
            raise ArithmeticError("no convergence")
        return project(self, target)

    monkeypatch.setattr(LowRank, "project", failing)
    with pytest.raises(ArithmeticError, match="convergence"):
        sm.compress_(model, calibration=data(), **{**OPTIONS, "sweeps": 5})
    assert fits > 10
    seen.check(model)
    # Without data there is no copy, and nothing of the values may change.
    with pytest.raises(ArithmeticError, match="convergence"):
        sm.compress_(model, **{**OPTIONS, "sweeps": 5})
    seen.check(model)


def test_what_succeeds_stays() -> None:
    model = nn.Linear(3, 2)
    with left_as_it_was(model):
        model.weight.data.zero_()
        model.extra = 1
    assert model.extra == 1
    assert not model.weight.any()


def test_an_added_attribute_is_gone_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    twin = copy.deepcopy(model)

    def spoil() -> None:
        with left_as_it_was(model) as kept:
            kept.twin = twin
            model.extra = nn.Linear(1, 1)
            model[0].weight.data.zero_()
            model[0].weight.requires_grad_(False)
            model.eval()
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - raised above
        spoil()
    assert len(model) == 1
    assert model.training and model[0].weight.requires_grad  # noqa: PT018
    assert torch.equal(model[0].weight, twin[0].weight)
