"""Learned windows beside fixed structures at equal multiply-adds, training steps and data.

    python -m benchmarks.learned_study                       every cell that is not done and takes minutes
    python -m benchmarks.learned_study run --only P2         cells whose name contains this
    python -m benchmarks.learned_study run --all             those that take hours too
    python -m benchmarks.learned_study table                 the tables again, from what is there

What is counted is what is deployed: multiply-adds of the replaced layers, hard windows. The sweep of learning rates
(a third, once, three times the base) runs for every method at seed 0 and one budget; the rate is chosen on a validation
split of the training data, and figures are of the test split.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.files import RESULTS
from benchmarks.learned_common import (
    BASE,
    BUDGETS,
    FACTORS,
    FOLDER,
    METHODS,
    PROJECTED,
    SEEDS,
    SWEPT,
    chosen,
    prepared,
    sweep_name,
    train,
)
from benchmarks.learned_costs import run_speed, run_step_cost
from benchmarks.learned_perceptron import HIDDEN, LAYERS, P5_STEPS, images, perceptron, run_compressed, run_perceptron
from benchmarks.learned_planted import KINDS, run_projection, run_teacher
from benchmarks.learned_real import REAL_BUDGETS, RECOVERED, run_real
from benchmarks.learned_transformers import (
    HELD_IMAGES,
    IMAGES,
    P4_BATCH,
    P4_STEPS,
    P4_SWEEP_STEPS,
    run_gpt,
    run_gpt_compressed,
    run_vit,
)
from benchmarks.real_models import MODELS
from benchmarks.study import NOT_RUN, Cell, Study, markdown, of_name, spread

FAMILIES = ("GBLR", "LowRank", "BlockDiagonal", "Monarch", "BLAST", "BlockTensorTrain", "Einsum", "Kronecker")

SPEED_WIDTHS = (16, 64, 128, 256)


def cells() -> list[Cell]:
    """In the order in which they are run."""
    found = [Cell("step cost", run_step_cost)]
    found += [Cell(f"speed width {width}", functools.partial(run_speed, width)) for width in SPEED_WIDTHS]

    def add(
        task: str,
        run: Callable[..., dict[str, Any]],
        methods: Iterable[str],
        shares: Iterable[float] = BUDGETS,
        *,
        extra: bool = False,
    ) -> None:
        """Every method at every share, seed 0 of all before seed 1 of any."""
        for seed, share, method in itertools.product(SEEDS, shares, methods):
            if method != "dense" or share == BUDGETS[0]:
                cell = functools.partial(run, method, share)
                found.append(Cell(f"{task} {method} {share:g}", cell, seed, extra))

    def sweep(task: str, run: Callable[..., dict[str, Any]], *, extra: bool = False) -> None:
        """Every method at every rate, one seed and share."""
        for factor, method in itertools.product(FACTORS, METHODS):
            found.append(
                Cell(sweep_name(task, method, factor), functools.partial(run, method, SWEPT, factor), 0, extra)
            )

    for seed, kind in itertools.product(SEEDS, KINDS):
        found.append(Cell(f"P1 {kind}", functools.partial(run_projection, kind), seed))
    for seed, method in itertools.product(SEEDS, METHODS[1:]):
        found.append(Cell(f"P2 {method}", functools.partial(run_teacher, method, 1.0), seed))
    for factor, method in itertools.product(FACTORS[::2], METHODS[1:]):
        found.append(Cell(f"P2 {method} x{factor:.2g}", functools.partial(run_teacher, method, factor)))
    sweep("P5", run_perceptron)
    add("P5", at_best_rate(run_perceptron), METHODS)
    add("P6", run_compressed, PROJECTED)
    sweep("P3", run_gpt, extra=True)
    add("P3", at_best_rate(run_gpt), METHODS, extra=True)
    add("P6 characters", run_gpt_compressed, PROJECTED, extra=True)
    add("real mnist-mlp", functools.partial(run_real, "mnist-mlp"), RECOVERED, REAL_BUDGETS, extra=True)
    add("real novel-lm", functools.partial(run_real, "novel-lm"), RECOVERED, REAL_BUDGETS, extra=True)
    sweep("P4", run_vit, extra=True)
    for seed, method in itertools.product(SEEDS, METHODS):
        cell = functools.partial(at_best_rate(run_vit), method, SWEPT)
        found.append(Cell(f"P4 {method} {SWEPT:g}", cell, seed, extra=True))
    return found


def at_best_rate(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The run at the rate that the sweep found."""
    return lambda method, share, seed: run(method, share, None, seed)


