"""The cells of the study of trained models, and the files in which their results and models lie."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

from benchmarks.compress_methods import DENSE, LOW_RANK, METHODS, OURS, applies
from benchmarks.files import RESULTS, ROOT
from benchmarks.real_models import MODELS

WORK = ROOT / "build" / "compress_real"
STUDY_FOLDER = RESULTS / "compress_real"

BUDGETS = (0.5, 0.25)
"""Shares of the parameters of the compressible layers."""

SWEPT = 0.25
"""The budget at which learning rates are tried, for both: there recovery has most to do."""

SEEDED = (OURS, LOW_RANK)
"""Ours and the best baseline get three seeds, the others one."""


def place(results: Path | None, work: Path | None) -> None:
    """Other folders than the study's, where they are given."""
    global STUDY_FOLDER, WORK
    if results is not None:
        STUDY_FOLDER = results.resolve() / STUDY_FOLDER.name
        work = work or results / "work"  # never among the study's own
    if work is not None:
        WORK = work.resolve()


def placed() -> tuple[str, ...]:
    """The options of the command line that say where a process of a cell writes."""
    return ("--results", str(STUDY_FOLDER.parent), "--work", str(WORK))


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
