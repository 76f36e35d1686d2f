"""A perceptron on MNIST: trained with each structure (P5), and compressed after training (P6)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import kronecker_data
from benchmarks.learned_common import (
    BASE,
    chosen,
    deployed,
    kept,
    prepared,
    project,
    train,
)


@functools.cache
def mnist() -> dict[str, Tensor]:
    """Images as (n, 784) in -1 .. 1, labels."""
    parts = {split: kronecker_data.mnist(split) for split in ("train", "test")}
    return {f"x_{k}": 2 * p.x - 1 for k, p in parts.items()} | {f"y_{k}": p.y for k, p in parts.items()}


VALIDATION = 5000
HIDDEN = 256
P5_STEPS = 2150
"""Five epochs."""
LAYERS = ["0", "2"]


def perceptron(hidden: int) -> nn.Sequential:
    """Two hidden layers; the output layer stays dense."""
    return nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def _small_width(share: float) -> int:
    """The hidden width at which the replaced layers take that share of the multiply-adds."""
    wanted = share * (784 * HIDDEN + HIDDEN**2)
    return int((-784 + math.sqrt(784**2 + 4 * wanted)) / 2)


def images(seed: int, size: int = 128) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of the training part, the same for every method."""
    data = mnist()
    count = len(data["x_train"]) - VALIDATION
    g = torch.Generator().manual_seed(1000 + seed)
    order: list[Tensor] = []

    def batch(step: int) -> tuple[Tensor, Tensor]:
        if not order:
            order.extend(torch.randperm(count, generator=g).split(size))
        which = order.pop()
        return data["x_train"][which], data["y_train"][which]

    return batch


def accuracy(model: nn.Module, part: str) -> float:
    """Percent right, on the validation or the test split."""
    data = mnist()
    x, y = (
        (data["x_train"][-VALIDATION:], data["y_train"][-VALIDATION:])
        if part == "validation"
        else (data["x_test"], data["y_test"])
    )
    model.eval()
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def run_perceptron(method: str, share: float, factor: float | None, seed: int, **options: Any) -> dict[str, Any]:
    """Train from scratch; accuracy with hard windows."""
    torch.manual_seed(seed)
    model = perceptron(_small_width(share) if method == "dense-small" else HIDDEN)
    learner = prepared(model, LAYERS, method, share, P5_STEPS, seed, **options)
    rate = BASE["P5"] * (chosen("P5", method) if factor is None else factor)
    seconds = train(model, learner, rate, P5_STEPS, images(seed), F.cross_entropy, decay=0.0)
    moved = None if learner is None else learner.moved()
    if learner is not None:
        learner.harden()
    dense = 784 * HIDDEN + HIDDEN**2
    return {
        "test": accuracy(model, "test"),
        "validation": accuracy(model, "validation"),
        "share": deployed(model, LAYERS) / dense,
        "per_layer": [deployed(model, [n]) for n in LAYERS],
        "rate": rate,
        "moved": moved,
        "training_seconds": seconds,
    }


def trained(seed: int) -> nn.Sequential:
    """The dense perceptron, trained at its best rate."""
    torch.manual_seed(seed)
    model = perceptron(HIDDEN)
    rate = BASE["P5"] * chosen("P5", "dense")
    name = f"perceptron_{P5_STEPS}_{rate:.2g}_{seed}"
    kept(name, model, lambda: train(model, None, rate, P5_STEPS, images(seed), F.cross_entropy))
    return model


def run_compressed(method: str, share: float, seed: int) -> dict[str, Any]:
    """The trained dense perceptron, its layers projected; before and after an epoch of recovery on labels."""
    model = trained(seed)
    original = accuracy(model, "test")
    steps = P5_STEPS // 5
    learner = project(model, LAYERS, method, share, steps, seed)
    before = accuracy(model, "test")
    train(model, learner, BASE["P5"] / 3, steps, images(seed + 50), F.cross_entropy)
    if learner is not None:
        learner.harden()
    dense = 784 * HIDDEN + HIDDEN**2
    return {
        "original": original,
        "before": before,
        "after": accuracy(model, "test"),
        "share": deployed(model, LAYERS) / dense,
    }
