"""Kronecker networks beside fully connected ones and our other families: error, size, operations, time.

    python -m benchmarks.kronecker_study                    seed 0: rates of every method, then every task
    python -m benchmarks.kronecker_study --all              five seeds, and the tasks that take hours
    python -m benchmarks.kronecker_study --all --seeds 1    seed 0 of every task
    python -m benchmarks.kronecker_study --only times       what a step and a call of each method take
    python -m benchmarks.kronecker_study --only mnist       cells whose key contains a word
    python -m benchmarks.kronecker_study table              the tables again, from what is there

Tasks: MNIST and CIFAR-10 as in the paper (its shapes, activations, optimizers and start), a function of 64 numbers, and
two sets of partial differential equations. Rates are swept for every method at seed 0 on a part of the training data,
in a quarter of the epochs; each cell then takes the best one of its method, or the task's own, marked so, where the
sweep was not run. Further cells: a training step beside plain PyTorch forms, and the conversion of a trained
perceptron.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import kronecker_data as data
from benchmarks.convac_study import NOT_RUN, RESULTS, Cell, Study, curve_svg, markdown, of_name, spread, track
from benchmarks.kronecker_models import METHODS, Method, WithTrunk, build, counts
from benchmarks.real_models import DATA, require_data
from structmat.nn import KroneckerBlock, KroneckerNetwork

SEEDS = 5


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

    def model(self, method: Method, seed: int) -> nn.Module:
        """A fresh network."""
        head = build(method, self.sizes, self.activation, seed, self.published)
        return WithTrunk(head) if self.images else head

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """Adam, or plain gradient descent."""
        return (torch.optim.Adam if self.adam else torch.optim.SGD)(model.parameters(), lr=rate)

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


ADAM = (3e-4, 1e-3, 3e-3, 1e-2)
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
         ((28, 28), (28, 28), (28, 28), (2, 5)), torch.tanh, 20, 128, (0.02, 0.05, 0.1, 0.2), 0.1,
         adam=False, published=True, labels=True),
    Task("cifar10", "CIFAR-10, 10,000 images, the published recipe, 20 epochs", data.cifar10,
         ((64, 64), (64, 64), (64, 64), (2, 5)), torch.relu, 20, 128, (3e-4, 1e-3, 3e-3), 1e-3,
         published=True, labels=True, images=True, long=True),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- training


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


def times_name(task: Task) -> str:
    return f"times {task.name}"


def best_time(call: Callable[[], Any], runs: int) -> float:
    """Seconds of the fastest of several calls, after two to warm up."""
    call(), call()
    best = math.inf
    for _ in range(runs):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def rate_cell(task: Task, method: Method, rate: float, seed: int) -> dict[str, Any]:
    """The error on held-out data after a quarter of the epochs."""
    kept, held = task.load("train").split()
    model = task.model(method, seed)
    train(task, model, kept, max(1, task.epochs // 4), rate, seed)
    return {"rate": rate, "error": task.error(model, held)}


def main_cell(task: Task, method: Method, seed: int) -> dict[str, Any]:
    """The error on test data, and what the network costs."""
    rate, swept = best_rate(task, method)
    samples, test = task.load("train"), task.load("test")
    model = task.model(method, seed)
    train(task, model, samples, task.epochs, rate, seed)
    return {
        "rate": rate,
        "swept": swept,
        "epochs": task.epochs,
        "error": task.error(model, test),
        "training_error": task.error(model, samples.part(0, 4096)),
        **counts(model),
    }


def rate_name(task: Task, method: Method, rate: float) -> str:
    return f"{task.name} rate {method.key} {rate:g}"


def main_name(task: Task, method: Method) -> str:
    return f"{task.name} {method.key}"


def best_rate(task: Task, method: Method) -> tuple[float, bool]:
    """The best rate of the sweep, and whether there was one; else the task's own."""
    if len(task.rates) == 1:
        return task.rate, True
    found = {}
    for rate in task.rates:
        cell = Cell(rate_name(task, method, rate), lambda seed: {}, 0)
        path = STUDY.path(cell)
        if path.exists():
            found[rate] = json.loads(path.read_text(encoding="utf-8"))["error"]
    if len(found) < len(task.rates):
        return task.rate, False
    return min(found, key=lambda r: found[r] if math.isfinite(found[r]) else math.inf), True


# ------------------------------------------------------------------------------------------------------------- speed


