"""``compress`` on trained models, beside baselines at the same budget, calibration and recovery time.

    python -m benchmarks.compress_real                      every cell that is not done, seed 0 before seed 1
    python -m benchmarks.compress_real --phase before       without recovery (minutes instead of hours)
    python -m benchmarks.compress_real --phase steps        seconds of a step of every cell, on a quiet machine
    python -m benchmarks.compress_real --phase time         times of the compressed models again, likewise
    python -m benchmarks.compress_real --phase tune         the same after sm.tune, in cells of their own, likewise
    python -m benchmarks.compress_real --phase frontier     ten points of the language model from one screening
    python -m benchmarks.compress_real --phase quality      Quality(loss=0.02), judged on a book that nothing has seen
    python -m benchmarks.compress_real --phase menu         what low rank alone could do for each single layer
    python -m benchmarks.compress_real table                the tables again, from what is there
    python -m benchmarks.compress_real list                 every cell, and which are done

A cell is (model, method, budget, seed). Each phase of a cell runs in a process of its own, so that its peak memory is
its own, and is written when it ends: a study that was interrupted goes on where it stopped, recovery in the middle.
Compressed models and checkpoints lie in ``build/compress_real``; figures and tables in ``benchmarks/results``.

Every method is recovered in the same way and for the same time, 5 minutes, or 15 for compressing and recovery of the
language model together. Three learning rates are tried for a third of the time each (seed 0, a quarter of the
numbers); the recovery has, from the beginning, the rate whose model was nearest to the original on held-out training
data. What is measured is the processor's seconds of a step, and every cell takes as many steps as fit: a busy machine
delays the study but does not change its outcome.
``--minutes`` shortens recovery, to see that everything runs; its results are not written among the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import compress_measure
from benchmarks.compress_methods import (
    DENSE,
    LOW_RANK,
    METHODS,
    OURS,
    PRUNED,
    SMALL,
    applies,
    as_sparse,
    make,
    processor_seconds,
    rates,
    skeleton,
)
from benchmarks.files import RESULTS, ROOT, environment, write
from benchmarks.real_models import MODELS, RealModel, require_data
from benchmarks.tables import write_tables

WORK = ROOT / "build" / "compress_real"
STUDY_FOLDER = RESULTS / "compress_real"

BUDGETS = (0.5, 0.25)
"""Shares of the parameters of the compressible layers."""

SWEPT = 0.25
"""The budget at which learning rates are tried, for both: there recovery has most to do."""

SEEDED = (OURS, LOW_RANK)
"""Ours and the best baseline get three seeds, the others one."""

CLOCKED_STEPS = 24
"""Steps of recovery whose median says how many fit."""

FEWEST_MINUTES = 1.0
"""Of recovery where compressing took the rest."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the study."""

    model: str
    method: str
    budget: float
    seed: int

    @property
    def key(self) -> str:
        method = self.method.replace(",", "").replace(" ", "-")
        return f"{self.model}_{method}_{self.budget:g}_{self.seed}"

    @property
    def result(self) -> Path:
        return STUDY_FOLDER / f"{self.key}.json"

    @property
    def folder(self) -> Path:
        return WORK / self.key

    @property
    def shared(self) -> Path:
        """Of what does not depend on the budget: the first budget's cell calibrates, screens and scores for all, so
        that only its seconds of these steps say anything."""
        return WORK / f"{self.model}_{self.method.replace(',', '').replace(' ', '-')}_{self.seed}"


def cells(seeds: int) -> list[Cell]:
    """Every cell in the order in which they are run: seed 0 of every cell before seed 1 of any."""
    everything = []
    for seed in range(seeds):
        for model, budget, method in itertools.product(MODELS, BUDGETS, METHODS):
            if (seed > 0 and method not in SEEDED) or not applies(method, MODELS[model]):
                continue
            if method == DENSE and budget != BUDGETS[0]:
                continue
            everything.append(Cell(model, method, budget, seed))
    return everything


def table_cells() -> list[Cell]:
    """What the tables show: the study's cells, and what else was run before."""
    planned = cells(3)
    found = [json.loads(path.read_text(encoding="utf-8"))["cell"] for path in sorted(STUDY_FOLDER.glob("*.json"))]
    return planned + [cell for cell in (Cell(**fields) for fields in found) if cell not in planned]


# -------------------------------------------------------------------------------------------------- one cell's run


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


def recovered(cell: Cell, rate: float, steps: int, folder: Path | None) -> tuple[nn.Module, Any]:
    """The model of the first phase after so many steps, and what recovery reported."""
    from structmat.compression.recover import recover

    real = MODELS[cell.model]
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
    return as_sparse(model) if cell.method == PRUNED else model


