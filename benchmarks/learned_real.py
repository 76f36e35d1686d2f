"""Trained models of every day fine-tuned: windows that move, beside structures that stand, for the same time."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import structmat as sm
from benchmarks.real_models import MODELS, RealModel
from structmat.compression.recover import recover

REAL_BUDGETS = (0.5, 0.25)

RECOVERED = ("every family", "GBLR", "GBLR, windows moving")
"""``compress`` with all it has, with windows that stand where they were fitted, and with windows that move."""

MINUTES = {"mnist-mlp": 5, "novel-lm": 7}
"""Of recovery, for every method of a model."""

CLOCKED_STEPS = 12
"""Of recovery, whose median says how many fit."""

LOOKS = 8
"""At the held-out batches, which say which state is kept."""

RATE = 1e-3
"""Of the recovery, as ``compress`` has it by default."""


class Clocked:
    """Training batches that note when each was asked for."""

    def __init__(self, real: RealModel, seed: int) -> None:
        self.real, self.seed = real, seed
        self.times: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in self.real.training(self.seed):
            self.times.append(time.perf_counter())
            yield batch


@functools.cache
def _quality_before(model: str) -> float:
    """Of the trained model itself."""
    return MODELS[model].evaluate(MODELS[model].load())


def run_real(model: str, method: str, share: float, seed: int) -> dict[str, Any]:
    """``compress`` at a share of the parameters; before and after recovery of :data:`MINUTES`."""
    real = MODELS[model]
    original = real.load()
    structures = None if method == "every family" else ["GBLR"]
    compress = functools.partial(
        sm.compress,
        budget=sm.Parameters(share),
        calibration=real.calibration(seed),
        structures=structures,
        seed=seed,
    )
    moving = method == "GBLR, windows moving"
    settings = functools.partial(sm.Distill, learning_rate=RATE, windows=moving)
    compressed = compress(original)
    clocked = Clocked(real, seed)
    warm = 4
    trial = settings(steps=warm + CLOCKED_STEPS, data=clocked)
    recover(copy.deepcopy(compressed.model), original, (), trial, seed=seed, show=False)
    seconds = statistics.median(b - a for a, b in itertools.pairwise(clocked.times[warm:]))
    steps = max(1, round(60 * MINUTES[model] / seconds))
    before = real.evaluate(compressed.model)
    every = max(1, steps // LOOKS)
    whole = settings(steps=steps, data=real.training(seed), held_out=real.held_out(), check_every=every)
    recover(compressed.model, original, (), whole, seed=seed)
    parameters = compressed.report.parameters
    return {
        "original": _quality_before(model),
        "before": before,
        "after": real.evaluate(compressed.model),
        "share": parameters.after / parameters.before,
        "steps": steps,
        "seconds_a_step": seconds,
    }