class Plain(nn.Module):
    """A Kronecker block of one order in plain PyTorch operations, left first: the best form, and that of the source.

    Args:
        block: whose parameters it has.
        form: "broadcast" multiplies matrices by batches and then has one product; "transposed" is that of the published
            code, which transposes twice; "einsum".
    """

    def __init__(self, block: KroneckerBlock, form: str) -> None:
        super().__init__()
        self.form, self.activated = form, block.outer is not None
        left, turned = (f.detach().clone() for f in block.factors())
        (m, n), (q, p) = block.shape.pairs
        self.sizes, self.terms = (m, n, p, q), block.shape.terms
        self.left, self.right = nn.Parameter(left), nn.Parameter(turned.mT.contiguous())
        self.inner = nn.Parameter(torch.zeros(self.terms, m, p))
        self.outer = nn.Parameter(torch.zeros(m, q))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to vectors."""
        m, n, p, q = self.sizes
        x = x.view(-1, n, p)
        if self.form == "einsum":
            z = torch.tanh(torch.einsum("tmn,bnp->btmp", self.left, x) + self.inner)
            y = torch.einsum("btmp,tpq->bmq", z, self.right) + self.outer
        elif self.form == "transposed":
            parts = []
            for t in range(self.terms):
                z = torch.tanh((x.transpose(1, 2) @ self.left[t].T).transpose(1, 2) + self.inner[t])
                parts.append(z @ self.right[t])
            y = torch.stack(parts).sum(0) + self.outer if self.terms > 1 else parts[0] + self.outer
        else:
            stacked = self.left.permute(1, 0, 2).reshape(m * self.terms, n)
            shift = self.inner.permute(1, 0, 2).reshape(m * self.terms, p)
            z = torch.tanh(stacked @ x + shift)
            y = z.view(-1, m, self.terms * p) @ self.right.reshape(self.terms * p, q) + self.outer
        return (torch.tanh(y) if self.activated else y).reshape(len(x), m * q)


SPEED_ROUNDS = 12

FORMS = ("ours", "ours, nothing recomputed", "broadcast", "transposed", "einsum", "fully connected")


def speed_cell(width: int, terms: int, batch: int, seed: int) -> dict[str, Any]:
    """Milliseconds of a training step of the published network, every form in turn, and peak numbers kept."""
    torch.manual_seed(seed)
    side = math.isqrt(width)
    sizes = [(side, side)] * 3 + [(2, 5)]
    forms: dict[str, nn.Module] = {
        "ours": KroneckerNetwork(sizes, terms, inner=torch.tanh, order="left"),
        "ours, nothing recomputed": KroneckerNetwork(sizes, terms, inner=torch.tanh, order="left", recompute=False),
        "fully connected": nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
        ),
    }
    network = forms["ours"]
    assert isinstance(network, KroneckerNetwork)
    for form in ("broadcast", "transposed", "einsum"):
        forms[form] = nn.Sequential(*(Plain(block, form) for block in network.layers()))
    x, y = torch.rand(batch, width), torch.randint(0, 10, (batch,))
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01) for name, model in forms.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        F.cross_entropy(forms[name](x), y).backward()
        optimizers[name].step()

    for block in network.layers():
        if block.fallback:
            print(f"not one native pass: {block.fallback}")
    best = dict.fromkeys(forms, math.inf)
    for _ in range(SPEED_ROUNDS):
        for name in forms:
            best[name] = min(best[name], best_time(partial(step, name), 5))
    return {
        "milliseconds": {name: 1000 * value for name, value in best.items()},
        "kept": {name: kept_numbers(model, x) for name, model in forms.items()},
        "threads": torch.get_num_threads(),
        "fallback": sorted({block.fallback for block in network.layers()} - {""}),
        "floor": 1000 * step_floor(network, y),
        "macs": network.counts.macs,
        "dense_macs": network.counts.dense_macs,
    }


def step_floor(network: nn.Module, y: Tensor) -> float:
    """Seconds of a step without the network: the loss of outputs at hand, its gradient, and gradient descent."""
    outputs = torch.rand(len(y), 10, requires_grad=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        F.cross_entropy(outputs, y).backward()
        optimizer.step()

    return best_time(step, 200)


def kept_numbers(model: nn.Module, x: Tensor) -> int:
    """Numbers that the graph of one forward pass keeps, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            seen[place] = max(seen.get(place, 0), tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(seen.values())


SPEEDS = [(784, 1, 128), (784, 1, 1024), (784, 2, 128), (784, 4, 128), (4096, 1, 128)]


def speed_name(width: int, terms: int, batch: int) -> str:
    return f"speed width {width} k={terms} batch {batch}"


# -------------------------------------------------------------------------------------------------------- conversion

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
    from safetensors.torch import load_file

    require_data()
    stored = load_file(Path(DATA) / "mnist-mlp" / "model.safetensors")
    model = nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))
    model.load_state_dict({f"{2 * (i - 1)}.{n}": stored[f"fc{i}.{n}"] for i in (1, 2) for n in ("weight", "bias")})
    return model.eval()


