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

Every method is recovered in the same way and for the same time: 5 minutes, 1 for the perceptron, 6 for compressing and
recovery of the language model together (which runs on both cores: ``OMP_NUM_THREADS=2``; all others on one). Three
learning rates are tried for a third of the time each (seed 0, a quarter of the numbers); the recovery has, from the
beginning, the rate that ended best on held-out training data. What is measured is the processor's seconds of a step,
and every cell takes as many steps as fit. A processor whose neighbour is busy takes longer for a step: ``--phase
steps`` on a quiet machine first, and then a busy one delays the study but does not change its outcome.
``--minutes`` shortens recovery, to see that everything runs; its results are not written among the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import compress_cells
from benchmarks.compress_cells import (
    Cell,
    cells,
    clock_result,
    menu_result,
    rate_result,
    single_result,
    swept,
    table_cells,
    tune_result,
)
from benchmarks.compress_methods import METHODS, OURS, rates
from benchmarks.compress_phases import (
    low_rank_menu,
    run_before,
    run_frontier,
    run_quality,
    run_rate,
    run_recovery,
    run_time,
    run_tune,
    step_seconds,
)
from benchmarks.files import ROOT, environment, write
from benchmarks.real_models import MODELS, require_data
from benchmarks.tables import write_tables

FEWEST_MINUTES = 1.0
"""Of recovery where compressing took the rest."""


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
    """The learning rate at which recovery ends best on held-out data; tried first where nobody has, for a third of the
    time each.

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
    outcome = subprocess.run([*command, *compress_cells.placed()], cwd=ROOT, check=False)
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
    write_tables(compress_cells.STUDY_FOLDER, table_cells())


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
    compress_cells.place(options.results, options.work)
    if options.action == "table":
        write_tables(compress_cells.STUDY_FOLDER, table_cells())
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


if __name__ == "__main__":
    main()
