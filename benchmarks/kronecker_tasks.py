"""Tasks of the study of Kronecker networks: what is learned, how, and what that takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import kronecker_data as data
from benchmarks.kronecker_models import METHODS, Method, WithTrunk, build
from benchmarks.kronecker_speed import best_time
from benchmarks.study import track


@dataclass(frozen=True)
class Task:
    """What is learned, and how.

    Args:
        name: of the cells.
        about: the caption of its table.
        load: training and test data.
        sizes: arrays of the input of the network (or of its head), hidden layers and output.
        activation: everywhere.
        epochs, batch: of training.
        rates: that are swept.
        rate: where the sweep was not run.
        adam: with a cosine schedule; otherwise plain gradient descent at a constant rate, as published.
        published: start of the paper.
        labels: cross-entropy and test error in %; otherwise squares, and relative error in %.
        images: behind the published convolutions.
        long: takes hours.
    """

    name: str
    about: str
    load: data.Load
    sizes: tuple[tuple[int, int], ...]
    activation: Callable[[Tensor], Tensor]
    epochs: int
    batch: int
    rates: tuple[float, ...]
    rate: float
    adam: bool = True
    published: bool = False
    labels: bool = False
    images: bool = False
    long: bool = False

    @property
    def recipe(self) -> Task:
        """How the networks start and train, whatever the task is called and which rates it sweeps."""
        return replace(self, name="", about="", rates=(), rate=0.0)

    def model(self, method: Method, seed: int) -> nn.Module:
        """A fresh network."""
        head = build(method, self.sizes, self.activation, seed, self.published)
        return WithTrunk(head) if self.images else head

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """Adam, or plain gradient descent."""
        kind = torch.optim.Adam if self.adam else torch.optim.SGD
        return kind(model.parameters(), lr=rate, fused=True)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch, before one step on it."""
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output, y) if self.labels else F.mse_loss(output, y)
        loss.backward()
        optimizer.step()
        return loss

    def error(self, model: nn.Module, samples: data.Samples) -> float:
        """In %: wrong labels, or ``||f(x) - y|| / ||y||`` over all samples."""
        model.eval()
        with torch.no_grad():
            made = torch.cat([model(x) for x in samples.x.split(1000)])
        model.train()
        if self.labels:
            return 100 * float((made.argmax(1) != samples.y).float().mean())
        return 100 * float((made - samples.y).norm() / samples.y.norm())


ADAM = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TASKS = (
    Task("function", "A function of 64 numbers, 8,192 points, 40 epochs", data.function,
         ((8, 8), (32, 32), (32, 32), (1, 1)), torch.relu, 40, 128, ADAM, 3e-3),
    Task("darcy", "Darcy flow, 16 x 16 to 16 x 16, 1,000 fields, 200 epochs", data.darcy,
         ((16, 16), (32, 32), (32, 32), (16, 16)), torch.relu, 200, 128, ADAM, 3e-3),
    Task("burgers", "Burgers' equation, 16 numbers to 17 x 16, 800 trajectories, 200 epochs", data.burgers,
         ((4, 4), (32, 32), (32, 32), (17, 16)), torch.relu, 200, 128, ADAM, 3e-3),
    Task("mnist", "MNIST, the published recipe, 20 epochs", data.mnist,
         ((28, 28), (28, 28), (28, 28), (2, 5)), torch.tanh, 20, 128, (0.1,), 0.1,
         adam=False, published=True, labels=True),
    Task("mnist swept", "MNIST, the same with swept rates", data.mnist,
         ((28, 28), (28, 28), (28, 28), (2, 5)), torch.tanh, 20, 128, (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6), 0.1,
         adam=False, published=True, labels=True),
    Task("cifar10", "CIFAR-10, 10,000 images, the published recipe, 20 epochs", data.cifar10,
         ((64, 64), (64, 64), (64, 64), (2, 5)), torch.relu, 20, 128, (3e-4, 1e-3, 3e-3, 1e-2), 1e-3,
         published=True, labels=True, images=True, long=True),
)  # fmt: skip


def train(task: Task, model: nn.Module, samples: data.Samples, epochs: int, rate: float, seed: int) -> None:
    """All epochs, or fewer where the loss is no longer finite."""
    steps = epochs * math.ceil(len(samples) / task.batch)
    optimizer = task.optimizer(model, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if task.adam else None
    for x, y in track(samples.batches(epochs, task.batch, seed), steps, "train"):
        loss = task.step(model, optimizer, x, y)
        if schedule is not None:
            schedule.step()
        if not math.isfinite(float(loss.detach())):
            break


TIME_ROUNDS = 9


def times_cell(task: Task, seed: int) -> dict[str, Any]:
    """Seconds of a training step and of a call at batch 1 and 256: medians of rounds, methods in turn."""
    samples = task.load("train").part(0, 256)
    batch = samples.part(0, task.batch)
    models = {method.key: task.model(method, seed) for method in METHODS}
    optimizers = {key: task.optimizer(model, 1e-6) for key, model in models.items()}
    found: dict[str, dict[str, list[float]]] = {key: {"step": [], "1": [], "256": []} for key in models}
    for _ in track(range(TIME_ROUNDS), TIME_ROUNDS, f"time {task.name}"):
        for key, model in models.items():
            model.train()
            found[key]["step"].append(best_time(partial(task.step, model, optimizers[key], batch.x, batch.y), 1))
            model.eval()
            with torch.no_grad():
                for size in (1, 256):
                    found[key][str(size)].append(best_time(partial(model, samples.x[:size]), 3))
    return {
        "times": {key: {what: statistics.median(spans) for what, spans in of.items()} for key, of in found.items()},
        "steps": math.ceil(len(task.load("train")) / task.batch),
        "threads": torch.get_num_threads(),
    }