def conversion_cell(kind: str, budget: float, seed: int) -> dict[str, Any]:
    """Error before training and after one epoch, every conversion with the same training."""
    import structmat as sm
    from structmat.nn.kronecker import absorb_, set_slopes

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


def conversion_name(kind: str, budget: float) -> str:
    return f"convert {kind} {budget:g}"


# ------------------------------------------------------------------------------------------------------------- tables


def _cells() -> list[Cell]:
    made = [Cell(speed_name(*s), lambda seed, s=s: speed_cell(*s, seed), 0, extra=s[0] > 784) for s in SPEEDS]
    made += [
        Cell(
            conversion_name(kind, b), lambda seed, kind=kind, b=b: conversion_cell(kind, b, seed), seed, extra=seed > 0
        )
        for seed in range(SEEDS)
        for b in BUDGETS
        for kind in CONVERSIONS
    ]
    made += [Cell(times_name(task), lambda seed, t=task: times_cell(t, seed), 0, extra=task.long) for task in TASKS]
    for task in TASKS:
        made += [
            Cell(rate_name(task, m, r), lambda seed, t=task, m=m, r=r: rate_cell(t, m, r, seed), 0, extra=task.long)
            for m in METHODS
            for r in task.rates
            if len(task.rates) > 1
        ]
        made += [
            Cell(main_name(task, m), lambda seed, t=task, m=m: main_cell(t, m, seed), seed, extra=seed > 0 or task.long)
            for seed in range(SEEDS)
            for m in METHODS
        ]
    return made


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for task in TASKS:
        lines += ["", f"## {task.about}", "", *_task_table(task, done), *_picture(task, done)]
    lines += [
        "",
        "Seconds of the steps of an epoch and milliseconds of a call are medians, with all methods in turn.",
    ]
    return [
        *lines,
        "",
        "## Against the fully connected network",
        "",
        *_reduction_table(done),
        "",
        "## A training step",
        "",
        *_speed_table(done),
        "",
        "## Conversion",
        "",
        *_conversion_table(done),
    ]


def _task_table(task: Task, done: Mapping[str, dict[str, Any]]) -> list[str]:
    rows = []
    times = _times(task, done)
    for method in METHODS:
        found = of_name(done, CELLS, main_name(task, method))
        told = times.get(method.key, (NOT_RUN,) * 3)
        if not found:
            rows.append((method.key, *[NOT_RUN] * 5, *told))
            continue
        first = found[0]
        mark = "" if first["swept"] or len(task.rates) == 1 else " (not swept)"
        rows.append(
            (
                method.key,
                f"{first['weights']:,} + {first['biases']:,}",
                f"{first['macs']:,}",
                spread([f["error"] for f in found]),
                spread([f["training_error"] for f in found]),
                f"{first['rate']:g}{mark}",
                *told,
            )
        )
    measure = "wrong labels in %" if task.labels else "relative error in %"
    head = (
        "layers",
        "weights + biases",
        "multiply-adds",
        f"test: {measure}",
        "training",
        "rate",
        "s an epoch",
        "ms at 1",
        "ms at 256",
    )
    return markdown(head, rows)


