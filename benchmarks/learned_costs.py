"""What learned windows cost: a step of training, and a product once they are hardened."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from structmat.benchmark import in_turns
from structmat.learn.windows import WindowLearner
from structmat.nn import StructuredLinear
from structmat.projection.windows import Terms
from structmat.windows import from_terms

SECONDS = 1.0
"""Of each timing."""


def medians(runs: dict[str, Callable[[], object]], seconds: float = SECONDS) -> dict[str, float]:
    """Median seconds of each, all run in turns."""
    return {name: statistics.median(found) for name, found in in_turns(runs, seconds)[1].items()}


def run_step_cost(seed: int) -> dict[str, Any]:
    """A step of training at n = 1024, batch 256, n / 2 terms: full windows, then at shares of the dense cost."""
    torch.manual_seed(seed)
    n, rows = 1024, 256
    x = torch.randn(rows, n)

    def step_of(model: nn.Module, learner: WindowLearner | None) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

        def step() -> None:
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if learner is not None:
                learner.step()

        step.optimizer = optimizer  # type: ignore[attr-defined]
        return step

    def numbers(model: nn.Module, step: Any) -> int:
        """Numbers kept between steps: parameters, gradients and the optimizer's moments."""
        held = sum(p.numel() * 2 for p in model.parameters())
        return held + sum(t.numel() for s in step.optimizer.state.values() for t in s.values())

    dense = nn.Sequential(nn.Linear(n, n))
    steps = {"dense": step_of(dense, None)}
    models = {"dense": dense}
    for share in (1.0, 0.5, 0.25, 0.125):
        name = f"windows at {share:g}"
        model = models[name] = nn.Sequential(nn.Linear(n, n))
        learner = WindowLearner(model, 1.0, 10**6, terms=0.5, snapshots=0, rate=1e-9)
        layer = learner.layers["0"]
        step = steps[name] = step_of(model, learner)
        step()
        with torch.no_grad():
            layer.widths.fill_(share)
        if share < 1:
            layer.compact(16, step.optimizer)  # type: ignore[attr-defined]
            learner._squares["0"] = torch.zeros(4, layer.terms)
        learner.step_count = 10**6 - 10**5  # the blur of the end of training
        learner._sharpen()
    times = medians(steps, 4 * SECONDS)
    return {
        "steps": {
            name: {"milliseconds": 1e3 * times[name], "numbers": numbers(models[name], step)}
            for name, step in steps.items()
        }
    }


def run_speed(width: int, seed: int, n: int = 1024) -> dict[str, Any]:
    """Hardened windows of that mean width, frozen for each batch size, against the dense layer."""
    g = torch.Generator().manual_seed(seed)
    terms = n // 4 if width >= 128 else n // 2
    sizes = torch.randint(width // 2, width + width // 2 + 1, (terms, 2), generator=g)
    places = torch.randint(0, n, (terms, 2), generator=g)
    windows = torch.stack([places[:, 0], sizes[:, 0], places[:, 1], sizes[:, 1]], 1)
    contents = torch.randn(2, terms, n, generator=g)
    layer = StructuredLinear.from_matrix(from_terms(Terms(contents[0], contents[1], windows).cropped()))
    dense = layer.to_linear()
    share = layer.matrix.macs / n**2
    stored = layer.matrix.num_parameters + 4 * terms
    one, small = torch.randn(1, 64, generator=g), torch.randn(64, 64, generator=g)
    found = {}
    for rows in (1, 64, 1024):
        frozen = layer.freeze(rows)
        x = torch.randn(rows, n, generator=g)
        moved = torch.empty((rows * 2 * n + stored) // 2)  # what is copied is read and written
        with torch.inference_mode():
            times = medians(
                {
                    "dense": functools.partial(dense, x),
                    "structured": functools.partial(frozen, x),
                    "memory": moved.clone,
                    "call": functools.partial(nn.functional.linear, one, small),
                }
            )
        floor = max(times["memory"], share * times["dense"]) + times["call"]
        found[str(rows)] = {name: 1e6 * value for name, value in times.items()} | {
            "ratio": times["structured"] / times["dense"],
            "efficiency": floor / times["structured"],
        }
    return {"share": share, "mean_width": float(sizes.double().mean()), "microseconds": found}
