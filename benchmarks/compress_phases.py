"""What each phase of the study of trained models does, in a process of its own, and what it returns."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import compress_cells, compress_measure
from benchmarks.compress_cells import Cell
from benchmarks.compress_methods import OURS, PRUNINGS, SMALL, as_sparse, make, processor_seconds, rates, skeleton
from benchmarks.files import environment
from benchmarks.real_models import MODELS, RealModel

CLOCKED_STEPS = 24
"""Steps of recovery whose median says how many fit."""

WARM_STEPS = 4
"""Before these."""


def compressed(cell: Cell, real: RealModel) -> tuple[nn.Module, dict[str, Any]]:
    """The compressed model of a cell, before recovery, with what is known about its making."""
    made = make(cell.method, cell.budget, cell.seed, real, cell.shared)
    return made.model, made.facts


def run_before(cell: Cell) -> dict[str, Any]:
    """Compress, save and measure, without recovery."""
    import structmat as sm

    real = MODELS[cell.model]
    torch.manual_seed(cell.seed)
    original = real.load()
    model, facts = compressed(cell, real)
    sm.save(model, cell.folder / "before")
    stored = compress_measure.deployed(cell.method, model)
    folder = sm.save(stored, cell.folder / "deployed")
    return {
        "cell": dataclasses.asdict(cell),
        "metric": real.metric,
        "lower_is_better": real.lower_is_better,
        "quality": {"original": real.evaluate(original), "before": real.evaluate(model), "after": None},
        **facts,
        **compress_measure.sizes(cell.method, real, original, stored),
        "milliseconds": compress_measure.milliseconds(real, original, stored),
        "bytes": {
            "original": compress_measure.disk(sm.save(original, cell.folder / "original")),
            "compressed": compress_measure.disk(folder),
        },
        "peak_memory_mb": {"before": compress_measure.peak(), "recovery": None},
        "recovery": None,
        "environment": environment(),
    }


def recovered(cell: Cell, rate: float, steps: int, name: str) -> tuple[nn.Module, Any]:
    """The model of the first phase after so many steps, and what recovery reported.

    What was interrupted goes on from its checkpoint; one of other steps, as when these were timed anew, is not read.
    """
    from structmat.compression.recover import recover

    real, folder = MODELS[cell.model], cell.folder / f"{name}-{rate:g}-{steps}"
    original = real.load()
    model, settings = started(cell), recovery_settings(cell, steps, rate)
    outcome = recover(
        model, original, (), settings, forward=real.forward, loss=real.loss, seed=cell.seed, folder=folder
    )
    return model, outcome


def started(cell: Cell) -> nn.Module:
    """The model of the first phase; a pruned one holds no more than the weights that are left."""
    import structmat as sm

    model = sm.load(cell.folder / "before", skeleton(cell.method, cell.budget, MODELS[cell.model]))
    return as_sparse(model) if cell.method in PRUNINGS else model


def run_recovery(cell: Cell, rate: float, steps: int, minutes: float) -> dict[str, Any]:
    """Recover what the first phase saved, and complete its result."""
    import structmat as sm

    real = MODELS[cell.model]
    result: dict[str, Any] = json.loads(cell.result.read_text(encoding="utf-8"))
    model, outcome = recovered(cell, rate, steps, "recovery")
    sm.save(model, cell.folder / "after")
    result["quality"]["after"] = real.evaluate(model)
    result["peak_memory_mb"]["recovery"] = compress_measure.peak()
    result["recovery"] = {
        "minutes": minutes,
        "rate": rate,
        "steps": outcome.steps,
        "kept_step": outcome.kept_step,
        "held_out": list(outcome.held_out),
        "closed_form": outcome.closed_form,
        "statistics": outcome.statistics,
        "environment": environment(),
    }
    return result


def run_rate(cell: Cell, rate: float, steps: int) -> dict[str, Any]:
    """Recover what the first phase saved at one learning rate; judged on data held out from training."""
    _, outcome = recovered(cell, rate, steps, "rate")
    return {
        "cell": dataclasses.asdict(cell),
        "rate": rate,
        "steps": outcome.steps,
        "objective": outcome.objective,
        "held_out": {"before": outcome.held_out[0][1], "best": min(value for _, value in outcome.held_out)},
        "environment": environment(),
    }


def run_time(cell: Cell) -> dict[str, Any]:
    """A result with the times of the compressed model measured anew."""
    import structmat as sm

    real = MODELS[cell.model]
    result: dict[str, Any] = json.loads(cell.result.read_text(encoding="utf-8"))
    model = sm.load(cell.folder / "deployed", skeleton(cell.method, cell.budget, real))
    result["milliseconds"] = compress_measure.milliseconds(real, real.load(), model)
    result["timed"] = environment()
    return result


def run_tune(cell: Cell) -> dict[str, Any]:
    """Times after ``sm.tune``."""
    import structmat as sm

    real = MODELS[cell.model]
    model = sm.load(cell.folder / "deployed", skeleton(cell.method, cell.budget, real))
    return {
        "cell": dataclasses.asdict(cell),
        "milliseconds": compress_measure.tuned_milliseconds(real, real.load(), model),
        "environment": environment(),
    }


def step_seconds(cell: Cell) -> dict[str, Any]:
    """The processor's median time from one training batch to the next, after a few that warm up; the mean of both parts
    where sparse layers are dense at first."""
    from structmat.compression.recover import recover

    real = MODELS[cell.model]
    times: list[float] = []

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            for batch in real.training(cell.seed):
                times.append(processor_seconds())
                yield batch

    settings = dataclasses.replace(
        recovery_settings(cell, CLOCKED_STEPS + WARM_STEPS, rates(cell.method, real)[0]),
        data=Batches(),
        held_out=None,
        closed_form=False,
        statistics=False,
    )
    model = started(cell)
    recover(model, real.load(), (), settings, forward=real.forward, loss=real.loss, seed=cell.seed)
    steps = [after - before for before, after in itertools.pairwise(times)]
    dense, later = steps[WARM_STEPS : (split := round(settings.thin * len(times)))], steps[max(split, WARM_STEPS) :]
    seconds = statistics.median(later)
    if dense:
        seconds = settings.thin * statistics.fmean(dense) + (1 - settings.thin) * seconds
    return {
        "cell": dataclasses.asdict(cell),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def recovery_settings(cell: Cell, steps: int, rate: float) -> Any:
    """The same for every method of a model, but that batch normalisation of fresh networks always learns, and that our
    sparse layers may choose their entries in place of a closed form before the first step."""
    import structmat as sm

    real = MODELS[cell.model]
    thin = real.thins if cell.method == OURS else 0.0
    return sm.Distill(
        steps=steps,
        data=real.training(cell.seed),
        held_out=real.held_out(),
        learning_rate=rate,
        optimizer=real.optimizer,
        closed_form=not thin,
        thin=thin,
        own_loss=real.own_loss,
        temperature=real.temperature,
        normalise=real.normalise or cell.method == SMALL,
        check_every=max(1, steps // 8),
    )


# ---------------------------------------------------------------------------------------- what is no cell of the table


POINTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Sizes of the frontier, as shares of the dense numbers."""


