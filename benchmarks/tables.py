"""The figures of a study as Markdown and one JSON file."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "ours"

REFERENCE = "whitened SVD, uniform"
"""The baseline whose loss of quality "excess removed" refers to."""


TARGETS = {
    ("resnet-20", 0.5): "91.2 %",
    ("resnet-20", 0.25): "90.0 %",
    ("resnet-56", 0.5): "93.2 %",
    ("resnet-56", 0.25): "92.3 %",
    ("novel-lm", 0.5): "0.015 bits more than the original",
    ("novel-lm", 0.25): "0.06 bits more than the original",
    ("g2p-gru", 0.5): "10.3 %",
    ("g2p-gru", 0.25): "11.0 %",
    ("char-lstm", 0.5): "1.925 bits",
    ("char-lstm", 0.25): "1.96 bits",
    ("mnist-mlp", 0.5): "98.3 %",
    ("mnist-mlp", 0.25): "98.3 %",
}
"""What our way should reach after the short recovery, by model and budget."""


def write_tables(folder: Path, cells: Iterable[Any]) -> None:
    """``<folder>.json`` with every cell that is done and ``<folder>.md`` with the tables; cells not run are marked."""
    planned = list(cells)
    done = {c.key: json.loads(c.result.read_text(encoding="utf-8")) for c in planned if c.result.exists()}
    tuned = {path.stem: _read(path)["milliseconds"] for path in folder.with_name(f"{folder.name}_tuned").glob("*.json")}
    data = {"cells": done, "tuned": tuned, "not_run": [c.key for c in planned if c.key not in done]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    lines = ["# Trained models under a budget", "", *_preface(done.values())]
    groups: dict[tuple[str, float], list[Any]] = defaultdict(list)
    for cell in planned:
        groups[cell.model, cell.budget].append(cell)
    for (model, budget), members in groups.items():
        lines += ["", f"## {model}, {budget:.0%} of the parameters of its compressible layers", ""]
        if (model, budget) in TARGETS:
            lines += [f"Target after recovery: {TARGETS[model, budget]}.", ""]
        lines += _table(members, done, tuned)
    lines += _rates(folder.with_name(f"{folder.name}_rates"))
    lines += _frontier(folder.with_name(f"{folder.name}_frontier") / "novel-lm.json")
    lines += _quality(folder.with_name(f"{folder.name}_quality") / "novel-lm.json")
    folder.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    menus = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))["layers"]
        for path in folder.with_name(f"{folder.name}_low_rank").glob("*.json")
    }
    layers = [
        line
        for cell in planned
        if cell.key in done and cell.model in menus
        for line in _layers(cell, done[cell.key], menus[cell.model])
    ]
    if layers:
        text = ["# Ours beside low rank alone, layer by layer", "", _LAYERS, *layers]
        folder.with_name(f"{folder.name}_layers.md").write_text("\n".join(text) + "\n", encoding="utf-8")


_LAYERS = (
    "What each layer became, and the best low rank that holds no more parameters (of every size on the grid, a "
    "multiple of 8), with the rise of the loss that the steps of `compress` predict for either: nats of the model's "
    "own loss for this layer replaced alone, the prediction corrected by measured effects. What low rank alone does "
    'for whole models is the row "low rank, allocated" of the main tables. Seed 0. Layers where low rank itself was '
    "chosen, or that were kept, are left out."
)


def _layers(cell: Any, result: dict[str, Any], menu: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """A table of the layers of one cell where another structure than low rank won."""
    chosen = [] if cell.seed or cell.method != OURS else result.get("chosen", [])
    rows = [r for r in chosen if not r["structure"].startswith(("LowRank", "Dense"))]
    if not rows:
        return []
    better, table = 0, []
    for row in rows:
        smaller = [c for c in menu[row["layer"]] if c["parameters"] <= row["parameters"]]
        best = min(smaller, key=lambda c: c["loss"], default=None)
        better += best is None or row["loss"] < best["loss"]
        table.append(
            (
                f"`{row['layer']}`",
                f"`{row['structure']}`",
                f"{row['parameters']:.1%}",
                f"{row['loss']:.1e}",
                f"`{best['structure']}`" if best else "—",
                f"{best['loss']:.1e}" if best else "—",
            )
        )
    title = f"## {cell.model}, {cell.budget:.0%} of the parameters"
    note = f"{len(rows)} of {len(chosen)} layers; {better} of them better than low rank by the prediction."
    head = ("layer", "structure", "parameters", "predicted rise", "low rank", "its predicted rise")
    return ["", title, "", note, "", _row(head), _row(["---"] * len(head)), *map(_row, table)]


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _frontier(path: Path) -> list[str]:
    title = ["", "## Frontier of the language model from one screening, without recovery", ""]
    if not path.exists():
        return [*title, "Not run."]
    found = _read(path)
    busy, threads = found["processor_seconds"], found["threads"]
    note = (
        f"{found['seconds']:.0f} seconds in all, {busy:.0f} of the processor on each of {threads} threads; asked: 600. "
        "Evaluated on validation text."
    )
    points = [p for p in found["frontier"] if p.get("quality")]
    rows = [(f"{p['share']:.1%}", ", ".join(f"{v:.4f}" for v in p["quality"].values())) for p in points]
    head = ("size", "bits per character")
    return [*title, note, "", _row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _quality(path: Path) -> list[str]:
    title = ["", "## A quality to keep", ""]
    if not path.exists():
        return [*title, "Not run."]
    found = _read(path)
    lost = found["unseen"]["compressed"] - found["unseen"]["original"]
    return [
        *title,
        f"`Quality(loss={found['loss']})` on validation text, in bits per character: {found['share']:.1%} of the "
        f"parameters remain. On the test book, which neither `evaluate` nor training has seen, {lost:.4f} are lost: "
        f"the promise is {'kept' if found['kept'] else 'not kept'}.",
    ]


def _rates(folder: Path) -> list[str]:
    """The sweep of learning rates: the distance from the original on held-out training data."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not found:
        return []
    rates = sorted({r["rate"] for r in found})
    head = ("model", "method", "budget", "steps", "before", *(f"{rate:g}" for rate in rates))
    rows: dict[tuple[str, ...], dict[float, float]] = defaultdict(dict)
    for r in found:
        cell = r["cell"]
        before = f"{r['held_out']['before']:.4f}"
        key = (cell["model"], cell["method"], f"{cell['budget']:.0%}", str(r["steps"]), before)
        rows[key][r["rate"]] = r["held_out"]["best"]
    table = [(*key, *(f"{own[rate]:.4f}" if rate in own else "—" for rate in rates)) for key, own in rows.items()]
    note = (
        "Distance from the original on held-out training data after a third of the recovery at each rate (seed 0): the "
        "divergence of the outputs, per prediction, in nats. The whole recovery has the best of these rates, at both "
        "budgets."
    )
    return ["", "## Learning rates", "", note, "", _row(head), _row(["---"] * len(head)), *map(_row, table)]


