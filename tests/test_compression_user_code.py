"""Code of users around the layers that ``compress`` replaces, and data and folders as they use them."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import structmat as sm
from structmat.compression import figures, timing
from structmat.compression.compress import compress_
from structmat.compression.gradual import compress_gradually
from structmat.compression.objectives import Parts
from structmat.compression.recover import recover
from structmat.compression.report_html import write_html
from structmat.compression.statistics import reestimate
from structmat.errors import BudgetError, DataError, FormatError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed does not matter here."""
    monkeypatch.setattr(figures, "MODEL_SECONDS", 0.0)
    monkeypatch.setattr(timing, "LAYER_SECONDS", 0.0)


BATCHES = [torch.randn(32, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def compressed(model: nn.Module, batches: Any = None, share: float = 0.6, **more: Any) -> Any:
    batches = BATCHES if batches is None else batches
    more = {"structures": ["LowRank"], **more}
    return sm.compress(model.eval(), budget=sm.Parameters(share), calibration=batches, **more)


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------ forwards that look inside


class Reader(nn.Module):
    """Asks its layers for what PyTorch's have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm.flatten_parameters()
        state = torch.zeros(self.lstm.num_layers, len(x), self.lstm.hidden_size)
        assert self.lstm.batch_first
        assert self.conv.kernel_size == (3,)
        assert (self.conv.stride, self.conv.padding, self.conv.padding_mode) == ((1,), (1,), "zeros")
        y = self.linear(input=self.conv(input=x).mT)
        y, _ = self.lstm(input=y, hx=(state, state))
        z: Tensor = self.last(input=y)
        return z


def test_layers_have_what_forwards_ask_for() -> None:
    """Options, arguments by name: in calibration, in the compressed model and in the frozen one."""
    x = torch.randn(16, 4, 6)
    model = Reader().eval()
    result = compressed(model, [x], recover=sm.Distill(steps=2))
    assert len(result.plan.changed) >= 4
    with torch.no_grad():
        torch.testing.assert_close(sm.freeze(result.model)(x), result.model(x), rtol=1e-4, atol=1e-5)


class Peeking(nn.Module):
    """Reads tensors of its recurrent net, of its attention and of an item of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.attention = nn.GRU(16, 16, batch_first=True), nn.MultiheadAttention(16, 2, batch_first=True)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x.to(self.rnn.weight_hh_l0.dtype))
        y = y + self.attention(y, y, y)[0] * self.attention.in_proj_weight.new_ones(())
        for layer in self.layers:
            y = layer(y.to(self.layers[0].weight.dtype))
        z: Tensor = self.last(y)
        return z


def test_layers_whose_tensors_a_forward_reads_are_kept() -> None:
    result = compressed(Peeking(), [torch.randn(16, 5, 16)])
    assert set(result.plan.layers) == {"last"}
    reasons = {layer["name"]: layer["reason"] for layer in result.report.skipped}
    assert "Peeking reads its weight" in reasons["layers.0"]
    assert "its tensors are read by others" in reasons["rnn"]
    assert "its tensors are read by others" in reasons["attention"]


class Standardised(nn.Conv2d):
    """Weight standardisation, as it is usually written."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mean, deviation = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return super()._conv_forward(input, (weight - mean) / deviation, bias)


def test_convolutions_of_their_own_kind_are_kept() -> None:
    model = nn.Sequential(Standardised(3, 8, 3), nn.Conv2d(8, 8, 3))
    result = compressed(model, [torch.randn(4, 3, 8, 8)])
    assert set(result.plan.layers) == {"1"}
    assert "_conv_forward of its own" in result.report.skipped[0]["reason"]


def test_what_works_in_place_does_not_change_what_is_taught() -> None:
    """Equal models are at no distance, part by part, also where an activation writes on a part's output."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    parts = Parts(model, copy.deepcopy(model), ["0", "2"], apart=True)
    assert float(parts.error(torch.randn(16, 8), None).detach()) == 0.0


def test_a_lazy_module_beside_is_no_obstacle(tmp_path: Path) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.last, self.unused = nn.Linear(16, 32), nn.Linear(32, 8), nn.LazyLinear(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(F.relu(self.used(x)))
            return y

    result = compressed(Partly(), folder=tmp_path)
    assert result.report.model_parameters.before == 16 * 32 + 32 + 32 * 8 + 8


# ---------------------------------------------------------------------------------------------- data and judgements


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return iter([torch.randn(16, generator=generator) for _ in range(64)])


def test_a_loader_without_a_length_is_enough(tmp_path: Path) -> None:
    loader: DataLoader[Tensor] = DataLoader(Stream(), batch_size=32)
    result = compressed(perceptron(), loader, recover=sm.Distill(steps=3), folder=tmp_path)
    assert result.report.recovery["steps"] == 3


class Locked(list[Tensor]):
    """Batches that can't be copied."""

    def __init__(self, batches: list[Tensor]) -> None:
        super().__init__(batches)
        self.lock = threading.Lock()


def test_data_of_recovery_are_not_copied_and_no_part_of_its_name(tmp_path: Path) -> None:
    """A second call reads what the first one evaluated, though its loader is another object."""
    calls = []

    def error(model: nn.Module) -> float:
        calls.append(model)
        return far(model(BATCHES[0]), perceptron()(BATCHES[0]))

    for _ in range(2):
        result = sm.compress(
            perceptron(),
            budget=sm.Quality(at_most=0.7),
            calibration=BATCHES,
            structures=["LowRank"],
            evaluate=error,
            recover=sm.Distill(steps=2, data=Locked(BATCHES), held_out=Locked(BATCHES)),
            folder=tmp_path,
        )
        first = len(calls)
    assert result.report.quality["recovered"]["quality"] <= 0.7
    assert len(calls) == first
    with pytest.raises(DataError, match=r"Distill\(held_out=\.\.\.\): .* got int"):
        sm.Distill(held_out=5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="can be read only once"):
        sm.Distill(data=iter(BATCHES))


def test_a_quality_that_is_no_number_does_not_lose_the_run(tmp_path: Path) -> None:
    """A perplexity may be infinite. The report says so, as JSON that every reader takes."""
    values = iter([1.0, float("inf"), float("nan")])
    result = compressed(perceptron(), evaluate=lambda _: next(values), recover=sm.Distill(steps=1), folder=tmp_path)
    assert result.report.quality["after"]["quality"] == float("inf")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["quality"]["after"] == {"quality": "inf"}
    assert found["quality"]["recovered"] == {"quality": "nan"}
    write_html(result.report, tmp_path / "again.html")


def test_held_out_batches_that_are_not_finite_are_named() -> None:
    bad = BATCHES[0].clone()
    bad[0, 0] = float("nan")
    with pytest.raises(DataError, match="on the held-out batches is NaN"):
        compressed(perceptron(), recover=sm.Distill(steps=2, held_out=[bad]))


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_never_gives_what_another_model_became(tmp_path: Path) -> None:
    """The same shapes, trained again; another amount; other steps: each recovers anew, and the first is still there."""
    fixed = {"0": sm.LowRank(5), "2": sm.Dense()}

    def run(seed: int, folder: Path | None, **more: Any) -> nn.Module:
        options = {"overrides": fixed, "recover": sm.Distill(steps=5), "structures": None, "folder": folder, **more}
        return compressed(perceptron(seed), share=0.7, **options).model  # type: ignore[no-any-return]

    first, alone = run(0, tmp_path), run(1, None)
    for found, expected in ((run(1, tmp_path), alone), (run(0, tmp_path), first)):
        torch.testing.assert_close(found(BATCHES[0]), expected(BATCHES[0]))
    run(0, tmp_path, recover=sm.Distill(steps=6))
    run(0, tmp_path, overrides={"0": sm.LowRank(4), "2": sm.Dense()})


def test_recovery_goes_on_only_from_where_it_began(tmp_path: Path) -> None:
    original = perceptron()
    students = [compressed(original, share=share).model for share in (0.6, 0.6, 0.6)]
    with torch.no_grad():
        next(students[1].parameters()).mul_(1.5)
    settings = sm.Distill(steps=2)
    recover(students[0], original, BATCHES, settings, folder=tmp_path, show=False)
    with pytest.raises(FormatError, match="start differ"):
        recover(students[1], original, BATCHES, settings, folder=tmp_path, show=False)
    recover(students[2], original, BATCHES, settings, folder=tmp_path, show=False)
    torch.testing.assert_close(students[2](BATCHES[0]), students[0](BATCHES[0]))


def test_compression_in_steps_is_judged_from_the_original(tmp_path: Path) -> None:
    """Whatever ``evaluate`` returns, tensors too; and budgets are amounts."""
    original = perceptron()

    def errors(model: nn.Module) -> dict[str, Tensor]:
        return {"error": (model(BATCHES[0]) - original(BATCHES[0])).square().mean()}

    options: dict[str, Any] = {"calibration": BATCHES, "structures": ["LowRank"], "folder": tmp_path}
    budgets = [sm.Parameters(0.8), sm.Parameters(0.6)]
    report = compress_gradually(original, budgets, sm.Distill(steps=4), evaluate=errors, **options).report  # type: ignore[arg-type]
    assert list(report.quality) == ["before", "after", "recovered"]
    assert report.quality["before"] == {"error": 0.0}
    assert all(isinstance(value, float) for named in report.quality.values() for value in named.values())
    with pytest.raises(BudgetError, match=r"Memory for each step, such as Parameters\(0\.5\); got 0\.5"):
        compress_gradually(original, [sm.Parameters(0.8), 0.5], sm.Distill(steps=4), **options)  # type: ignore[list-item]


def test_recovery_without_data_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="Recovery needs data"):
        compress_(perceptron(), budget=sm.Parameters(0.6), recover=sm.Distill(steps=2))


# --------------------------------------------------------------------------------------------- batch normalisation


class Auxiliary(nn.Module):
    """A part that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)
        self.beside = nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        y = self.beside(y) if self.training else y
        z: Tensor = self.last(F.relu(y))
        return z


def test_statistics_of_what_is_not_called_stay() -> None:
    model = Auxiliary().eval()
    with torch.no_grad():
        model.beside.running_mean.fill_(3.0)
        model.beside.running_var.fill_(7.0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.weight.mul_(3.0)  # far enough that statistics estimated again are kept
    found = reestimate(other, model, BATCHES)
    assert found is not None
    assert found.kept
    assert float(other.beside.running_mean[0]) == 3.0
    assert float(other.beside.running_var[0]) == 7.0


def test_batches_of_one_sample_are_enough() -> None:
    """They have no statistics of their own; a net with batch normalisation is compressed and recovered all the same."""
    ones = [x[:1] for x in BATCHES]
    for data in (ones, [*BATCHES, ones[0]]):
        result = compressed(Auxiliary(), data, recover=sm.Distill(steps=4, normalise=True))
        assert result.report.recovery["steps"] == 4
        assert all(bool(torch.isfinite(b).all()) for b in result.model.buffers())


# ------------------------------------------------------------------------------------------------------------ plans


def test_a_plan_that_keeps_a_table_can_be_applied() -> None:
    """What is kept dense is named in a plan, and may be asked for only by name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 32), nn.Linear(32, 8))
    words = [torch.randint(64, (8, 5)) for _ in range(2)]
    result = compressed(model, words, share=0.8, include=("*", "0"), overrides={"0": sm.Dense()})
    assert result.plan.layers["0"] == sm.Dense()
    again = sm.compress(model, plan=result.plan, calibration=words)
    assert again.plan.layers == result.plan.layers
