"""Conversion of a trained perceptron to Kronecker blocks: error before and after one epoch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import structmat as sm
from benchmarks import kronecker_data as data
from benchmarks.kronecker_models import counts
from benchmarks.kronecker_tasks import TASKS
from benchmarks.real_models import DATA, require_data
from benchmarks.study import track
from structmat.nn import KroneckerBlock
from structmat.nn.kronecker import absorb_, set_slopes

BUDGETS = (0.5, 0.25, 0.1)
CONVERSIONS = {
    "linear": "sums of Kronecker products, linear",
    "slopes": "the same, PReLU slope learned from 1",
    "annealed": "the same, slope annealed from 1 to 0",
    "shift": "ReLU, bias shift",
    "relu": "ReLU at once",
    "compress": "`compress`, all linear families",
    "blocks": "`compress`, low rank or blocks with slopes",
}


def perceptron() -> nn.Sequential:
    """The trained 784-500-10 network of the data folder."""
    require_data()
    stored = load_file(Path(DATA) / "mnist-mlp" / "model.safetensors")
    model = nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))
    model.load_state_dict({f"{2 * (i - 1)}.{n}": stored[f"fc{i}.{n}"] for i in (1, 2) for n in ("weight", "bias")})
    return model.eval()


def conversion_cell(kind: str, budget: float, seed: int) -> dict[str, Any]:
    """Error before training and after one epoch, every conversion with the same training."""
    original, train_set, test = perceptron(), data.mnist("train"), data.mnist("test")
    batches = list(train_set.x[:10_000].split(500))
    bound = None
    if kind in ("compress", "blocks"):
        choices = ["LowRank", "RectifiedKronecker"] if kind == "blocks" else None
        model: nn.Module = sm.compress(
            original, budget=sm.Parameters(budget), calibration=batches, structures=choices, seed=seed
        ).model
    else:
        found = sm.to_kronecker(
            original, calibration=batches, terms=budget, start=kind, exclude=["2"], seed=seed, sweeps=10
        )
        model, bound = found.model, found.bound
    task = next(t for t in TASKS if t.name == "mnist")
    before = task.error(model, test)
    logits = logit_error(original, model, test.x)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = math.ceil(len(train_set) / 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number, (x, y) in enumerate(track(train_set.batches(1, 128, seed), steps, "fine-tune")):
        if kind == "annealed":
            set_slopes(model, max(0.0, 1 - 2 * number / steps))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    kept = copy.deepcopy(model)
    return {
        "before": before,
        "after": task.error(model, test),
        "logit_error": logits,
        "bound": bound,
        "absorbed": list(absorb_(kept)),
        "slopes": [
            float(s.detach().mean()) for m in model.modules() if isinstance(m, KroneckerBlock) for s in m.slopes()
        ],
        **counts(model),
    }


def logit_error(original: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = original(x), model(x)
    return float((b - a).norm() / a.norm())