def run_frontier() -> dict[str, Any]:
    """Ten models of the language model from one screening, none recovered, each evaluated on validation text."""
    import structmat as sm
    from benchmarks.real_language import validation_bits

    real = MODELS["novel-lm"]
    start, busy = time.perf_counter(), processor_seconds()
    result = sm.compress(
        real.load(),
        budget=sm.Parameters(0.5),
        calibration=real.calibration(0),
        evaluate=validation_bits,
        frontier=POINTS,
        progress=True,
    )
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": processor_seconds() - busy,
        "threads": torch.get_num_threads(),
        "by_step": dict(result.report.seconds),
        "frontier": [point.to_json() for point in result.frontier],
        "environment": environment(),
    }


LOSS = 0.02
"""Bits per character that may be lost."""


def run_quality() -> dict[str, Any]:
    """The smallest language model that loses at most this on validation text; what it loses on the test book."""
    import structmat as sm
    from benchmarks.real_language import bits_per_character, validation_bits

    real = MODELS["novel-lm"]
    original = real.load()
    result = sm.compress(
        original,
        budget=sm.Quality(loss=LOSS, better="lower"),
        calibration=real.calibration(0),
        evaluate=validation_bits,
        folder=compress_cells.WORK / "quality",
        progress=True,
    )
    unseen = {"original": bits_per_character(original), "compressed": bits_per_character(result.model)}
    parameters = result.report.parameters
    return {
        "loss": LOSS,
        "judged": dict(result.report.quality),
        "unseen": unseen,
        "share": parameters.after / parameters.before,
        "kept": unseen["compressed"] - unseen["original"] <= LOSS,
        "tried": list(result.report.tried),
        "environment": environment(),
    }


def low_rank_menu(real: RealModel) -> dict[str, list[dict[str, Any]]]:
    """For each layer every size of low rank on the grid, with the rise of the loss that our steps predict for it."""
    import structmat as sm
    from structmat.compression.calibrate import calibrate
    from structmat.compression.scan import scan
    from structmat.compression.score import corrected, score
    from structmat.compression.screen import screen
    from structmat.compression.split import split_apart

    model, batches = real.load(), real.calibration(0)
    sites = scan(model).sites
    with split_apart(model, [site.name for site in sites]):
        seen = calibrate(model, sites, batches, forward=real.forward, seed=0, progress=True)
        found = screen(model, sites, sm.Parameters(0.5), calibration=seen, structures=("LowRank",), progress=True)
        _, measured = score(model, sites, found, seen, batches, forward=real.forward, progress=True)
    return {
        name: [
            {
                "structure": str(c.structure),
                "parameters": c.parameters / (layer.shape[0] * layer.shape[1]),
                "loss": c.loss,
            }
            for c in layer.candidates
            if isinstance(c.structure, sm.LowRank)
        ]
        for name, layer in corrected(found, measured).items()
    }
