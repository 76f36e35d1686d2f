"""The trained models that the studies use, with their data and their measure of quality.

Files are found through ``STRUCTMAT_DATA`` (default ``../shared/data`` beside the repository). Test data is only ever
evaluated on: calibration, recovery and every choice use training data.
"""

from __future__ import annotations

import json
import lzma
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(os.environ.get("STRUCTMAT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

WINDOW = 256
"""Characters that the language model sees at once."""

VALIDATION = 300_000
"""Last characters of the training text that nothing is trained or calibrated on."""


@dataclass(frozen=True)
class RealModel:
    """A trained model and what a study does with it.

    Args:
        name: of the study's cells.
        load: the original, on the CPU in float32 and evaluation mode.
        calibration: batches for second moments, by seed.
        training: batches for recovery, by seed: endless fresh draws from the training data.
        held_out: batches that recovery judges its states by.
        evaluate: quality on the test data.
        metric: its name and unit.
        lower_is_better: the direction of the metric.
        sample: one batch of the largest size that is timed.
        batches: numbers of samples at which the model is timed.
        rows: of a layer's input, for each sample.
        minutes: of recovery on a quiet machine, the same for every method.
        clocked_steps: of recovery that are timed.
    """

    name: str
    load: Callable[[], nn.Module]
    calibration: Callable[[int], list[Any]]
    training: Callable[[int], Any]
    held_out: Callable[[], list[Any]]
    evaluate: Callable[[nn.Module], float]
    metric: str
    lower_is_better: bool
    sample: Callable[[], Any]
    batches: tuple[int, ...]
    rows: int
    minutes: float
    clocked_steps: int


def require_data() -> None:
    """Raise with a remedy where the data is absent."""
    if not DATA.is_dir():
        raise SystemExit(f"The data folder {DATA} does not exist. Set STRUCTMAT_DATA to the folder that holds it.")


@dataclass(frozen=True)
class Draws:
    """Fresh random batches, the same ones in the same order each time they are read."""

    draw: Callable[[np.random.Generator], Any]
    seed: int
    count: int

    def __iter__(self) -> Iterator[Any]:
        random = np.random.default_rng(self.seed)
        for _ in range(self.count):
            yield self.draw(random)

    def __len__(self) -> int:
        return self.count


# --------------------------------------------------------------------------------------------- the language model


@cache
def _characters(file: str) -> Tensor:
    index = {c: i for i, c in enumerate(json.loads((DATA / "novel-lm" / "chars.json").read_text(encoding="utf-8")))}
    with lzma.open(DATA / "novels" / file, "rt") as stream:
        text = stream.read()
    return torch.tensor([index[c] for c in text], dtype=torch.int64)


def _windows(tokens: Tensor, starts: np.ndarray) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([tokens[s : s + WINDOW] for s in starts])}


def _load_language_model() -> nn.Module:
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(DATA / "novel-lm", dtype=torch.float32)
    return model.eval()


def _language_calibration(seed: int, windows: int = 512, size: int = 16) -> list[dict[str, Tensor]]:
    tokens = _characters("train.txt.xz")[:-VALIDATION]
    starts = np.random.default_rng([seed, 1]).integers(0, len(tokens) - WINDOW, windows)
    return [_windows(tokens, starts[i : i + size]) for i in range(0, windows, size)]


def _language_training(seed: int) -> Draws:
    tokens = _characters("train.txt.xz")[:-VALIDATION]

    def draw(random: np.random.Generator) -> dict[str, Tensor]:
        return _windows(tokens, random.integers(0, len(tokens) - WINDOW, 16))

    return Draws(draw, seed + 1000, 100_000)


def _language_held_out() -> list[dict[str, Tensor]]:
    tokens = _characters("train.txt.xz")[-VALIDATION:]
    return [_windows(tokens, np.arange(i, i + 16) * WINDOW) for i in range(0, 128, 16)]


@torch.no_grad()
def bits_per_character(model: nn.Module, characters: int = 262_144) -> float:
    """On the test book, in windows of 256 characters, each predicted from its own window only."""
    test = _characters("test.txt.xz")
    total = 0.0
    step = WINDOW * 64
    for s in range(0, characters, step):
        x, y = test[s : s + step].view(-1, WINDOW), test[s + 1 : s + step + 1].view(-1, WINDOW)
        logits = model(input_ids=x).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    return total / characters / math.log(2)


# ------------------------------------------------------------------------------------------------- the perceptron


@cache
def _mnist() -> dict[str, Tensor]:
    data = np.load(DATA / "mnist" / "mnist.npz")
    images = {k: torch.from_numpy(data[k]).reshape(-1, 784).float() / 255 for k in ("x_train", "x_test")}
    return images | {k: torch.from_numpy(data[k]).long() for k in ("y_train", "y_test")}


_MNIST_HELD_OUT = 5000


def _load_perceptron() -> nn.Module:
    from safetensors.torch import load_file

    state = load_file(DATA / "mnist-mlp" / "model.safetensors")
    model = nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))
    names = {"0": "fc1", "2": "fc2"}
    model.load_state_dict(
        {f"{i}.{kind}": state[f"{n}.{kind}"] for i, n in names.items() for kind in ("weight", "bias")}
    )
    return model.eval()


def _mnist_calibration(seed: int, images: int = 4096, size: int = 512) -> list[Tensor]:
    x = _mnist()["x_train"][:-_MNIST_HELD_OUT]
    order = torch.from_numpy(np.random.default_rng([seed, 1]).choice(len(x), images, replace=False))
    return [x[order[i : i + size]] for i in range(0, images, size)]


def _mnist_training(seed: int) -> Draws:
    x = _mnist()["x_train"][:-_MNIST_HELD_OUT]

    def draw(random: np.random.Generator) -> Tensor:
        return x[torch.from_numpy(random.integers(0, len(x), 256))]

    return Draws(draw, seed + 1000, 1_000_000)


def _mnist_held_out() -> list[Tensor]:
    return list(_mnist()["x_train"][-_MNIST_HELD_OUT:].split(1000))


@torch.no_grad()
def _accuracy(model: nn.Module) -> float:
    data = _mnist()
    return 100.0 * float((model(data["x_test"]).argmax(-1) == data["y_test"]).float().mean())


MODELS = {
    "novel-lm": RealModel(
        name="novel-lm",
        load=_load_language_model,
        calibration=_language_calibration,
        training=_language_training,
        held_out=_language_held_out,
        evaluate=bits_per_character,
        metric="bits per character",
        lower_is_better=True,
        sample=lambda: _windows(_characters("train.txt.xz"), np.arange(16) * WINDOW),
        batches=(1, 4, 16),
        rows=WINDOW,
        minutes=3.0,
        clocked_steps=12,
    ),
    "mnist-mlp": RealModel(
        name="mnist-mlp",
        load=_load_perceptron,
        calibration=_mnist_calibration,
        training=_mnist_training,
        held_out=_mnist_held_out,
        evaluate=_accuracy,
        metric="test accuracy, %",
        lower_is_better=False,
        sample=lambda: _mnist()["x_train"][:512],
        batches=(1, 32, 512),
        rows=1,
        minutes=0.5,
        clocked_steps=200,
    ),
}
