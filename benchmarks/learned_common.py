"""What the cells of the study of learned windows share: methods, training, the choice of a rate."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import structmat as sm
from benchmarks.files import RESULTS, ROOT
from benchmarks.study import Cell
from structmat.errors import ShapeError
from structmat.learn.windows import WindowLearner
from structmat.nn import StructuredLinear, WindowedLinear
from structmat.structure import Structure, resolve

FOLDER = "learned_study"
"""Of the figures of the cells."""

BUDGETS = (0.5, 0.3, 0.2)
SWEPT = 0.3
FACTORS = (1 / 3, 1.0, 3.0)
SEEDS = range(3)
BASE = {"P2": 1e-2, "P3": 3e-3, "P4": 1e-3, "P5": 1e-3}

FIXED: Mapping[str, Callable[[float], Structure]] = {
    "low rank": sm.LowRank,
    "block diagonal + shuffle": lambda share: sm.BlockDiagonal(math.ceil(1 / share - 1e-9)),
    "Monarch": lambda share: sm.Monarch(4, share),
    "BLAST": lambda share: sm.BLAST(4, share),
    "block tensor train": sm.BlockTensorTrain,
}
LEARNED: Mapping[str, dict[str, Any]] = {
    "GBLR frozen": {"frozen": True, "start": "random"},
    "GBLR equal": {"start": "random", "spread": 1.0},
    "GBLR learned": {"start": "random"},
    "GBLR learned, published start": {"start": "weights", "spread": 1.0},
}
"""Windows from scratch. The published start, the split of a dense initialisation under full windows, is one more."""

METHODS = ("dense", "dense-small", *FIXED, *LEARNED)

PROJECTED = (*(name for name in FIXED if name != "block diagonal + shuffle"), "GBLR", "GBLR, windows moving")
"""What a trained model is compressed to."""


class Shuffled(nn.Module):
    """A structured layer whose outputs are interleaved, so that blocks mix from layer to layer."""

    def __init__(self, layer: StructuredLinear, blocks: int) -> None:
        super().__init__()
        self.layer = layer
        size = -(-layer.out_features // blocks)
        order = torch.arange(size * blocks).reshape(blocks, size).T.flatten()
        self.register_buffer("order", order[order < layer.out_features])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[..., self.order]


def structured(shape: tuple[int, int], method: str, share: float) -> Structure:
    """The largest member within the share; the smallest of its family where none is."""
    try:
        return resolve(FIXED[method](share), shape)
    except ShapeError:
        family = type(FIXED[method](share))
        return resolve(family(rank=1), shape)  # type: ignore[call-arg]


def prepared(
    model: nn.Module, names: list[str], method: str, share: float, steps: int, seed: int, **options: Any
) -> WindowLearner | None:
    """Give the named layers the method's structure, in place."""
    if method in ("dense", "dense-small"):
        return None
    if method in LEARNED:
        return WindowLearner(model, share, steps, layers=names, seed=seed, **{**LEARNED[method], **options})
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        structure = structured((linear.out_features, linear.in_features), method, share)
        made: nn.Module = StructuredLinear(
            linear.in_features, linear.out_features, linear.bias is not None, structure=structure, generator=generator
        )
        if isinstance(structure, sm.BlockDiagonal) and isinstance(made, StructuredLinear):
            made = Shuffled(made, structure.blocks)
        put(model, name, made)
    return None


def deployed(model: nn.Module, names: list[str]) -> int:
    """Multiply-adds of the named layers for one row."""
    total = 0
    for name in names:
        layer = model.get_submodule(name)
        layer = layer.layer if isinstance(layer, Shuffled) else layer
        if isinstance(layer, WindowedLinear):
            total += layer.cost
        elif isinstance(layer, StructuredLinear):
            total += layer.matrix.macs
        else:
            assert isinstance(layer, nn.Linear)
            total += layer.weight.numel()
    return total


def train(
    model: nn.Module,
    learner: WindowLearner | None,
    rate: float,
    steps: int,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    decay: float = 0.0,
    recorder: Callable[[int], None] | None = None,
) -> float:
    """AdamW, warm-up over 5 % of the steps, then a cosine; the seconds that it took."""
    optimizer = torch.optim.AdamW(sm.parameter_groups(model, lr=rate, weight_decay=decay))
    warm = max(1, steps // 20)

    def shape(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    start = time.perf_counter()
    model.train()
    for step in range(steps):
        x, y = batch(step)
        value = loss(model(x), y)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if learner is not None:
            learner.step()
        if recorder is not None:
            recorder(step)
    return time.perf_counter() - start


def chosen(task: str, method: str) -> float:
    """The factor of the base rate with the best validation score in the sweep; 1 where the sweep was not run."""
    found = {}
    for factor in FACTORS:
        path = RESULTS / FOLDER / f"{Cell(sweep_name(task, method, factor), _nothing).key}.json"
        if path.exists():
            found[factor] = json.loads(path.read_text(encoding="utf-8"))["validation"]
    return max(found, key=lambda f: found[f]) if found else 1.0


def _nothing(seed: int) -> dict[str, Any]:
    return {}


def kept(name: str, model: nn.Module, training: Callable[[], object]) -> None:
    """Give the model the weights of that name, after training it if there are none yet."""
    path = ROOT / "build" / FOLDER / f"{name}.safetensors"
    if path.exists():
        load_model(model, path)
        return
    training()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))


def project(
    model: nn.Module, names: list[str], method: str, share: float, steps: int, seed: int
) -> WindowLearner | None:
    """Give the named trained layers the nearest member of each, in place; or windows that start there and move."""
    if method == "GBLR, windows moving":
        return WindowLearner(
            model,
            share,
            steps,
            layers=names,
            start="projected",
            start_budget=share,
            rate=2e-3,
            spread=1.0,
            seed=seed,
            settle=0.1,
        )
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shape = (linear.out_features, linear.in_features)
        structure = sm.GBLR(share) if method == "GBLR" else structured(shape, method, share)
        put(model, name, StructuredLinear.from_linear(linear, structure, sweeps=8))
    return None


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a layer."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def sweep_name(task: str, method: str, factor: float) -> str:
    return f"{task} sweep {method} x{factor:.2g}"