Done = Mapping[str, dict[str, Any]]


def tables(done: Done) -> list[str]:
    """Markdown of everything."""
    return [
        *_planted(done),
        *_teacher(done),
        *_trained(done, "P5", "Perceptron on MNIST (P5): percent right on the test split", ".2f", 1),
        *_compressed(done, "P6", "The trained perceptron compressed (P6): percent right", PROJECTED, BUDGETS, ".2f"),
        *_trained(done, "P3", "Character GPT (P3): nats per character", ".3f", -1),
        *_compressed(
            done,
            "P6 characters",
            "The trained character GPT compressed (P6): nats per character",
            PROJECTED,
            BUDGETS,
            ".3f",
        ),
        *_real(done),
        *_images(done),
        *_step_cost(done),
        *_speed(done),
    ]


def _found(done: Done, name: str) -> list[dict[str, Any]]:
    return of_name(done, STUDY.cells, name)


def _planted(done: Done) -> list[str]:
    rows = []
    for kind in KINDS:
        found = _found(done, f"P1 {kind}")
        rows.append([kind, *(spread([f["errors"][k] for f in found if k in f["errors"]], ".3g") for k in FAMILIES)])
    lines = ["## Planted structure, by projection (relative error)", "", *markdown(("planted", *FAMILIES), rows)]
    return [*lines, "", "Every family may take 5 % more than the planted cost, GBLR takes that cost exactly.", ""]


def _teacher(done: Done) -> list[str]:
    rows = []
    for method in METHODS[1:]:
        found = _found(done, f"P2 {method}")
        others = [_found(done, f"P2 {method} x{f:.2g}") for f in FACTORS[::2]]
        moved = [f["moved"] for f in found if f["moved"] is not None]
        rows.append(
            [
                method,
                spread([f["error"] for f in found], ".3f"),
                spread([f["share"] for f in found], ".3f"),
                *(spread([f["error"] for f in o], ".3f") for o in others),
                spread(moved, ".3f") if moved else "—",
                spread([f["training_seconds"] for f in found], ".1f"),
            ]
        )
    head = ("method", "error", "share of dense", "rate / 3 (seed 0)", "rate x 3 (seed 0)", "moved", "seconds")
    return ["## Teacher and student (P2): relative error with hard windows", "", *markdown(head, rows), ""]


def _trained(done: Done, task: str, title: str, form: str, sign: int) -> list[str]:
    """A task that is trained from scratch; ``sign`` is -1 where validation scores are losses with their sign turned."""
    rows = []
    for method in METHODS:
        row = [method]
        for share in BUDGETS:
            found = _found(done, f"{task} {method} {share:g}")
            if method == "dense" and share != BUDGETS[0]:
                row.append("—")
                continue
            took = f" ({statistics.fmean(f['share'] for f in found):.3f})" if found else ""
            row.append(spread([f["test"] for f in found], form) + took)
        swept = [_found(done, sweep_name(task, method, f)) for f in FACTORS]
        row.append(", ".join(spread([sign * f["validation"] for f in s], form) for s in swept))
        row.append(spread([f["training_seconds"] for f in _found(done, f"{task} {method} {BUDGETS[0]:g}")], ".1f"))
        rows.append(row)
    rates = f"validation at rates / 3, x 1, x 3 ({SWEPT:.0%}, seed 0)"
    head = ("method", *(f"{b:.0%}" for b in BUDGETS), rates, "seconds")
    note = "In brackets the share of the dense multiply-adds that is deployed. The rate is the best of the sweep."
    return [f"## {title}", "", *markdown(head, rows), "", note, ""]


def _compressed(
    done: Done, task: str, title: str, methods: Iterable[str], shares: Sequence[float], form: str
) -> list[str]:
    """A trained model, before and after recovery."""
    rows = []
    originals: list[float] = []
    for method in methods:
        row = [method]
        for share in shares:
            found = _found(done, f"{task} {method} {share:g}")
            originals += [f["original"] for f in found]
            pair = [spread([f[k] for f in found], form) for k in ("before", "after")]
            row.append(" → ".join(pair) if found else NOT_RUN)
        rows.append(row)
    lines = [f"## {title}, before → after recovery", "", *markdown(("method", *(f"{b:.0%}" for b in shares)), rows), ""]
    return [*lines, f"The dense original: {spread(sorted(set(originals)), form)}.", ""]


def _real(done: Done) -> list[str]:
    lines = []
    for model in ("mnist-mlp", "novel-lm"):
        real = MODELS[model]
        title = f"{model} fine-tuned ({real.metric})"
        lines += _compressed(done, f"real {model}", title, RECOVERED, REAL_BUDGETS, ".3f")
    return [
        *lines,
        "Every method of a model recovers for the same time: steps times the measured seconds of a step.",
        "",
    ]


