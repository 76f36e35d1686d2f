"""One hidden layer of each family at equal parameter counts, on images with noise, rotations and backgrounds.

    python -m benchmarks.hidden_layer                       seed 0, one rate
    python -m benchmarks.hidden_layer run --all             rates swept on held-out data, three seeds
    python -m benchmarks.hidden_layer run --only noise
    python -m benchmarks.hidden_layer table                 the tables again, from what is there

The network is that of Thomas et al. (NeurIPS 2018) and Dao et al. (ICML 2019): a square layer without bias, ReLU, and a
linear layer to ten classes. Families hold 8 n numbers, or what they have. Data: MNIST (under ``STRUCTMAT_DATA``) with
uniform noise behind the digits; MNIST digits turned by any angle before patches of natural images (grey CIFAR-10, of
the same split); CIFAR-10 in grey. 10,000 training images each. The published sets were made in the same way with other
random numbers and other photographs, so that accuracies compare in order, not in digits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import structmat as sm
from benchmarks.kronecker_data import Samples, cifar10, mnist
from benchmarks.study import NOT_RUN, Cell, Study, markdown, of_name, spread
from structmat.structure import Structure

TRAINED = 10_000
EPOCHS, BATCH, SEEDS = 15, 200, 3
RATES = (5e-4, 2e-3, 8e-3)
RATE = 2e-3
DATA = {
    "noise": "MNIST with noise behind the digits",
    "rotated": "MNIST turned, before natural images",
    "grey": "CIFAR-10 in grey",
}

METHODS: Mapping[str, Structure | None] = {
    "dense": None,
    "low rank": sm.LowRank(4),
    "circulant": sm.Circulant(),
    "Fastfood": sm.Fastfood(),
    "Toeplitz-like": sm.ToeplitzLike(4),
    "Hankel-like": sm.HankelLike(4),
    "Vandermonde-like": sm.VandermondeLike(3),
    "BLAST": sm.BLAST(4, 4),
    "ACDC": sm.ACDC(4),
    "butterfly": sm.Butterfly(),
    "kaleidoscope": sm.Kaleidoscope(),
    "LDR, subdiagonal": sm.LDRSubdiagonal(3),
    "LDR, tridiagonal": sm.LDRTridiagonal(1),
}

SLOW = ("LDR, subdiagonal", "LDR, tridiagonal")
"""Krylov matrices step by step: minutes a cell, so they come last."""

PUBLISHED: Mapping[str, tuple[str, str, str]] = {
    "dense": ("65.15; 68.75", "44.08", "46.03; 47.1"),
    "low rank": ("52.25; 50.9", "35.67", "32.28; 31.9"),
    "circulant": ("65.35", "34.46", "34.28"),
    "Fastfood": ("63.55", "38.13", "39.64"),
    "Toeplitz-like": ("75.75; 70.8", "42.67", "41.78; 41.9"),
    "Hankel-like": ("73.65; 71.5", "42.23", "41.40; 40.8"),
    "Vandermonde-like": ("59.80; 60.4 (r = 3)", "37.14", "33.93; 32.9 (r = 3)"),
    "kaleidoscope": ("75.00 (BPBP, tied)", "46.16", "48.69"),
    "LDR, subdiagonal": ("78.0 (r = 1)", "—", "43.1 (r = 1)"),
    "LDR, tridiagonal": ("78.45; 79.4", "45.81", "45.33; 45.6"),
}
"""Test accuracy in %: noise, rotated, grey. First of Dao et al., table of compression; after a semicolon the plots of
Thomas et al."""


@cache
def samples(name: str, split: str) -> Samples:
    """Pixels (count, n), standardized by the mean and deviation of the training pixels."""
    made = _pixels(name, split)
    own = made if split == "train" else _pixels(name, "train")
    return Samples((made.x - own.x.mean()) / own.x.std(), made.y)


@cache
def _pixels(name: str, split: str) -> Samples:
    generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    photographs = cifar10(split)
    grey = (photographs.x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    if name == "grey":
        return Samples(grey[:TRAINED].flatten(1), photographs.y[:TRAINED])
    digits = mnist(split).part(0, TRAINED)
    if name == "noise":
        behind = torch.rand(digits.x.shape, generator=generator)
        return Samples(torch.maximum(digits.x, behind), digits.y)
    assert name == "rotated", name
    count = len(digits)
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(count, 2, 2)
    grid = F.affine_grid(F.pad(turn, (0, 1)), [count, 1, 28, 28], align_corners=False)
    turned = F.grid_sample(digits.x.reshape(count, 1, 28, 28), grid, align_corners=False)[:, 0]
    which = torch.randint(len(grey), (count,), generator=generator)
    corner = torch.randint(5, (count, 2), generator=generator)
    place = torch.arange(28)
    rows, columns = corner[:, :1] + place, corner[:, 1:] + place
    behind = grey[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return Samples((turned + (1 - turned) * behind).flatten(1), digits.y)


def model(method: str, size: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    structure = METHODS[method]
    hidden: nn.Module = nn.Linear(size, size, bias=False)
    if structure is not None:
        generator = torch.Generator().manual_seed(seed)
        hidden = sm.nn.StructuredLinear(size, size, bias=False, structure=structure, generator=generator)
    return nn.Sequential(hidden, nn.ReLU(), nn.Linear(size, 10))


def trained(data: Samples, method: str, rate: float, seed: int, epochs: int) -> tuple[nn.Sequential, float]:
    """Adam with a cosine, the same for all; the network, and seconds a step."""
    network = model(method, data.x.shape[1], seed)
    optimizer = torch.optim.Adam(sm.parameter_groups(network, lr=rate, weight_decay=0.0))
    steps = epochs * math.ceil(len(data) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for x, y in data.batches(epochs, BATCH, seed):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        schedule.step()
    return network.eval(), (time.perf_counter() - start) / steps


def accuracy(network: nn.Module, data: Samples) -> float:
    with torch.no_grad():
        return 100 * float((torch.cat([network(x).argmax(1) for x in data.x.split(1000)]) == data.y).float().mean())


def rate_cell(data: str, method: str, rate: float, seed: int) -> dict[str, Any]:
    kept, held = samples(data, "train").split()
    network, _ = trained(kept, method, rate, seed, EPOCHS)
    return {"rate": rate, "accuracy": accuracy(network, held)}


def main_cell(data: str, method: str, seed: int) -> dict[str, Any]:
    swept = {
        rate: found["accuracy"]
        for rate in RATES
        for found in of_name(STUDY.done(), CELLS, _rate_name(data, method, rate))
    }
    rate = max(swept, key=lambda r: swept[r]) if len(swept) == len(RATES) else RATE
    train = samples(data, "train")
    network, step = trained(train, method, rate, seed, EPOCHS)
    return {
        "rate": rate,
        "swept": len(swept) == len(RATES),
        "accuracy": accuracy(network, samples(data, "test")),
        "training": accuracy(network, train),
        "hidden": sum(p.numel() for p in network[0].parameters()),
        "parameters": sum(p.numel() for p in network.parameters()),
        "milliseconds_a_step": 1000 * step,
    }


def _rate_name(data: str, method: str, rate: float) -> str:
    return f"rate {data} {method} {rate:g}"


def _cells() -> list[Cell]:
    ordered = sorted(METHODS, key=lambda m: m in SLOW)
    made = [
        Cell(_rate_name(data, method, rate), partial(rate_cell, data, method, rate), extra=True)
        for data in DATA
        for method in METHODS
        for rate in RATES
    ]
    return made + [
        Cell(f"{data} {method}", partial(main_cell, data, method), seed, extra=seed > 0)
        for seed in range(SEEDS)
        for slow in (False, True)
        for data in DATA
        for method in ordered
        if (method in SLOW) == slow
    ]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = [
        f"Adam, cosine, batch {BATCH}, {EPOCHS} epochs, the same for every method; of the rates "
        f"{', '.join(map(str, RATES))} the one that is best on held-out training data, or {RATE:g} where the sweep was "
        "not run. Test accuracy in %. *Published*: Dao et al.; after a semicolon Thomas et al."
    ]
    for column, (data, about) in enumerate(DATA.items()):
        rows, order = [], []
        for method in METHODS:
            found = of_name(done, CELLS, f"{data} {method}")
            published = PUBLISHED.get(method, ("—",) * 3)[column]
            if not found:
                rows.append((method, *[NOT_RUN] * 4, published))
                continue
            first = found[0]
            rows.append(
                (
                    method,
                    f"{first['hidden']:,}",
                    spread([f["accuracy"] for f in found], ".1f"),
                    spread([f["training"] for f in found], ".1f"),
                    f"{first['milliseconds_a_step']:.1f}",
                    published,
                )
            )
            order.append((sum(f["accuracy"] for f in found) / len(found), method))
        head = ("hidden layer", "its numbers", "test", "training", "ms a step", "published")
        lines += ["", f"## {about}", "", *markdown(head, rows)]
        if len(order) > 1:
            lines += ["", "Ordering found: " + " > ".join(method for _, method in sorted(order, reverse=True)) + "."]
    return lines


CELLS: Sequence[Cell] = _cells()
STUDY = Study("hidden_layer", "One hidden layer of each family", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
