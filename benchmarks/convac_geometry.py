"""Pooling geometry: square against mirror windows on two tasks of generated blobs, a shallow network beside them.

    python -m benchmarks.convac_geometry               a few hundred steps: that it works
    python -m benchmarks.convac_geometry --all         3,000 and 15,000 steps, all breadths (hours)
    python -m benchmarks.convac_geometry table

Closedness asks about neighbors, symmetry about reflections: each task suits the pooling that multiplies what belongs
together (Cohen and Shashua, ICLR 2017).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.convac_data import BLOB, TASKS, blobs
from benchmarks.study import NOT_RUN, Cell, Study, markdown, of_name, spread, track
from structmat.nn import ConvAC, ModeTree
from structmat.nn.convac import Log, OneHot, fit
from structmat.nn.convac.weights import Weights

BATCH = 64
TREES = ("square", "mirror", "shallow")
TRAIN, TEST = (10_000, 25_000), (2_500, 5_000)
"""Raw images of the short and the published schedule."""

SPECIFIED = {("closedness", "square"): 94.7, ("closedness", "mirror"): 70.2, ("symmetry", "square"): 81.8,
             ("symmetry", "mirror"): 91.9}  # fmt: skip
"""Breadth 16, 3,000 steps: single runs of an independent implementation."""

PUBLISHED = {("closedness", "shallow"): 62.0, ("symmetry", "shallow"): 77.0}
"""4,096 channels."""


def network(tree: str, breadth: int, seed: int) -> ConvAC:
    """Log space, positive weights with uniform logarithms, all filters shared."""
    generator = torch.Generator().manual_seed(seed)
    built = {"square": ModeTree.square, "mirror": ModeTree.mirror}.get(tree, ModeTree.square)(BLOB, BLOB)

    def uniform(weights: Weights) -> None:
        with torch.no_grad():
            weights.weight.copy_(2 * torch.rand(weights.weight.shape, generator=generator) - 1)

    return ConvAC(
        OneHot(2), built.truncated(1) if tree == "shallow" else built, breadth, 2, constraint="positive",
        semiring=Log(), initialize=uniform,
    )  # fmt: skip


def train_and_test(task: str, tree: str, breadth: int, steps: int, seed: int) -> dict[str, Any]:
    """Accuracies in per cent."""
    published = steps >= 15_000
    x, y = blobs(TRAIN[published], 0).labelled(task)
    tx, ty = blobs(TEST[published], 1).labelled(task)
    net = network(tree, breadth, seed)
    optimizer = Adam(net.parameters(), lr=3e-3, betas=(0.9, 0.9), eps=1e-16)
    schedule = LambdaLR(optimizer, lambda step: 1.0 if step < 0.8 * steps else 0.1)
    generator = torch.Generator().manual_seed(seed)

    def loss(chosen: Tensor) -> Tensor:
        return F.cross_entropy(net(x[chosen]), y[chosen])

    batches = (torch.randint(len(x), (BATCH,), generator=generator) for _ in range(steps))
    fit(net, loss, track(batches, steps, f"{task}, {tree}"), optimizer, schedule, clip=None)
    net.eval()
    with torch.no_grad():
        parts = zip(tx.split(250), ty.split(250), strict=True)
        right = sum(int((net(a).argmax(1) == b).sum()) for a, b in parts)
    return {"steps": steps, "accuracy": 100 * right / len(tx), "parameters": net.num_parameters}


def _cells() -> list[Cell]:
    found = []
    for steps, breadths in ((300, (16,)), (3000, (16,)), (15_000, (8, 16, 32, 64, 128))):
        for breadth in breadths:
            for task in TASKS:
                for tree in ("square", "mirror"):
                    run = lambda s, a=(task, tree, breadth, steps): train_and_test(*a, s)  # noqa: E731
                    name = f"{task}, {tree}, breadth {breadth}, {steps} steps"
                    found += [Cell(name, run, seed, extra=steps > 300 or seed > 0) for seed in range(3)]
    for task in TASKS:
        run = lambda s, task=task: train_and_test(task, "shallow", 256, 3000, s)  # noqa: E731
        found.append(Cell(f"{task}, shallow, breadth 256, 3000 steps", run, extra=True))
    return found


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    """One row for each breadth and number of steps, the trees side by side."""
    rows = []
    settings = dict.fromkeys(tuple(cell.name.split(", ")[2:]) for cell in CELLS)
    for breadth, steps in settings:
        cells = []
        for task in TASKS:
            for tree in TREES:
                found = of_name(done, CELLS, f"{task}, {tree}, {breadth}, {steps}")
                known = any(cell.name == f"{task}, {tree}, {breadth}, {steps}" for cell in CELLS)
                told = spread([f["accuracy"] for f in found], ".1f") if found else NOT_RUN if known else ""
                elsewhere = SPECIFIED.get((task, tree)) if (breadth, steps) == ("breadth 16", "3000 steps") else None
                cells.append(f"{told} ({elsewhere:g})" if elsewhere else told)
        rows.append((breadth.removeprefix("breadth "), steps.removesuffix(" steps"), *cells))
    published = [f"{PUBLISHED[task, tree]:g}" if (task, tree) in PUBLISHED else "" for task in TASKS for tree in TREES]
    rows.append(("*published, 4,096*", "", *published))
    head = ("breadth", "steps", *(f"{task}, {tree}" for task in TASKS for tree in TREES))
    note = "Test accuracy in per cent; in brackets single runs of an independent implementation."
    return [note, "", *markdown(head, rows)]


CELLS = _cells()
STUDY = Study("convac_geometry", "Pooling geometry on generated blobs", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
