"""The figures of a study as Markdown and one JSON file."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

REFERENCE = "whitened SVD, uniform"
"""The baseline whose loss of quality "excess removed" refers to."""


def write_tables(folder: Path, cells: Iterable[Any]) -> None:
    """``<folder>.json`` with every cell that is done and ``<folder>.md`` with the tables; cells not run are marked."""
    planned = list(cells)
    done = {c.key: json.loads(c.result.read_text(encoding="utf-8")) for c in planned if c.result.exists()}
    data = {"cells": done, "not_run": [c.key for c in planned if c.key not in done]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    lines = ["# Trained models under a budget", "", *_preface(done.values())]
    groups: dict[tuple[str, float], list[Any]] = defaultdict(list)
    for cell in planned:
        groups[cell.model, cell.budget].append(cell)
    for (model, budget), members in groups.items():
        lines += ["", f"## {model}, {budget:.0%} of the parameters of its linear layers", ""]
        lines += _table(members, done)
    folder.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _preface(results: Iterable[dict[str, Any]]) -> list[str]:
    machines = sorted({f"{r['environment']['processor']}, {r['environment']['cores']} cores" for r in results})
    return [
        "Written by `python -m benchmarks.compress_real`; figures of every cell in `compress_real.json`.",
        f"Machines: {'; '.join(machines) or 'none yet'}. Times are medians, both models run in turns in one process.",
        "",
        f'*Excess removed* is the share of the loss of quality of "{REFERENCE}" (before recovery, same budget) that is '
        "gone. Where there are several seeds: mean ± standard deviation (number of seeds). A dash is a cell not run.",
    ]


def _table(members: Sequence[Any], done: dict[str, dict[str, Any]]) -> list[str]:
    head = (
        "method",
        "before recovery",
        "excess removed",
        "after recovery",
        "parameters",
        "FLOPs",
        "time",
        "disk",
        "memory",
    )
    rows = []
    methods: dict[str, list[Any]] = defaultdict(list)
    for cell in members:
        methods[cell.method].append(cell)
    reference = next((done[c.key] for c in methods.get(REFERENCE, []) if c.key in done), None)
    metric = original = ""
    for method, own in methods.items():
        results = [done[c.key] for c in own if c.key in done]
        if not results:
            rows.append((method, *"—" * (len(head) - 1)))
            continue
        first = results[0]
        metric, original = first["metric"], f"{first['quality']['original']:.4f}"
        rows.append(
            (
                method,
                _spread([r["quality"]["before"] for r in results], 4),
                _excess(results, reference, method),
                _spread([r["quality"]["after"] for r in results if r["quality"]["after"] is not None], 4),
                f"{_share(first, 'parameters'):.1%}",
                f"{_share(first, 'flops'):.1%}",
                ", ".join(f"{t['ratio']:.2f} at {b}" for b, t in first["milliseconds"].items()),
                f"{first['bytes']['compressed'] / first['bytes']['original']:.1%}",
                f"{first['peak_memory_mb']['before']} MB",
            )
        )
    note = f"Quality is {metric}; the original has {original}." if metric else "No cell of this table was run."
    return [note, "", _row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _share(result: dict[str, Any], unit: str) -> float:
    totals = result["compressible"]
    return float(totals["compressed"][unit] / totals["original"][unit])


def _excess(results: list[dict[str, Any]], reference: dict[str, Any] | None, method: str) -> str:
    if reference is None or method in (REFERENCE, "dense"):
        return "0" if method == REFERENCE else "—"
    quality = reference["quality"]
    loss = quality["before"] - quality["original"]
    if loss == 0:
        return "—"
    return _spread([100 * (1 - (r["quality"]["before"] - quality["original"]) / loss) for r in results], 1) + " %"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "—"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
