"""``compress`` on trained models, beside baselines at the same budget, calibration and recovery time.

    python -m benchmarks.compress_real                      every cell that is not done, seed 0 before seed 1
    python -m benchmarks.compress_real --phase before       without recovery (minutes instead of hours)
    python -m benchmarks.compress_real --phase rates        learning rates of the recovery, at one budget and seed
    python -m benchmarks.compress_real --phase steps        seconds of a step of every cell, on a quiet machine
    python -m benchmarks.compress_real --phase time         times of the compressed models again, likewise
    python -m benchmarks.compress_real --phase menu         what low rank alone could do for each single layer
    python -m benchmarks.compress_real table                the tables again, from what is there

A cell is (model, method, budget, seed). Each phase of a cell runs in a process of its own, so that its peak memory is
its own, and is written when it ends: a study that was interrupted goes on where it stopped. Compressed models and
checkpoints lie in ``build/compress_real``; figures and tables in ``benchmarks/results``.

Recovery takes the same time for every method: what is measured is the seconds of a step, on a quiet machine, and every
cell then takes as many steps as fit. So a busy machine delays the study but does not change its outcome.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.files import RESULTS, ROOT, environment, write
from benchmarks.real_models import MODELS, RealModel, require_data
from benchmarks.tables import write_tables

WORK = ROOT / "build" / "compress_real"
STUDY = RESULTS / "compress_real"

BUDGETS = (0.75, 0.5, 0.25)
"""Shares of the parameters of the compressible layers. 0.75 is judged before recovery only."""

RECOVERED = (0.5, 0.25)

METHODS = {
    "ours": "compress, every family, our allocation",
    "low rank, allocated": "compress with low rank alone, our allocation",
    "whitened SVD, uniform": "activation-whitened SVD, one ratio for all layers",
    "SVD, uniform": "truncated SVD of the weights, one ratio for all layers",
    "Monarch, uniform": "Monarch with 4 blocks, one ratio for all layers",
    "BLAST, uniform": "BLAST with 4 blocks, one ratio for all layers",
    "dense": "the original under the same recovery",
}
SEEDED = ("ours", "low rank, allocated")
"""Ours and the best baseline get three seeds, the others one."""


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
        return STUDY / f"{self.key}.json"

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
            if seed > 0 and method not in SEEDED:
                continue
            if method == "dense" and budget != RECOVERED[0]:
                continue
            everything.append(Cell(model, method, budget, seed))
    return everything


# -------------------------------------------------------------------------------------------------- one cell's run


def compressed(cell: Cell, real: RealModel, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The compressed model of a cell, before recovery, with what is known about its making."""
    import structmat as sm

    start = time.perf_counter()
    if cell.method == "dense":
        return model, {"seconds": {}, "layers": {}}
    if cell.method in ("ours", "low rank, allocated"):
        result = sm.compress(
            model,
            budget=sm.Parameters(cell.budget),
            calibration=real.calibration(cell.seed),
            structures=None if cell.method == "ours" else ("LowRank",),
            sequential=True,
            seed=cell.seed,
            folder=cell.shared,
            progress=True,
        )
        report = result.report
        return result.model, {
            "seconds": {**report.seconds, "all": time.perf_counter() - start},
            "layers": {layer.name: layer.structure for layer in report.layers},
            "predicted_loss": report.predicted_loss,
            "chosen": [
                {
                    "layer": layer.name,
                    "structure": layer.structure,
                    "parameters": layer.parameters / layer.dense_parameters,
                    "loss": layer.predicted_loss,
                }
                for layer in report.layers
            ],
        }
    return uniform(cell, real, model, start)


def low_rank_menu(real: RealModel) -> dict[str, list[dict[str, Any]]]:
    """For each layer every size of low rank on the grid, with the rise of the loss that our steps predict for it."""
    import structmat as sm
    from structmat.compression.calibrate import calibrate
    from structmat.compression.scan import scan
    from structmat.compression.score import corrected, score
    from structmat.compression.screen import screen

    model, batches = real.load(), real.calibration(0)
    sites = scan(model).sites
    seen = calibrate(model, sites, batches, seed=0, progress=True)
    found = screen(model, sites, sm.Parameters(0.5), calibration=seen, structures=("LowRank",), progress=True)
    _, measured = score(model, sites, found, seen, batches, progress=True)
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


