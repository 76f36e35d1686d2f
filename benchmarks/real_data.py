"""What a study knows of a trained model: how it is loaded, what it is trained and judged on.

Files are found through ``STRUCTMAT_DATA`` (default ``../shared/data`` beside the repository). Test data is only ever
evaluated on: calibration, recovery and every choice use training data.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from structmat.compression.distill import Optimizer

DATA = Path(os.environ.get("STRUCTMAT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@dataclass(frozen=True)
class RealModel:
    """A trained model and what a study does with it.

    Args:
        name: of the study's cells.
        load: the original, on the CPU in float32 and evaluation mode.
        calibration: batches for second moments, by seed.
        training: batches for recovery, by seed: endless fresh draws from the training data.
        held_out: batches that recovery judges its states by, and that learning rates are chosen by.
        evaluate: quality on the test data.
        metric: its name and unit.
        lower_is_better: the direction of the metric.
        sample: a batch of so many samples, to be timed.
        batches: numbers of samples at which the model is timed.
        rows: of a layer's input, for each sample.
        minutes: of recovery, the same for every method.
        narrow: the same architecture with fresh weights, whose width is this number.
        width: of the original, in the same count.
        includes_fitting: whether the minutes are for compressing and recovery together.
        convolutional: whether it has convolutions.
        forward: ``forward(model, batch)``, where a batch is none of the usual.
        temperature: of the distillation; None for what recovery finds.
        normalise: whether batch normalisation learns its statistics in recovery.
        rates: the learning rates that every method is tried with.
        optimizer: of the recovery.
        thins: share of the recovery of our models in which their sparse layers choose their entries.
        own_loss: weight of the task's own loss beside the distance from the original.
        loss: ``loss(output, batch)``, where the batch's labels are none of the usual.
    """

    name: str
    load: Callable[[], nn.Module]
    calibration: Callable[[int], list[Any]]
    training: Callable[[int], Any]
    held_out: Callable[[], list[Any]]
    evaluate: Callable[[nn.Module], float]
    metric: str
    lower_is_better: bool
    sample: Callable[[int], Any]
    batches: tuple[int, ...]
    rows: int
    minutes: float
    narrow: Callable[[int], nn.Module]
    width: int
    includes_fitting: bool = False
    convolutional: bool = False
    forward: Callable[[nn.Module, Any], Any] | None = None
    temperature: float | None = None
    normalise: bool = False
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    optimizer: Optimizer = Optimizer.ADAM
    thins: float = 0.0
    own_loss: float = 0.0
    loss: Callable[[Any, Any], Tensor] | None = None


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


@dataclass(frozen=True)
class Passes:
    """Batches of one pass after another over all that there is, the same ones in the same order each time they are
    read."""

    one: Callable[[np.random.Generator], Iterator[Any]]
    seed: int
    count: int

    def __iter__(self) -> Iterator[Any]:
        random = np.random.default_rng(self.seed)
        return itertools.islice(itertools.chain.from_iterable(self.one(random) for _ in itertools.count()), self.count)

    def __len__(self) -> int:
        return self.count
