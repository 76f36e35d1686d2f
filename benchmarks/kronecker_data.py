"""Data of the study of Kronecker networks: MNIST, CIFAR-10, a function, two sets of partial differential equations.

Files are found through ``STRUCTMAT_DATA``, as for the other studies. The last part of the training data is set apart:
learning rates are chosen on it, never on test data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.real_models import DATA, require_data

HELD_OUT = 6
"""One part in so many of the training data is for choosing rates."""


@dataclass(frozen=True)
class Samples:
    """Inputs (count, ...) and targets: labels (count,), or values (count, outputs)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def part(self, start: int, stop: int) -> Samples:
        """Some of them."""
        return Samples(self.x[start:stop], self.y[start:stop])

    def split(self) -> tuple[Samples, Samples]:
        """What to train on and what to choose rates on."""
        kept = len(self) - len(self) // HELD_OUT
        return self.part(0, kept), self.part(kept, len(self))

    def batches(self, epochs: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled anew in each epoch; the last batch of one may be smaller."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for chosen in torch.randperm(len(self), generator=generator).split(size):
                yield self.x[chosen], self.y[chosen]


@cache
def mnist(split: str) -> Samples:
    """``"train"`` (60,000) or ``"test"`` (10,000): pixels / 255 (count, 784)."""
    require_data()
    with np.load(DATA / "mnist" / "mnist.npz") as stored:
        x, y = stored[f"x_{split}"], stored[f"y_{split}"]
    return Samples(torch.from_numpy(x).float().reshape(-1, 784) / 255, torch.from_numpy(y).long())


SUBSET = 10_000
"""Training images of CIFAR-10 that the study of Kronecker networks uses."""


@cache
def cifar10(split: str, images: int = SUBSET) -> Samples:
    """The first training images (JPEG) or all test images (lossless): pixels / 255 (count, 3, 32, 32)."""
    from PIL import Image

    require_data()
    folder = DATA / "cifar10"
    sheet = np.asarray(Image.open(folder / ("train.jpg" if split == "train" else "test.webp")).convert("RGB"))
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    tiles = sheet.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    with np.load(folder / "labels.npz") as stored:
        y = stored[f"y_{split}"]
    count = images if split == "train" else len(tiles)
    return Samples(torch.from_numpy(tiles[:count].copy()).float() / 255, torch.from_numpy(y[:count]).long())


@cache
def function(split: str) -> Samples:
    """``sin(sum x_i / 2) + (1.5 / 8) sum x_i x_(i+1)`` of 64 numbers in [-1, 1], standardized; 8,192 and 4,096
    points."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(8192 + 4096, 64, generator=generator) * 2 - 1
    values = torch.sin(points.sum(1) / 2) + 1.5 / 8 * (points[:, 1:] * points[:, :-1]).sum(1)
    values = ((values - values[:8192].mean()) / values[:8192].std())[:, None]
    everything = Samples(points, values)
    return everything.part(0, 8192) if split == "train" else everything.part(8192, len(everything))


def _standardized(
    x: NDArray[np.float32], y: NDArray[np.float32], of: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> Samples:
    """By mean and spread of the training data, one number each: relative errors stay what they are."""
    a, b = of
    x, y = (x - a.mean()) / a.std(), y / b.std()
    return Samples(torch.from_numpy(x).float().flatten(1), torch.from_numpy(y).float().flatten(1))


@cache
def darcy(split: str) -> Samples:
    """Permeability to pressure, 16 x 16 each: 1,000 and 50 fields."""
    require_data()
    with np.load(DATA / "pde" / "darcy.npz") as stored:
        x, y = (stored[f"{n}_train16"].astype(np.float32) for n in "xy")
        a, b = (stored[f"{n}_{split}16"].astype(np.float32) for n in "xy")
    return _standardized(a, b, (x, y))


@cache
def burgers(split: str) -> Samples:
    """An initial state of 16 numbers to the states at 17 times: 800 and 400 trajectories."""
    require_data()
    with np.load(DATA / "pde" / "burgers.npz") as stored:
        x, y = (stored[f"{n}_train"].astype(np.float32) for n in "xy")
        a, b = (stored[f"{n}_{split}"].astype(np.float32) for n in "xy")
    return _standardized(a, b, (x, y))


Load = Callable[[str], Samples]