def uniform(cell: Cell, real: RealModel, model: nn.Module, start: float) -> tuple[nn.Module, dict[str, Any]]:
    """One family at one ratio for all layers, fitted on second moments of the inputs (but for the plain SVD)."""
    import structmat as sm
    from structmat.compression.calibrate import Calibration, calibrate
    from structmat.compression.plan import Plan
    from structmat.compression.replace import replace_layers
    from structmat.compression.scan import scan

    structure = {
        "SVD, uniform": sm.LowRank(rank=cell.budget),
        "whitened SVD, uniform": sm.LowRank(rank=cell.budget),
        "Monarch, uniform": sm.Monarch(blocks=4, rank=cell.budget),
        "BLAST, uniform": sm.BLAST(blocks=4, rank=cell.budget),
    }[cell.method]
    sites = scan(model).sites
    seen: Calibration | None = None
    if cell.method != "SVD, uniform":
        seen = calibrate(model, sites, real.calibration(cell.seed), gradients=False, seed=cell.seed)
    shapes = {site.name: site.shape for site in sites}
    plan = Plan({name: fitting(structure, shape) for name, shape in shapes.items()}, shapes, seed=cell.seed)
    replace_layers(model, plan, calibration=seen, seed=cell.seed, progress=True)
    layers = {name: str(s) for name, s in plan.layers.items()}
    return model, {"seconds": {"all": time.perf_counter() - start}, "layers": layers}


def fitting(structure: Any, shape: tuple[int, int]) -> Any:
    """The structure at this shape, or dense where even its smallest member holds more than the ratio allows."""
    from structmat import Dense
    from structmat.errors import ShapeError
    from structmat.structure import resolve

    try:
        return resolve(structure, shape)
    except ShapeError:
        return Dense()


def run_before(cell: Cell) -> dict[str, Any]:
    """Compress, save and measure, without recovery."""
    import structmat as sm

    real = MODELS[cell.model]
    torch.manual_seed(cell.seed)
    original = real.load()
    model, facts = compressed(cell, real, real.load())
    folder = sm.save(model, cell.folder / "before")
    return {
        "cell": dataclasses.asdict(cell),
        "metric": real.metric,
        "lower_is_better": real.lower_is_better,
        "quality": {"original": real.evaluate(original), "before": real.evaluate(model), "after": None},
        **facts,
        **sizes(original, model),
        "milliseconds": milliseconds(real, original, model),
        "bytes": {"original": disk(sm.save(original, cell.folder / "original")), "compressed": disk(folder)},
        "peak_memory_mb": {"before": peak(), "recovery": None},
        "recovery": None,
        "environment": environment(),
    }


def run_recovery(cell: Cell, steps: int) -> dict[str, Any]:
    """Recover what the first phase saved, and complete its result."""
    import structmat as sm
    from structmat.compression.recover import recover

    real = MODELS[cell.model]
    result: dict[str, Any] = json.loads(cell.result.read_text(encoding="utf-8"))
    original = real.load()
    model = sm.load(cell.folder / "before", real.load())
    settings = recovery_settings(cell, steps)
    outcome = recover(model, original, (), settings, seed=cell.seed, folder=cell.folder / "recovery")
    sm.save(model, cell.folder / "after")
    result["quality"]["after"] = real.evaluate(model)
    result["peak_memory_mb"]["recovery"] = peak()
    result["recovery"] = {
        "minutes": real.minutes,
        "steps": outcome.steps,
        "kept_step": outcome.kept_step,
        "held_out": list(outcome.held_out),
        "environment": environment(),
    }
    return result


def run_rate(cell: Cell, rate: float, steps: int) -> dict[str, Any]:
    """Recover what the first phase saved at one learning rate; judged on data held out from training."""
    import structmat as sm
    from structmat.compression.recover import recover

    real = MODELS[cell.model]
    settings = dataclasses.replace(recovery_settings(cell, steps), learning_rate=rate)
    outcome = recover(sm.load(cell.folder / "before", real.load()), real.load(), (), settings, seed=cell.seed)
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
    result["milliseconds"] = milliseconds(real, real.load(), sm.load(cell.folder / "before", real.load()))
    result["timed"] = environment()
    return result