def _images(done: Done) -> list[str]:
    rows = []
    for method in METHODS:
        found = _found(done, f"P4 {method} {SWEPT:g}")
        swept = [_found(done, sweep_name("P4", method, f)) for f in FACTORS]
        moved = [f["moved"] for f in found if f["moved"] is not None]
        rows.append(
            (
                method,
                spread([f["test"] for f in found]),
                spread([f["share"] for f in found], ".3f"),
                ", ".join(spread([f["validation"] for f in s]) for s in swept),
                spread(moved, ".3f") if moved else "—",
                spread([f["training_seconds"] for f in found], ".0f"),
            )
        )
    head = (
        "method",
        "percent right",
        "share of dense",
        "validation at rates / 3, x 1, x 3 (seed 0)",
        "moved",
        "seconds",
    )
    note = (
        f"Patches of 8, 4 blocks of width 128, {P4_STEPS:,} steps of {P4_BATCH} from "
        f"{IMAGES - HELD_IMAGES:,} images; rates are swept in {P4_SWEEP_STEPS} steps, on {HELD_IMAGES:,} others. "
        "*Moved*: the mean way of the middles of windows, as a share of the side."
    )
    return [
        f"## Vision transformer on CIFAR-10 (P4), {SWEPT:.0%}",
        "",
        *markdown(head, rows),
        "",
        note,
        "",
    ]


def _step_cost(done: Done) -> list[str]:
    lines = ["## A step of training, n = 1024, batch 256, 512 terms", ""]
    found = _found(done, "step cost")
    if not found:
        return [*lines, NOT_RUN, ""]
    steps = found[0]["steps"]
    base = steps["dense"]
    rows = [
        [name, f"{s['milliseconds']:.1f}", *(f"{s[k] / base[k]:.2f}" for k in ("milliseconds", "numbers"))]
        for name, s in steps.items()
    ]
    return [*lines, *markdown(("layer", "milliseconds", "of dense", "numbers kept, of dense"), rows), ""]


def _speed(done: Done) -> list[str]:
    rows = []
    for width in SPEED_WIDTHS:
        for f in _found(done, f"speed width {width}"):
            times = (f"{t['ratio']:.2f} ({t['efficiency']:.2f})" for t in f["microseconds"].values())
            rows.append([str(width), f"{f['share']:.3f}", *times])
    head = ("mean width", "share of dense", "batch 1", "batch 64", "batch 1024")
    lines = ["## Hardened windows, n = 1024, float32: time of the dense layer, and efficiency", ""]
    note = "Time as a multiple of the dense layer's; in brackets the efficiency as `structmat bench` defines it."
    return [*lines, *markdown(head, rows), "", note]


STUDY = Study(FOLDER, "Learned windows beside fixed structures", cells(), tables)


def pictures() -> None:
    """Film strip, budgets and quality over cost of one run, beside the tables."""
    import matplotlib as mpl

    from structmat.learn.pictures import budget_per_layer, film_strip, quality_against_cost

    mpl.rcParams["svg.hashsalt"] = FOLDER  # equal figures give equal files
    folder = RESULTS / FOLDER
    done = STUDY.done()
    points = {
        method: [
            (statistics.fmean(f["share"] for f in found), statistics.fmean(f["test"] for f in found))
            for share in BUDGETS
            if (found := of_name(done, STUDY.cells, f"P5 {method} {share:g}"))
        ]
        for method in METHODS
    }
    if not any(points.values()):
        return
    axes = quality_against_cost({m: p for m, p in points.items() if p}, "percent right on MNIST")
    axes.figure.savefig(folder / "frontier.svg", metadata={"Date": None})
    if (folder / "film.svg").exists():
        return
    torch.manual_seed(0)
    model = perceptron(HIDDEN)
    learner = prepared(model, LAYERS, "GBLR learned", 0.2, P5_STEPS, 0)
    assert learner is not None
    train(model, learner, BASE["P5"] * chosen("P5", "GBLR learned"), P5_STEPS, images(0), F.cross_entropy)
    shapes = {n: layer.sizes for n, layer in learner.layers.items()}
    (folder / "film.svg").write_text(film_strip(learner.history, "0", shapes["0"]), encoding="utf-8")
    budget_per_layer(learner.history, shapes).figure.savefig(folder / "budgets.svg", metadata={"Date": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    STUDY.main()
    if "list" not in sys.argv:
        pictures()
