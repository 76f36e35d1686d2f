"""What each way to recover is worth: a perceptron and ResNet-20 at a quarter of their size, the same steps for all.

    python -m benchmarks.recovery
    python -m benchmarks.recovery --only mnist-mlp

Every cell starts from the same compressed model, of low ranks and Tucker forms (``build/recovery``). The distance from
the original on held-out training data is what is compared; the accuracy on test data stands beside it and chooses
nothing. A phase before distillation takes its steps from the same number.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from benchmarks.files import ROOT
from benchmarks.real_models import MODELS
from benchmarks.study import Cell, Study, markdown, of_name

WORK = ROOT / "build" / "recovery"

SHARE = 0.25

STEPS = {"mnist-mlp": 600, "resnet-20": 90}
"""Of all phases together."""

BATCHES = {"mnist-mlp": 8, "resnet-20": 6}
"""Of calibration."""

RATE = 1e-3

WAYS = {
    "distillation": {},
    "no recovery": {"steps": 1, "learning_rate": 1e-12},
    "closed form alone": {"steps": 1, "learning_rate": 1e-12, "closed_form": True},
    "closed form, then distillation": {"closed_form": True},
    "layers for a third of the steps, then distillation": {"layerwise": 1 / 3},
    "blocks for a third of the steps, then distillation": {"blockwise": 1 / 3},
    "hidden states at weight 0.1": {"hidden": 0.1},
    "hidden states at weight 1": {"hidden": 1.0},
    "annealing from dense for half of the steps": {"anneal": 0.5},
    "in two steps, 0.5 and 0.25": {"gradual": True},
    "statistics of the batches": {"normalise": True},
    "statistics not estimated again": {"statistics": False},
    "rates: one a stage": {"rates": "STAGE"},
    "rates: that of a dense layer": {"rates": "EQUAL"},
    "temperature 4": {"temperature": 4.0},
    "labels beside, at weight 0.1": {"own_loss": 0.1},
    "rate 3e-4": {"learning_rate": 3e-4},
    "rate 3e-3": {"learning_rate": 3e-3},
    "rate 1e-2": {"learning_rate": 1e-2},
}
"""Settings that differ from those of plain distillation."""


def run(model: str, way: str, seed: int) -> dict[str, Any]:
    """Recover the compressed model in one way."""
    import structmat as sm
    from structmat.compression.distill import Rates
    from structmat.compression.gradual import compress_gradually
    from structmat.compression.recover import recover

    real, options = MODELS[model], dict(WAYS[way])
    original, steps = real.load(), STEPS[model]
    calibration = real.calibration(seed)[: BATCHES[model]]
    how = {"calibration": calibration, "structures": ["LowRank", "Tucker"] if real.convolutional else ["LowRank"]}
    gradual = bool(options.pop("gradual", False))
    for phase in ("layerwise", "blockwise"):
        if phase in options:
            options[phase] = round(options[phase] * steps)
            options["steps"] = steps - options[phase]
    if "rates" in options:
        options["rates"] = Rates[options["rates"]]
    settings = dataclasses.replace(
        sm.Distill(
            steps=steps,
            learning_rate=RATE,
            data=real.training(seed),
            held_out=real.held_out(),
            check_every=max(1, steps // 6),
        ),
        **options,
    )
    torch.manual_seed(seed)
    if gradual:
        budgets = [sm.Parameters(0.5), sm.Parameters(SHARE)]
        result = compress_gradually(original, budgets, settings, seed=seed, **how)
        assert result.report.recovery is not None
        done, compressed = dict(result.report.recovery), result.model
    else:
        start = WORK / f"{model}-{seed}"
        if not start.exists():
            made = sm.compress(original, budget=sm.Parameters(SHARE), seed=seed, **how).model
            sm.save(made, start)
        compressed = sm.load(start, real.load())
        done = dataclasses.asdict(recover(compressed, original, (), settings, seed=seed))
    values = [value for _, value in done["held_out"]]
    return {
        "before": values[0],
        "curve": done["held_out"],
        "closed_form": done["closed_form"],
        "statistics": done["statistics"],
        "held_out": _distance(compressed, original, real),
        "test": real.evaluate(compressed),
    }


@torch.no_grad()
def _distance(model: torch.nn.Module, original: torch.nn.Module, real: Any) -> float:
    """The divergence on held-out data, of the model as it is returned."""
    from structmat.compression.objectives import distance
    from structmat.compression.running import evaluating, outcome

    total, batches = 0.0, real.held_out()
    with evaluating(model), evaluating(original):
        for batch in batches:
            pair = (outcome(net(batch[0]), batch) for net in (model, original))
            total += float(distance(*pair, 1.0, None))
    return total / len(batches)


CELLS = [
    Cell(f"{model} {way}", functools.partial(run, model, way))
    for model in STEPS
    for way in WAYS
    if MODELS[model].convolutional or not (way.startswith("statistics"))
]


def tables(done: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for model, steps in STEPS.items():
        rows = []
        for way in WAYS:
            found = of_name(done, CELLS, f"{model} {way}")
            if any(cell.name == f"{model} {way}" for cell in CELLS):
                cell = found[0] if found else None
                rows.append(
                    (way, "not run", "—") if cell is None else (way, f"{cell['held_out']:.5f}", f"{cell['test']:.2f}")
                )
        head = ("way", "distance on held-out data", "test accuracy, %")
        lines += [f"## {model} at {SHARE:.0%}, {steps} steps", "", *markdown(head, rows), ""]
    return lines


STUDY = Study("recovery", "What each way to recover is worth", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