def _preface(results: Iterable[dict[str, Any]]) -> list[str]:
    machines = sorted({f"{r['environment']['processor']}, {r['environment']['cores']} cores" for r in results})
    return [
        "Written by `python -m benchmarks.compress_real`; figures of every cell in `compress_real.json`.",
        f"Machines: {'; '.join(machines) or 'none yet'}. Times are medians, both models run in turns in one process.",
        "",
        f'*Excess removed* is the share of the loss of quality of "{REFERENCE}" (before recovery, same budget) that is '
        "gone. Where there are several seeds: mean ± standard deviation (number of seeds). "
        "Recovery is distillation from the original, for the recurrent nets by SOAP, for g2p-gru with the task's own "
        "loss beside it, with the same settings for every method of a model, but that our sparse layers choose their "
        "entries meanwhile for char-lstm (`Distill(thin=0.5)`), for as many steps as fit into the same minutes of the "
        "processor, which are said: cells with fewer than others are of an earlier study. "
        "*Time* is that of the frozen compressed model by that of the original, at several batch sizes; *tuned* after "
        "`sm.tune`.",
    ]


def _table(
    members: Sequence[Any], done: dict[str, dict[str, Any]], tuned: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    head = (
        "method",
        "before recovery",
        "excess removed",
        "after recovery",
        "recovery",
        "parameters",
        "FLOPs",
        "time",
        "tuned",
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
            rows.append((method, "not run", *"—" * (len(head) - 2)))
            continue
        first = results[0]
        metric, original = first["metric"], f"{first['quality']['original']:.4f}"
        rows.append(
            (
                method,
                _spread([r["quality"]["before"] for r in results], 4),
                _excess(results, reference, method),
                _spread([r["quality"]["after"] for r in results if r["quality"]["after"] is not None], 4),
                _recovery(results),
                f"{_share(first, 'parameters'):.1%}",
                f"{_share(first, 'flops'):.1%}" if "flops" in first["compressible"]["original"] else "—",
                _times(first["milliseconds"]),
                _times(next((tuned[c.key] for c in own if c.key in tuned), {})),
                f"{first['bytes']['compressed'] / first['bytes']['original']:.1%}",
                f"{first['peak_memory_mb']['before']} MB",
            )
        )
    note = f"Quality is {metric}; the original has {original}." if metric else "No cell of this table was run."
    return [note, "", _row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _times(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{t['ratio']:.2f} at {b}" for b, t in found.items()) or "—"


def _recovery(results: list[dict[str, Any]]) -> str:
    """Minutes and steps, of the first cell that was recovered."""
    found = next((r["recovery"] for r in results if r["recovery"] is not None), None)
    if found is None:
        return "not run"
    rate = f", rate {found['rate']:g}" if "rate" in found else ""
    return f"{found['minutes']:g} min, {found['steps']} steps{rate}"


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
