"""Batches as users have them: labels that are no classes, axes that are no samples, and what is no batch at all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structmat as sm
from structmat.compression import figures, timing
from structmat.compression.objectives import distance
from structmat.compression.running import outcome, own_loss
from structmat.errors import DataError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed does not matter here."""
    monkeypatch.setattr(figures, "MODEL_SECONDS", 0.0)
    monkeypatch.setattr(timing, "LAYER_SECONDS", 0.0)


def compressed(model: nn.Module, batches: list[Any], **more: Any) -> sm.CompressionResult:
    return sm.compress(
        model.eval(), budget=sm.Parameters(0.7), calibration=batches, structures=["LowRank"], progress=False, **more
    )


def kind_of(result: sm.CompressionResult) -> str:
    """How effects on the output were measured."""
    assert result.report.calibration is not None
    found: str = result.report.calibration["kind"]
    return found


@pytest.mark.parametrize("ignored", [255, -1])
def test_labels_that_are_no_class_do_not_stop_compression(ignored: int) -> None:
    """As 255 on the borders of segmented objects: labels say here only that the output is of logits."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1))
    labels = torch.randint(5, (8, 6, 6))
    labels[:, 0] = ignored
    batches = [(torch.randn(8, 3, 6, 6), labels)] * 2
    result = compressed(model, batches)
    assert kind_of(result) == "labels sampled from the model"
    with pytest.raises(DataError, match="no labels of the model's classes"):
        compressed(model, batches, recover=sm.Distill(steps=2, own_loss=0.5))


def test_labels_that_pytorch_leaves_out_are_left_out() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, -100, 3, 1, -100, 2])
    found = own_loss(logits, (None, labels), None)
    assert found is not None
    torch.testing.assert_close(found, F.cross_entropy(logits, labels))
    assert own_loss(logits, (None, torch.full((6,), -100)), None) is None


def test_one_number_for_each_label_is_no_logit() -> None:
    """The softmax of one class is one: nothing would differ from anything."""
    labels = torch.randint(2, (8,))
    for shape in ((8, 1), (8, 1, 3)):
        given = labels if len(shape) == 2 else labels[:, None].expand(8, 3)
        one, other = (outcome(torch.randn(shape), (None, given)) for _ in range(2))
        assert not one.classes
        assert float(distance(other, one, 1.0, None)) > 0.01
    binary = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    result = compressed(binary, [(torch.randn(32, 16), torch.randint(2, (32,)))] * 2)
    assert kind_of(result) == "squared error of the output"


class Graph(nn.Module):
    """Every node hears of its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(edges @ self.first(x)))
        return y


class TimeFirst(nn.Module):
    """Attention over the first axis, each step to those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.last(self.attention(x, x, x, attn_mask=mask)[0])
        return y


@pytest.mark.parametrize("kind", ["graph", "time first", "fixed size", "one picture"])
def test_batches_that_cannot_be_cut_are_used_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where measuring would take fewer samples than a batch holds."""
    from structmat.compression import effects

    monkeypatch.setattr(effects, "MOST_SAMPLES", 6)
    model: nn.Module
    if kind == "graph":
        model, batch = Graph(), {"x": torch.randn(20, 8), "edges": torch.rand(20, 20)}
    elif kind == "time first":
        model, batch = TimeFirst(), {"x": torch.randn(10, 4, 16), "mask": torch.zeros(10, 10)}
    elif kind == "one picture":
        model, batch = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), torch.randn(3, 9, 9)
    else:
        model = nn.Sequential(nn.Unflatten(0, (4, 8)), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        batch = torch.randn(32, 16)
    report = compressed(model, [batch, batch]).report
    assert [timing.batch for timing in report.timings] == [len(batch) if isinstance(batch, Tensor) else len(batch["x"])]
    assert all(timing.model_after is not None for timing in report.timings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.randn(64, 16), "one tensor of shape (64, 16), whose rows would be taken for batches. Pass [x]"),
        ({"x": torch.randn(64, 16)}, "got a dict with the keys 'x'. Pass [batch]"),
        ("train.pt", "The calibration data: an iterable of batches is needed; got str"),
    ],
)
def test_a_single_batch_is_no_calibration_data(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        compressed(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)), data)


def test_evaluate_gets_the_model_in_evaluation_mode() -> None:
    """A model that was left in training mode would be judged with its dropout; its modes are given back."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.9), nn.Linear(32, 8)).train()
    x, modes = torch.randn(64, 16), []

    def mean(judged: nn.Module) -> float:
        modes.append(judged.training)
        return float(judged(x).square().mean())

    result = sm.compress(model, budget=sm.Parameters(0.7), calibration=[x], structures=["LowRank"], evaluate=mean)
    assert modes == [False, False]
    assert model.training
    assert result.model.training
    with torch.no_grad():
        assert result.report.quality["before"]["quality"] == mean(model.eval())


def test_a_pair_of_inputs_and_data_without_samples_are_named() -> None:
    pair = (torch.randn(20, 8), torch.rand(20, 20))
    with pytest.raises(DataError, match=r"A pair is \(inputs, labels\), and Graph was called .* missing .* 'edges'"):
        compressed(Graph(), [pair])
    assert compressed(Graph(), [pair], forward=lambda model, batch: model(*batch)).report.layers
    with pytest.raises(DataError, match="2 batches came, and none held a sample"):
        compressed(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)), [torch.randn(0, 16)] * 2)
