"""Data of the studies of convolutional arithmetic circuits: MNIST, missing pixels, and blobs.

MNIST is found through ``STRUCTMAT_DATA``, as for the other studies. The blobs are generated: images of pooling geometry
(Cohen and Shashua, ICLR 2017, section 5), with two labels each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.real_models import DATA, require_data

SIDE = 28
PROBABILITIES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
RECTANGLES = tuple((count, width) for count in (1, 2, 3) for width in (7, 11, 15))


@dataclass(frozen=True)
class Images:
    """Images (count, 1, 28, 28) in -0.5..0.5, and labels."""

    x: Tensor
    y: Tensor

    def batches(self, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled anew in each epoch; incomplete batches are left out."""
        generator, done = torch.Generator().manual_seed(seed), 0
        while done < steps:
            order = torch.randperm(len(self.x), generator=generator)
            for chosen in order.split(size):
                if len(chosen) < size or done == steps:
                    break
                yield self.x[chosen], self.y[chosen]
                done += 1


@cache
def mnist(split: str) -> Images:
    """``"train"`` (60,000) or ``"test"`` (10,000)."""
    require_data()
    with np.load(DATA / "mnist" / "mnist.npz") as stored:
        x, y = stored[f"x_{split}"], stored[f"y_{split}"]
    return Images(torch.from_numpy(x).float().reshape(-1, 1, SIDE, SIDE) / 255 - 0.5, torch.from_numpy(y).long())


def observed_pixels(count: int, probability: float, seed: int) -> Tensor:
    """(count, 1, 28, 28), True where a pixel is seen: each is missing with that probability."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.rand(count, 1, SIDE, SIDE, generator=generator) >= probability


def observed_rectangles(count: int, rectangles: int, width: int, seed: int) -> Tensor:
    """(count, 1, 28, 28): squares of that width are missing, uniformly placed, possibly one over the other."""
    generator = torch.Generator().manual_seed(2000 + seed)
    corners = torch.randint(0, SIDE - width + 1, (count, rectangles, 2), generator=generator)
    places = torch.arange(SIDE)
    inside = (places >= corners[..., None]) & (places < corners[..., None] + width)
    return ~(inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).any(1, keepdim=True)


def masks(count: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """All masks of the protocol of missing data, by name."""
    for probability in PROBABILITIES:
        yield f"p={probability:g}", observed_pixels(count, probability, seed)
    for rectangles, width in RECTANGLES:
        yield f"{rectangles} of {width}", observed_rectangles(count, rectangles, width, seed)


# ----------------------------------------------------------------------------------------------------------- blobs

BLOB = 32
TASKS = ("closedness", "symmetry")


@dataclass(frozen=True)
class Blobs:
    """Binary images (count, 32, 32), and the score of each task."""

    images: NDArray[np.uint8]
    scores: dict[str, NDArray[np.float64]]

    def labelled(self, task: str) -> tuple[Tensor, Tensor]:
        """Symbols (count, 1024) and labels: the top 40 % of the scores against the bottom 40 %."""
        score = self.scores[task]
        order = np.argsort(score, kind="stable")
        fifth2 = int(0.4 * len(score))
        chosen = np.concatenate([order[:fifth2], order[-fifth2:]])
        labels = torch.cat([torch.zeros(fifth2, dtype=torch.long), torch.ones(fifth2, dtype=torch.long)])
        return torch.from_numpy(1 - self.images[chosen].reshape(len(chosen), -1).astype(np.int64)), labels


@cache
def blobs(count: int, seed: int) -> Blobs:
    """That many blobs."""
    from scipy.ndimage import binary_closing

    rng = np.random.default_rng(seed)
    images, closed, symmetric = list[NDArray[np.uint8]](), list[float](), list[float]()
    while len(images) < count:
        image, region = _blob(rng)
        tile = image[region]
        if not image.any():
            continue
        closing = binary_closing(np.pad(image, 1))[1:-1, 1:-1]
        closed.append(float(image.sum() / max(1, (closing | image).sum())))
        symmetric.append(float((tile & tile[:, ::-1]).sum() / tile.sum()))
        images.append(image.astype(np.uint8))
    return Blobs(np.stack(images), {"closedness": np.array(closed), "symmetry": np.array(symmetric)})


def _blob(rng: np.random.Generator) -> tuple[NDArray[np.bool_], tuple[slice, slice]]:
    """A bent ellipse, rotated, put into a tile, with pixels dropped out; and the tile."""
    from scipy.ndimage import rotate, zoom

    half_height = int(2 ** rng.uniform(3.5, 5)) / 2
    rows, columns = np.mgrid[:BLOB, :BLOB] - (BLOB - 1) / 2
    ellipse = (columns / (BLOB / 2)) ** 2 + (rows / half_height) ** 2 <= 1
    amplitude, frequency = rng.uniform(0, 4), rng.uniform(0, 3 * 2 * np.pi / BLOB)
    shifts = (amplitude * np.sin(frequency * np.arange(BLOB))).astype(int)
    bent = np.stack([np.roll(ellipse[:, j], shifts[j]) for j in range(BLOB)], 1)
    turned = rotate(bent.astype(float), rng.uniform(0, 180), reshape=False)
    size = int(rng.choice([16, 32]))
    small = zoom(turned, size / BLOB, order=1)
    drop = rng.random((size, size)) < rng.uniform(0.1, 0.33)
    if rng.random() < 0.5:
        drop[:, size // 2 :] = drop[:, : size // 2][:, ::-1]
    tile = (small > 0.1) & ~drop
    top, left = (int(rng.integers(BLOB // size)) * size for _ in range(2))
    image = np.zeros((BLOB, BLOB), dtype=bool)
    region = (slice(top, top + size), slice(left, left + size))
    image[region] = tile
    return image, region
