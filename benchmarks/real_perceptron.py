"""The perceptron on MNIST, as a study's model."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.real_data import DATA, Draws, RealModel


@cache
def _mnist() -> dict[str, Tensor]:
    data = np.load(DATA / "mnist" / "mnist.npz")
    images = {k: torch.from_numpy(data[k]).reshape(-1, 784).float() / 255 for k in ("x_train", "x_test")}
    return images | {k: torch.from_numpy(data[k]).long() for k in ("y_train", "y_test")}


_MNIST_HELD_OUT = 5000


def _narrow(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)).eval()


def _load_perceptron() -> nn.Module:
    from safetensors.torch import load_file

    state = load_file(DATA / "mnist-mlp" / "model.safetensors")
    model = _narrow(500)
    names = {"0": "fc1", "2": "fc2"}
    model.load_state_dict(
        {f"{i}.{kind}": state[f"{n}.{kind}"] for i, n in names.items() for kind in ("weight", "bias")}
    )
    return model.eval()


def _trained_on() -> tuple[Tensor, Tensor]:
    return _mnist()["x_train"][:-_MNIST_HELD_OUT], _mnist()["y_train"][:-_MNIST_HELD_OUT]


def _mnist_calibration(seed: int, images: int = 4096, size: int = 512) -> list[tuple[Tensor, Tensor]]:
    x, y = _trained_on()
    order = torch.from_numpy(np.random.default_rng([seed, 1]).choice(len(x), images, replace=False))
    return [(x[part], y[part]) for part in order.split(size)]


def _mnist_training(seed: int) -> Draws:
    x, y = _trained_on()

    def draw(random: np.random.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(random.integers(0, len(x), 256))
        return x[chosen], y[chosen]

    return Draws(draw, seed + 1000, 1_000_000)


def _mnist_held_out() -> list[tuple[Tensor, Tensor]]:
    parts = (_mnist()[name][-_MNIST_HELD_OUT:].split(1000) for name in ("x_train", "y_train"))
    return list(zip(*parts, strict=True))


@torch.no_grad()
def _accuracy(model: nn.Module) -> float:
    data = _mnist()
    return 100.0 * float((model(data["x_test"]).argmax(-1) == data["y_test"]).float().mean())


PERCEPTRON = RealModel(
    name="mnist-mlp",
    load=_load_perceptron,
    calibration=_mnist_calibration,
    training=_mnist_training,
    held_out=_mnist_held_out,
    evaluate=_accuracy,
    metric="test accuracy, %",
    lower_is_better=False,
    sample=lambda size: _mnist()["x_train"][:size],
    batches=(1, 64),
    rows=1,
    minutes=1.0,
    narrow=_narrow,
    width=500,
)
