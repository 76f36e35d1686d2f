"""ResNet-20 and ResNet-56 on CIFAR-10, as a study's models.

Calibration and judging use the lossless training images, training the whole training set, which is stored with a little
loss: the distillation asks what the original says of an image, not what it shows.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real_data import DATA, Draws, RealModel
from benchmarks.real_nets import ResNet, normalised, resnet, tiles

BATCH = 128

HELD_OUT = 500
"""The last of the 2,000 lossless training images, which nothing else reads."""

Labelled = tuple[Tensor, Tensor]


@cache
def _labels() -> dict[str, Tensor]:
    data = np.load(DATA / "cifar10" / "labels.npz")
    return {name: torch.from_numpy(data[name]).long() for name in ("y_train", "y_test", "y_calib", "calib_index")}


@cache
def _lossless() -> Labelled:
    return tiles(DATA / "cifar10" / "calib.webp"), _labels()["y_calib"]


@cache
def _trained_on() -> Labelled:
    """The training set without the images that judge."""
    pixels, labels = tiles(DATA / "cifar10" / "train.jpg"), _labels()["y_train"]
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[_labels()["calib_index"][-HELD_OUT:]] = False
    return pixels[keep], labels[keep]


def _calibration(seed: int, images: int = 1024, size: int = 64) -> list[Labelled]:
    x, y = _lossless()
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(x) - HELD_OUT)[:images])
    return [(normalised(x[part]), y[part]) for part in order.split(size)]


def _training(seed: int) -> Draws:
    """Shifted by up to 4 places and mirrored, as the originals were trained: what comes in at the edges is black, not
    the mean. The first layers answer to that edge; with another one even the original's own batch statistics, estimated
    again, cost it three points. Their channels lie last in memory: a step takes a sixth less then."""
    x, y = _trained_on()

    def draw(random: np.random.Generator) -> Labelled:
        chosen = torch.from_numpy(random.integers(0, len(x), BATCH))
        images = F.pad(x[chosen], (4, 4, 4, 4))
        down, right = (torch.from_numpy(random.integers(0, 9, BATCH)) for _ in range(2))
        mirrored = torch.from_numpy(random.integers(0, 2, BATCH)).bool()
        places = torch.arange(32)
        columns = torch.where(mirrored[:, None], 31 - places, places) + right[:, None]
        lines = places + down[:, None]
        which = torch.arange(BATCH)[:, None, None]
        cut = images.permute(0, 2, 3, 1)[which, lines[:, :, None], columns[:, None, :]]
        return normalised(cut.permute(0, 3, 1, 2)), y[chosen]

    return Draws(draw, seed + 1000, 1_000_000)


def _held_out() -> list[Labelled]:
    x, y = (part[-HELD_OUT:] for part in _lossless())
    return [(normalised(images), labels) for images, labels in zip(x.split(125), y.split(125), strict=True)]


@cache
def _test() -> Labelled:
    return tiles(DATA / "cifar10" / "test.webp"), _labels()["y_test"]


@torch.no_grad()
def _accuracy(model: nn.Module) -> float:
    x, y = _test()
    right = sum(
        int((model(normalised(images)).argmax(-1) == labels).sum())
        for images, labels in zip(x.split(250), y.split(250), strict=True)
    )
    return 100.0 * right / len(y)


def _model(count: int) -> RealModel:
    return RealModel(
        name=f"resnet-{6 * count + 2}",
        load=lambda: resnet(DATA, count),
        calibration=_calibration,
        training=_training,
        held_out=_held_out,
        evaluate=_accuracy,
        metric="test accuracy, %",
        lower_is_better=False,
        sample=lambda size: normalised(_lossless()[0][:size]),
        batches=(1, 64),
        rows=1024,
        minutes=5.0,
        narrow=lambda width: ResNet(count, width).eval(),
        width=16,
        convolutional=True,
        temperature=4.0,
        normalise=True,
    )


RESNET_20, RESNET_56 = _model(3), _model(9)
