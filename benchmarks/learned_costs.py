"""What learned windows cost: a step of training, and a product once they are hardened."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from structmat.learn.windows import WindowLearner
from structmat.nn import StructuredLinear
from structmat.projection.windows import Terms
from structmat.windows import from_terms


def best_time(run: Callable[[], object], seconds: float = 0.6) -> float:
    """The least of repeated times after one more."""
    run()
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


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
    step = step_of(dense, None)
    found: dict[str, Any] = {"dense": {"milliseconds": 1e3 * best_time(step), "numbers": numbers(dense, step)}}
    for share in (1.0, 0.5, 0.25, 0.125):
        model = nn.Sequential(nn.Linear(n, n))
        learner = WindowLearner(model, 1.0, 10**6, terms=0.5, snapshots=0, rate=1e-9)
        layer = learner.layers["0"]
        step = step_of(model, learner)
        step()
        with torch.no_grad():
            layer.widths.fill_(share)
        if share < 1:
            layer.compact(16, step.optimizer)  # type: ignore[attr-defined]
            learner._squares["0"] = torch.zeros(4, layer.terms)
        learner.step_count = 10**6 - 10**5  # the blur of the end of training
        learner._sharpen()
        found[f"windows at {share:g}"] = {
            "milliseconds": 1e3 * best_time(step),
            "numbers": numbers(model, step),
            "share": layer.cost / n**2,
        }
    return {"steps": found}


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
    found = {}
    for rows in (1, 64, 1024):
        frozen = layer.freeze(rows)
        x = torch.randn(rows, n, generator=g)
        with torch.inference_mode():
            first, second = best_time(functools.partial(dense, x)), best_time(functools.partial(frozen, x))
        found[str(rows)] = {
            "dense": 1e6 * first,
            "structured": 1e6 * second,
            "ratio": second / first,
            "efficiency": share * first / second,
        }
    return {"share": share, "mean_width": float(sizes.double().mean()), "microseconds": found}