def run_recovery(cell: Cell, rate: float, steps: int, minutes: float) -> dict[str, Any]:
    """Recover what the first phase saved, and complete its result."""
    import structmat as sm

    real = MODELS[cell.model]
    result: dict[str, Any] = json.loads(cell.result.read_text(encoding="utf-8"))
    model, outcome = recovered(cell, rate, steps, cell.folder / "recovery")
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
    _, outcome = recovered(cell, rate, steps, cell.folder / f"rate-{rate:g}")
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
    """The processor's median time from one training batch to the next, after a few that warm up."""
    from structmat.compression.recover import recover

    real = MODELS[cell.model]
    times: list[float] = []

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            for batch in real.training(cell.seed):
                times.append(processor_seconds())
                yield batch

    settings = dataclasses.replace(
        recovery_settings(cell, CLOCKED_STEPS + 4, rates(cell.method, real)[0]),
        data=Batches(),
        held_out=None,
        closed_form=False,
        statistics=False,
    )
    model = started(cell)
    recover(model, real.load(), (), settings, forward=real.forward, loss=real.loss, seed=cell.seed)
    steps = [after - before for before, after in itertools.pairwise(times[-CLOCKED_STEPS:])]
    return {
        "cell": dataclasses.asdict(cell),
        "seconds": statistics.median(steps),
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def recovery_settings(cell: Cell, steps: int, rate: float) -> Any:
    """The same for every method of a model, but that batch normalisation of fresh networks always learns."""
    import structmat as sm

    real = MODELS[cell.model]
    return sm.Distill(
        steps=steps,
        data=real.training(cell.seed),
        held_out=real.held_out(),
        learning_rate=rate,
        optimizer=real.optimizer,
        closed_form=True,
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
        folder=WORK / "quality",
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


def beside(name: str) -> Path:
    """A folder of results beside that of the cells."""
    return STUDY_FOLDER.with_name(f"{STUDY_FOLDER.name}_{name}")


def menu_result(model: str) -> Path:
    return beside("low_rank") / f"{model}.json"


def swept(cell: Cell) -> Cell:
    """The cell whose learning rates are tried for this one: of seed 0 and one budget."""
    return dataclasses.replace(cell, seed=0, budget=cell.budget if cell.method == DENSE else SWEPT)


def rate_result(cell: Cell, rate: float) -> Path:
    return beside("rates") / f"{cell.key}_{rate:g}.json"


def clock_result(cell: Cell) -> Path:
    """Of seed 0: a step takes as long with another."""
    return beside("steps") / f"{dataclasses.replace(cell, seed=0).key}.json"


def tune_result(cell: Cell) -> Path:
    return beside("tuned") / f"{cell.key}.json"


def single_result(phase: str) -> Path:
    """Of a phase that is one run."""
    return beside(phase) / "novel-lm.json"


# ------------------------------------------------------------------------------------------------------ the driver

PHASES = ("all", "before", "recovery", "rates", "steps", "time", "tune", "menu", "frontier", "quality")

SINGLE = ("frontier", "quality")


def minutes_left(cell: Cell) -> float:
    """Of recovery: all, or what compressing left of them."""
    real = MODELS[cell.model]
    if not real.includes_fitting:
        return real.minutes
    spent = json.loads(cell.result.read_text(encoding="utf-8"))["seconds"].get("all", 0.0)
    return max(FEWEST_MINUTES, real.minutes - spent / 60)


def steps_within(cell: Cell, minutes: float) -> int:
    """How many steps of recovery fit; measured first where nobody has."""
    if not clock_result(cell).exists():
        in_own_process(cell, "steps")
    seconds: float = json.loads(clock_result(cell).read_text(encoding="utf-8"))["seconds"]
    return max(1, round(60 * minutes / seconds))


def best_rate(cell: Cell, minutes: float | None) -> float:
    """The learning rate at which the model comes nearest to the original on held-out data; tried first where nobody
    has, for a third of the time each.

    Args:
        cell: :func:`swept` of it is tried.
        minutes: of recovery, or None for the study's.
    """
    first, found = swept(cell), {}
    tried = rates(cell.method, MODELS[cell.model])
    for rate in tried:
        path = rate_result(first, rate)
        if not path.exists():
            if not has_start(first):
                in_own_process(first, "before")
            available = minutes_left(first) if minutes is None else minutes
            in_own_process(first, "rates", "--rate", str(rate), "--steps", str(steps_within(first, available / 3)))
        if path.exists():
            found[rate] = json.loads(path.read_text(encoding="utf-8"))["held_out"]["best"]
    return min(found, key=lambda rate: found[rate]) if found else tried[1]


def in_own_process(cell: Cell, phase: str, *options: str) -> None:
    command = [sys.executable, "-m", "benchmarks.compress_real", "cell", "--phase", phase, "--key", cell.key, *options]
    if STUDY_FOLDER.parent != RESULTS:
        command += ["--results", str(STUDY_FOLDER.parent), "--work", str(WORK)]
    outcome = subprocess.run(command, cwd=ROOT, check=False)
    if outcome.returncode:
        print(f"    failed with exit code {outcome.returncode}; the next run tries again", flush=True)


def is_recovered(cell: Cell) -> bool:
    """For as long as the study has it now: results of a shorter one are made again."""
    if not cell.result.exists():
        return False
    recovery = json.loads(cell.result.read_text(encoding="utf-8"))["recovery"]
    return recovery is not None and recovery["minutes"] == MODELS[cell.model].minutes


def has_start(cell: Cell) -> bool:
    """Whether the first phase is done, here: recovery starts from the model that it saved."""
    return cell.result.exists() and (cell.folder / "before").exists()


def run(phase: str, chosen: list[Cell], minutes: float | None) -> None:
    """Run what is not done, each phase of a cell in its own process."""
    for number, cell in enumerate(chosen, 1):
        label = f"[{number}/{len(chosen)}] {cell.key}"
        if phase in ("all", "before") and not has_start(cell) and not is_recovered(cell):
            print(f"{label}: compress", flush=True)
            in_own_process(cell, "before")
        if phase in ("all", "recovery") and has_start(cell) and not is_recovered(cell):
            available = minutes_left(cell) if minutes is None else minutes
            print(f"{label}: recovery, {available:.2g} minutes", flush=True)
            rate, steps = best_rate(cell, minutes), steps_within(cell, available)
            said = MODELS[cell.model].minutes if minutes is None else minutes
            options = ("--rate", str(rate), "--steps", str(steps), "--minutes", str(said))
            in_own_process(cell, "recovery", *options)
        if phase == "rates" and has_start(cell):
            best_rate(cell, minutes)
        if phase == "steps" and cell.seed == 0 and has_start(cell) and not clock_result(cell).exists():
            in_own_process(cell, "steps")
        if phase == "time" and has_start(cell):
            in_own_process(cell, "time")
        if phase == "tune" and has_start(cell) and cell.method == OURS and not tune_result(cell).exists():
            in_own_process(cell, "tune")
        if phase == "menu" and not menu_result(cell.model).exists():
            in_own_process(cell, "menu")
    write_tables(STUDY_FOLDER, table_cells())


def run_cell(phase: str, cell: Cell, rate: float | None, steps: int | None, minutes: float | None) -> None:
    """A phase of a cell, in this process."""
    if phase == "rates":
        assert rate is not None, "a rate is tried"
        assert steps is not None, "for so many steps"
        write(rate_result(cell, rate), run_rate(cell, rate, steps))
    elif phase == "menu":
        write(menu_result(cell.model), {"layers": low_rank_menu(MODELS[cell.model]), "environment": environment()})
    elif phase == "steps":
        write(clock_result(cell), step_seconds(cell))
    elif phase == "time":
        write(cell.result, run_time(cell))
    elif phase == "tune":
        write(tune_result(cell), run_tune(cell))
    elif phase == "before":
        write(cell.result, run_before(cell))
    else:
        assert rate is not None, "recovery has a rate"
        assert steps is not None, "and so many steps"
        assert minutes is not None, "which are so many minutes"
        write(cell.result, run_recovery(cell, rate, steps, minutes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "cell", "table", "list"), default="run")
    parser.add_argument("--phase", choices=PHASES, default="all")
    parser.add_argument("--model", choices=tuple(MODELS), action="append", help="only these models")
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help="only these methods")
    parser.add_argument("--budget", type=float, action="append", help="only these budgets")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds of ours and the best baseline")
    parser.add_argument("--seed", type=int, action="append", help="only these of them")
    parser.add_argument("--minutes", type=float, help="of recovery instead of the study's; needs --results")
    parser.add_argument("--results", type=Path, help="where figures are written instead of benchmarks/results")
    parser.add_argument("--work", type=Path, help="where models and checkpoints lie instead of build/compress_real")
    parser.add_argument("--key", help="the cell that this process runs")
    parser.add_argument("--rate", type=float, help="the learning rate of this process")
    parser.add_argument("--steps", type=int, help="of recovery, that this process takes")
    options = parser.parse_args()
    if options.minutes is not None and options.results is None and options.action != "cell":
        parser.error("--minutes makes figures that are not the study's: say with --results where they go")
    _place(options.results, options.work)
    if options.action == "table":
        write_tables(STUDY_FOLDER, table_cells())
        return
    if options.action == "list":
        for cell in cells(3):
            print("done" if is_recovered(cell) else "    ", cell.key)
        return
    require_data()
    if options.action == "cell":
        run_cell(
            options.phase,
            next(c for c in cells(99) if c.key == options.key),
            options.rate,
            options.steps,
            options.minutes,
        )
        return
    if options.phase in SINGLE:
        path = single_result(options.phase)
        if not path.exists():
            write(path, run_frontier() if options.phase == "frontier" else run_quality())
        return
    chosen = [
        c
        for c in cells(options.seeds)
        if (not options.model or c.model in options.model)
        and (not options.method or c.method in options.method)
        and (not options.budget or c.budget in options.budget)
        and (not options.seed or c.seed in options.seed)
    ]
    run(options.phase, chosen, options.minutes)


def _place(results: Path | None, work: Path | None) -> None:
    """Other folders than the study's."""
    global STUDY_FOLDER, WORK
    if results is not None:
        STUDY_FOLDER = results.resolve() / STUDY_FOLDER.name
        WORK = (work or results / "work").resolve()


if __name__ == "__main__":
    main()