def step_seconds(cell: Cell) -> dict[str, Any]:
    """The median time from one training batch to the next, after a few that warm up."""
    import structmat as sm
    from structmat.compression.recover import recover

    real = MODELS[cell.model]
    times: list[float] = []

    def clocked() -> Iterator[Any]:
        for batch in real.training(cell.seed):
            times.append(time.perf_counter())
            yield batch

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            return clocked()

    settings = dataclasses.replace(recovery_settings(cell, real.clocked_steps + 4), data=Batches(), held_out=None)
    recover(sm.load(cell.folder / "before", real.load()), real.load(), (), settings, seed=cell.seed)
    steps = [after - before for before, after in itertools.pairwise(times[-real.clocked_steps :])]
    return {"cell": dataclasses.asdict(cell), "seconds": statistics.median(steps), "environment": environment()}


def recovery_settings(cell: Cell, steps: int) -> Any:
    import structmat as sm

    real = MODELS[cell.model]
    return sm.Distill(
        steps=steps,
        data=real.training(cell.seed),
        held_out=real.held_out(),
        learning_rate=RATE[cell.model],
        check_every=max(1, steps // 6),
    )


PHASES = ("all", "before", "recovery", "rates", "steps", "time", "menu")

RATES = (3e-4, 1e-3, 3e-3)
"""Swept at seed 0, at one budget, for ours and the best baseline; the best one is used for every method."""

RATE_BUDGET = 0.25

RATE = {"novel-lm": 1e-3, "mnist-mlp": 1e-3}


def menu_result(model: str) -> Path:
    return STUDY.with_name("compress_real_low_rank") / f"{model}.json"


def rate_result(cell: Cell, rate: float) -> Path:
    return STUDY.with_name("compress_real_rates") / f"{cell.key}_{rate:g}.json"


# ---------------------------------------------------------------------------------------------------- measurements


def sizes(original: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Stored numbers and FLOPs, of the compressible layers and of the whole model."""
    from structmat.compression.budget import flops
    from structmat.compression.scan import scan
    from structmat.nn import StructuredLinear
    from structmat.structure import count_stored
    from structmat.structures.dense import Dense

    sites = scan(original).sites
    before = {"parameters": 0, "flops": 0}
    after = {"parameters": 0, "flops": 0}
    for site in sites:
        module = model.get_submodule(site.name)
        structure = module.structure if isinstance(module, StructuredLinear) else Dense()
        for totals, chosen in ((before, Dense()), (after, structure)):
            totals["parameters"] += count_stored(chosen, site.shape)
            totals["flops"] += flops(chosen, site.shape)
    whole = sum(p.numel() for p in original.parameters())
    return {
        "compressible": {"original": before, "compressed": after},
        "model_parameters": {
            "original": whole,
            "compressed": whole - before["parameters"] + after["parameters"],
        },
    }


def milliseconds(real: RealModel, original: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Medians of both models, run in turns in this process, and their ratio; the compressed one is frozen."""
    import structmat as sm
    from structmat.compression.timing import sized, time_models

    found = {}
    for size, batch in sized(real.sample(), real.batches).items():
        frozen = sm.freeze(model, rows=size * real.rows)
        (timing,) = time_models(original, frozen, {size: batch}, seconds=3.0)
        found[str(size)] = {"original": timing.before, "compressed": timing.after, "ratio": timing.ratio}
    return found


def disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir())


def peak() -> int:
    """Megabytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# ------------------------------------------------------------------------------------------------------ the driver


def clock_result(cell: Cell) -> Path:
    """Of seed 0: a step takes as long with another."""
    first = dataclasses.replace(cell, seed=0)
    return STUDY.with_name("compress_real_steps") / f"{first.key}.json"


def steps_within(cell: Cell, minutes: float) -> int:
    """How many steps of recovery fit; measured first where nobody has."""
    if not clock_result(cell).exists():
        in_own_process(cell, "steps")
    seconds: float = json.loads(clock_result(cell).read_text(encoding="utf-8"))["seconds"]
    return max(1, round(60 * minutes / seconds))


def in_own_process(cell: Cell, phase: str, *options: str) -> None:
    command = [sys.executable, "-m", "benchmarks.compress_real", "cell", "--phase", phase, "--key", cell.key, *options]
    outcome = subprocess.run(command, cwd=ROOT, check=False)
    if outcome.returncode:
        print(f"    failed with exit code {outcome.returncode}; the next run tries again", flush=True)


def run_steps(chosen: list[Cell]) -> None:
    """The seconds of a step of every cell whose first phase is done."""
    for cell in chosen:
        if cell.seed == 0 and cell.budget in RECOVERED and cell.result.exists() and not clock_result(cell).exists():
            print(f"seconds of a step: {cell.key}", flush=True)
            in_own_process(cell, "steps")


def run_times(chosen: list[Cell]) -> None:
    """Time every compressed model that is there."""
    for cell in chosen:
        if cell.result.exists() and (cell.folder / "before").exists():
            print(f"times: {cell.key}", flush=True)
            in_own_process(cell, "time")
    write_tables(STUDY, cells(3), RATE)


def run_menus(chosen: list[Cell]) -> None:
    """Low rank alone for each single layer, once a model."""
    for model in dict.fromkeys(cell.model for cell in chosen):
        if not menu_result(model).exists():
            print(f"menu of low rank: {model}", flush=True)
            in_own_process(next(c for c in chosen if c.model == model), "menu")
    write_tables(STUDY, cells(3), RATE)


def run_rates(chosen: list[Cell]) -> None:
    """The sweep of learning rates, of the cells whose first phase is done."""
    for cell, rate in itertools.product(chosen, RATES):
        is_swept = cell.method in SEEDED and cell.budget == RATE_BUDGET and cell.seed == 0
        if not is_swept or not cell.result.exists() or rate_result(cell, rate).exists():
            continue
        print(f"rate {rate:g}: {cell.key}", flush=True)
        steps = steps_within(cell, MODELS[cell.model].minutes / 3)
        in_own_process(cell, "rates", "--rate", str(rate), "--steps", str(steps))
    write_tables(STUDY, cells(3), RATE)


def run(phase: str, chosen: list[Cell]) -> None:
    """Run what is not done, each phase of a cell in its own process."""
    work: list[tuple[str, Cell]] = []
    for seed in sorted({c.seed for c in chosen}):
        own = [c for c in chosen if c.seed == seed]
        if phase != "recovery":
            work += [("before", c) for c in own if not c.result.exists()]
        if phase != "before":
            work += [("recovery", c) for c in own if c.budget in RECOVERED]
    for number, (step, cell) in enumerate(work, 1):
        if step == "recovery" and (
            not cell.result.exists() or json.loads(cell.result.read_text(encoding="utf-8"))["recovery"] is not None
        ):
            continue
        print(f"[{number}/{len(work)}] {step}: {cell.key}", flush=True)
        steps = ["--steps", str(steps_within(cell, MODELS[cell.model].minutes))] if step == "recovery" else []
        in_own_process(cell, step, *steps)
        write_tables(STUDY, cells(3), RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "cell", "table"), default="run")
    parser.add_argument("--phase", choices=PHASES, default="all")
    parser.add_argument("--model", choices=tuple(MODELS), action="append", help="only these models")
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help="only these methods")
    parser.add_argument("--budget", type=float, action="append", help="only these budgets")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds of ours and the best baseline")
    parser.add_argument("--seed", type=int, action="append", help="only these of them")
    parser.add_argument("--key", help="the cell that this process runs")
    parser.add_argument("--rate", type=float, help="the learning rate that this process tries")
    parser.add_argument("--steps", type=int, help="of recovery, that this process takes")
    options = parser.parse_args()
    if options.action == "table":
        write_tables(STUDY, cells(3), RATE)
        return
    require_data()
    if options.action == "cell":
        cell = next(c for c in cells(99) if c.key == options.key)
        if options.phase == "rates":
            write(rate_result(cell, options.rate), run_rate(cell, options.rate, options.steps))
        elif options.phase == "menu":
            menu = low_rank_menu(MODELS[cell.model])
            write(menu_result(cell.model), {"layers": menu, "environment": environment()})
        elif options.phase == "steps":
            write(clock_result(cell), step_seconds(cell))
        elif options.phase == "time":
            write(cell.result, run_time(cell))
        else:
            write(cell.result, run_before(cell) if options.phase == "before" else run_recovery(cell, options.steps))
        return
    chosen = [
        c
        for c in cells(options.seeds)
        if (not options.model or c.model in options.model)
        and (not options.method or c.method in options.method)
        and (not options.budget or c.budget in options.budget)
        and (not options.seed or c.seed in options.seed)
    ]
    if options.phase == "rates":
        run_rates(chosen)
    elif options.phase == "menu":
        run_menus(chosen)
    elif options.phase == "steps":
        run_steps(chosen)
    elif options.phase == "time":
        run_times(chosen)
    else:
        run(options.phase, chosen)


if __name__ == "__main__":
    main()