def _times(task: Task, done: Mapping[str, dict[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """Seconds an epoch, milliseconds at batch 1 and 256, by method."""
    return {
        key: (f"{found['steps'] * of['step']:.2f}", f"{1000 * of['1']:.3f}", f"{1000 * of['256']:.2f}")
        for found in of_name(done, CELLS, times_name(task))
        for key, of in found["times"].items()
    }


def _picture(task: Task, done: Mapping[str, dict[str, Any]]) -> list[str]:
    """Error over parameters, every kind of layers a curve; nothing where only one size of each was run."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for method in METHODS:
        found = of_name(done, CELLS, main_name(task, method))
        if found:
            error = sum(f["error"] for f in found) / len(found)
            curves.setdefault(method.name, []).append((found[0]["parameters"], error))
    if max(map(len, curves.values()), default=0) < 2:
        return []
    name = f"kronecker_study_{task.name.replace(' ', '_')}.svg"
    (RESULTS / name).write_text(curve_svg(curves, "parameters", "error in %"), encoding="utf-8")
    return ["", f"![Error over parameters]({name})"]


def _reduction_table(done: Mapping[str, dict[str, Any]]) -> list[str]:
    """How much smaller a Kronecker network is than the fully connected one, and at what error."""
    rows = []
    for task in TASKS:
        dense = of_name(done, CELLS, main_name(task, Method("fully connected")))
        times = next((found["times"] for found in of_name(done, CELLS, times_name(task))), {})
        for method in METHODS:
            found = of_name(done, CELLS, main_name(task, method))
            if not method.name.startswith("Kronecker") or not found or not dense:
                continue
            one, other = found[0], dense[0]
            mean, least = (statistics.fmean([f["error"] for f in cells]) for cells in (found, dense))
            scatter = statistics.stdev([f["error"] for f in dense]) if len(dense) > 1 else None
            equal = "one seed" if scatter is None else "yes" if mean <= least + scatter else "no"
            rows.append(
                (
                    task.name,
                    method.key,
                    f"{other['parameters'] / one['parameters']:.0f}",
                    f"{other['macs'] / one['macs']:.1f}",
                    f"{times['fully connected']['step'] / times[method.key]['step']:.1f}" if times else NOT_RUN,
                    f"{mean:.2f} against {least:.2f}",
                    equal,
                )
            )
    note = (
        "How many times fewer parameters, multiply-adds and seconds of a step than the fully connected network of the "
        "same sizes, and test errors in %. *Equal*: not above its mean by more than its standard deviation over seeds."
    )
    head = ("task", "layers", "parameters", "multiply-adds", "time", "errors", "equal")
    return [note, "", *markdown(head, rows or [(NOT_RUN,) * len(head)])]


def _speed_table(done: Mapping[str, dict[str, Any]]) -> list[str]:
    rows = []
    results = [f for size in SPEEDS for f in of_name(done, CELLS, speed_name(*size))]
    reasons = sorted({reason for result in results for reason in result["fallback"]})
    fallback = f"fallen back: {', '.join(reasons)}" if reasons else "nothing fell back"
    for size in SPEEDS:
        found = of_name(done, CELLS, speed_name(*size))
        name = f"{size[0]} wide, k = {size[1]}, batch {size[2]}"
        if not found:
            rows.append((name, *[NOT_RUN] * (len(FORMS) + 4)))
            continue
        first = found[0]
        times = first["milliseconds"]
        plain = min(times[form] for form in ("broadcast", "transposed", "einsum"))
        ours = times["ours"]
        rows.append(
            (
                name,
                *(f"{times[form]:.2f}" for form in FORMS),
                f"{plain / ours:.2f}, {times['fully connected'] / ours:.2f}",
                f"{first['floor']:.2f}",
                f"{first['dense_macs'] / first['macs']:.1f}",
                f"{first['kept']['ours'] / first['kept']['broadcast']:.2f}",
            )
        )
    note = (
        "Milliseconds of a step (forward, backward, gradient descent), the best of 60, forms in turn. Ours is one "
        f"native pass in each direction ({fallback}); *faster*: ours than the best plain form, than the fully "
        "connected network; *floor*: loss and gradient descent alone; *kept*: numbers that the graph keeps, ours by "
        "the plain form's."
    )
    threads = sorted({f["threads"] for f in results})
    head = ("network", *FORMS, "faster", "floor", "by operations", "kept")
    return [f"{note} Threads: {', '.join(map(str, threads)) or NOT_RUN}.", "", *markdown(head, rows)]


def _conversion_table(done: Mapping[str, dict[str, Any]]) -> list[str]:
    rows = []
    for budget in BUDGETS:
        for kind, words in CONVERSIONS.items():
            found = of_name(done, CELLS, conversion_name(kind, budget))
            if not found:
                rows.append((f"{budget:g}", words, *[NOT_RUN] * 5))
                continue
            first = found[0]
            slopes = ", ".join(f"{s:.2f}" for s in first["slopes"]) or "—"
            bound = "—" if first["bound"] is None else f"{100 * first['bound']:.0f} %"
            rows.append(
                (
                    f"{budget:g}",
                    words,
                    f"{first['weights']:,} + {first['biases']:,}",
                    spread([f["before"] for f in found]),
                    spread([f["after"] for f in found]),
                    f"{100 * first['logit_error']:.1f} %; {bound}",
                    slopes,
                )
            )
    note = (
        "The trained perceptron 784-500-10 (1.69 % wrong), its first layer at a share of its parameters; Adam, rate "
        "1e-3, cosine, batch 128, one epoch. *Logits*: relative change before training on test data, and what the "
        "theorem allows on the calibration data."
    )
    head = ("budget", "conversion", "weights + biases", "wrong in %", "after an epoch", "logits", "slope, mean")
    return [note, "", *markdown(head, rows)]


CELLS: Sequence[Cell] = _cells()
STUDY = Study("kronecker_study", "Kronecker networks", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
