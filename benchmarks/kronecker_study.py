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

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from benchmarks.kronecker_conversion import BUDGETS, CONVERSIONS, conversion_cell
from benchmarks.kronecker_models import METHODS, Method, counts
from benchmarks.kronecker_speed import FORMS, SPEEDS, speed_cell
from benchmarks.kronecker_tasks import TASKS, Task, times_cell, train
from benchmarks.study import NOT_RUN, RESULTS, Cell, Study, curve_svg, markdown, of_name, save, spread

SEEDS = 5


def rate_cell(task: Task, method: Method, rate: float, seed: int) -> dict[str, Any]:
    """The error on held-out data after a quarter of the epochs."""
    for other, twin in twins(task, method, seed):
        found = figures(rate_name(other, twin, rate), seed)
        if found:
            return found
    kept, held = task.load("train").split()
    model = task.model(method, seed)
    train(task, model, kept, max(1, task.epochs // 4), rate, seed)
    return {"rate": rate, "error": task.error(model, held)}


def main_cell(task: Task, method: Method, seed: int) -> dict[str, Any]:
    """The error on test data, and what the network costs."""
    rate, swept = best_rate(task, method)
    for other, twin in twins(task, method, seed):
        found = figures(main_name(other, twin), seed)
        if found and found["rate"] == rate:
            return {**found, "swept": swept}
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


def twins(task: Task, method: Method, seed: int) -> Iterator[tuple[Task, Method]]:
    """What trains the same network from the same numbers by the same recipe: the smallest member of a family may be
    too large for several sizes, and a sweep may end at the published rate. It need not be trained again."""
    start = drawn(task.model(method, seed))
    for other in TASKS:
        if other.recipe != task.recipe:
            continue
        for twin in METHODS:
            if (other, twin) != (task, method) and drawn(other.model(twin, seed)) == start:
                yield other, twin


def drawn(model: nn.Module) -> tuple[str, dict[str, bytes]]:
    """A network's layers and its numbers, to compare."""
    return str(model), {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def figures(name: str, seed: int) -> dict[str, Any]:
    """Of a cell that was run, and from which; none otherwise."""
    path = STUDY.path(Cell(name, lambda seed: {}, seed))
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {"as": f"{name}, seed {seed}", **found}


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
        cell = figures(rate_name(task, method, rate), 0)
        if cell:
            found[rate] = cell["error"]
    if len(found) < len(task.rates):
        return task.rate, False
    return min(found, key=lambda r: found[r] if math.isfinite(found[r]) else math.inf), True


def times_name(task: Task) -> str:
    return f"times {task.name}"


def speed_name(width: int, terms: int, batch: int) -> str:
    return f"speed width {width} k={terms} batch {batch}"


def conversion_name(kind: str, budget: float) -> str:
    return f"convert {kind} {budget:g}"


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
    save(RESULTS, name, curve_svg(curves, "parameters", "error in %"))
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
