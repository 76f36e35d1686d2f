"""Loaders, qualities and folders as users have them."""

from __future__ import annotations

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
from structmat.compression.recover import recover
from structmat.compression.report_html import write_html
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
    result = compressed(perceptron(), loader, recover=sm.Distill(steps=3), folder=tmp_path, progress=True)
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
