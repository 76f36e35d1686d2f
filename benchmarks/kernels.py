"""Structured layers against dense ones on the clock: how much faster, and how close to what the machine can do.

    python -m benchmarks.kernels            sizes and batches that end within 20 minutes
    python -m benchmarks.kernels --full     all of them (hours)
    python -m benchmarks.kernels table      the tables again, from what is there

Every setting (shape, batch, dtype, pass, threads) runs in a process of its own and is written when it ends; an
interrupted run goes on where it stopped. Within a setting dense, reference and native run in turns: each is called
several times in a row (for about 2 milliseconds, twice at least), then the next one. A time is the median over turns of
the mean of these calls without the first, which finds its caches full of the others' weights and is reported apart.

*Efficiency* is the least time that the machine could need by the time that was needed. The least time is the larger of
two, plus one call of ``F.linear`` on 64 x 64: the bytes of input, output and weights at the rate of ``clone`` of so
many bytes; the operations at the rate of the dense layer of the same setting.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.files import RESULTS, ROOT, environment, write

STUDY = RESULTS / "kernels"

FORWARD, TRAINING = "forward", "training"
SHAPES = ((1024, 1024), (4096, 4096))
BATCHES = (1, 64, 256, 2048)
ALL_SHAPES = ((512, 512), *SHAPES, (2048, 2048), (8192, 8192), (3072, 768), (768, 3072), (11008, 4096), (4096, 11008))
ALL_BATCHES = (1, 16, 64, 256, 2048)

SECONDS = 2.0
"""To spend on a layer of a setting; at least seven turns are made."""

ROW_SECONDS = 2e-3
"""To spend on calls in a row."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all layers of one process have in common."""

    shape: tuple[int, int]
    batch: int
    dtype: str
    work: str
    threads: int

    @property
    def key(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}_{self.batch}_{self.dtype}_{self.work}_{self.threads}"

    @property
    def result(self) -> Path:
        return STUDY / f"{self.key}.json"


def settings(full: bool) -> list[Setting]:
    """Every setting, the most telling ones first."""
    threads = tuple(dict.fromkeys((os.cpu_count() or 1, 1)))
    some = [
        *itertools.product(SHAPES, BATCHES, ("float32",), (FORWARD,), threads[:1]),
        *itertools.product(SHAPES, (64, 256), ("float32",), (TRAINING,), threads[:1]),
        *itertools.product(SHAPES[1:], (256,), ("bfloat16",), (FORWARD,), threads[:1]),
    ]
    every = itertools.product(ALL_SHAPES, ALL_BATCHES, ("float32", "bfloat16"), (FORWARD, TRAINING), threads)
    return [Setting(*s) for s in dict.fromkeys([*some, *(every if full else ())])]


def layers(shape: tuple[int, int]) -> dict[str, Any]:
    """A member of every kind of family, at sizes as they are used."""
    import structmat as sm

    small = min(shape)
    root = 2 ** round((small.bit_length() - 1) / 2)
    return {
        "Monarch": sm.Monarch(blocks=root),
        "Butterfly": sm.Butterfly(),
        "Kronecker": sm.Kronecker(terms=1, factors=2),
        "BLAST": sm.BLAST(blocks=4, rank=small // 16),
        "BlockTensorTrain": sm.BlockTensorTrain(rank=2),
        "BlockDiagonal": sm.BlockDiagonal(blocks=8),
        "LowRank": sm.LowRank(rank=small // 16),
        "PivotedLowRank": sm.PivotedLowRank(rank=small // 16),
        "Sparse": sm.Sparse(density=0.1),
        "SparsePlusLowRank": sm.SparsePlusLowRank(rank=small // 32, density=0.02),
    }


# ------------------------------------------------------------------------------------------------------ one setting


def run_setting(setting: Setting) -> dict[str, Any]:
    """Time every layer of a setting."""
    torch.set_num_threads(setting.threads)
    dtype: torch.dtype = getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(0)
    tiny, one = torch.randn(64, 64, generator=generator), torch.randn(1, 64, generator=generator)
    with torch.inference_mode():
        call = in_turns({"call": lambda: F.linear(one, tiny)}, 0.2)[1]["call"]
    rows = []
    for name, structure in layers(setting.shape).items():
        print(f"    {structure}", flush=True)
        rows.append({"family": name, **run_layer(setting, structure, dtype, generator, statistics.median(call))})
    return {"setting": dataclasses.asdict(setting), "layers": rows, "environment": environment()}


def run_layer(
    setting: Setting, structure: Any, dtype: torch.dtype, generator: torch.Generator, call: float
) -> dict[str, Any]:
    """One layer beside the dense one."""
    import structmat as sm
    from structmat.structure import count_stored, resolve

    height, width = setting.shape
    structure = resolve(structure, setting.shape)
    weight = torch.randn(height, width, generator=generator).to(dtype)
    layer = sm.nn.StructuredLinear(width, height, bias=False, structure=structure, generator=generator).to(dtype)
    x = torch.randn(setting.batch, width, generator=generator).to(dtype)
    flops, stored = layer.matrix.flops, count_stored(structure, setting.shape)
    works = worker(setting, x, generator)
    module = layer if setting.work == TRAINING else layer.freeze(setting.batch)

    def on(backend: str) -> Callable[[], object]:
        def run() -> object:
            with sm.backend(backend):
                return works(module, list(layer.parameters()))

        return run

    dense = weight.requires_grad_(setting.work == TRAINING)
    runs = {
        "dense": lambda: works(lambda v: F.linear(v, dense), [dense]),
        "auto": lambda: works(module, list(layer.parameters())),
    }
    for backend in ("reference", "native"):
        try:
            on(backend)()
        except sm.errors.StructureError:
            continue
        runs[backend] = on(backend)
    firsts, times = in_turns(runs, SECONDS)
    medians = {name: statistics.median(found) for name, found in times.items()}
    passes = 3 if setting.work == TRAINING else 1
    moved = passes * (setting.batch * (height + width) + stored) * x.element_size()
    source = torch.empty(max(1, moved // 2 // 4))
    with torch.inference_mode():
        clone = in_turns({"clone": source.clone}, 0.2)[1]["clone"]
    operations = passes * setting.batch * flops
    rate = passes * setting.batch * 2 * height * width / medians["dense"]
    floor = max(statistics.median(clone), operations / rate) + call
    return {
        "structure": str(structure),
        "stored": stored,
        "operations_ratio": 2 * height * width / flops,
        "microseconds": {name: 1e6 * value for name, value in medians.items()},
        "dense_by": ratios(times),
        "dense_by_first": ratios(firsts),
        "efficiency": floor / medians["auto"],
    }


Times = dict[str, list[float]]


def in_turns(runs: dict[str, Callable[[], object]], seconds: float, fewest: int = 7) -> tuple[Times, Times]:
    """Seconds of the first call of each turn, and of the mean of those that follow it in a row."""
    calls = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = min(100, max(1, math.ceil(ROW_SECONDS / max(time.perf_counter() - start, 1e-9))))
    firsts: Times = {name: [] for name in runs}
    rest: Times = {name: [] for name in runs}
    names, begin = list(runs), time.perf_counter()
    while len(firsts[names[0]]) < fewest or time.perf_counter() - begin < seconds:
        for name in names:
            run = runs[name]
            start = time.perf_counter()
            run()
            middle = time.perf_counter()
            for _ in range(calls[name]):
                run()
            firsts[name].append(middle - start)
            rest[name].append((time.perf_counter() - middle) / calls[name])
        names.reverse()  # nobody always follows the same one
    return firsts, rest


def ratios(times: Times) -> dict[str, float]:
    """Medians over turns of the time of dense by that of each."""
    return {
        name: statistics.median(d / t for d, t in zip(times["dense"], found, strict=True))
        for name, found in times.items()
    }


def worker(setting: Setting, x: Tensor, generator: torch.Generator) -> Callable[[Any, list[Tensor]], object]:
    """What is timed of a layer: its output, or its output and all gradients."""
    if setting.work == FORWARD:

        def forward(module: Any, _: list[Tensor]) -> object:
            with torch.inference_mode():
                return module(x)

        return forward
    given = torch.randn(setting.batch, setting.shape[0], generator=generator).to(x.dtype)
    wanted = x.clone().requires_grad_()

    def training(module: Any, parameters: list[Tensor]) -> object:
        return torch.autograd.grad(module(wanted), [wanted, *parameters], given)

    return training


# ----------------------------------------------------------------------------------------------------------- tables


def write_table() -> None:
    """``kernels.md`` from every setting that is done."""
    done = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(STUDY.glob("*.json"))]
    by_key = {Setting(**{**d["setting"], "shape": tuple(d["setting"]["shape"])}): d for d in done}
    lines = [
        "# Structured layers on the clock",
        "",
        "Written by `python -m benchmarks.kernels`. *Times faster* is the median over turns of the time of dense "
        "`F.linear` by that of the layer, as it chooses its backend by itself; *reference* and *native* are the "
        "backends alone (a dash: it can't run there), all for calls in a row. *First* is the ratio of first calls, "
        "right after the other layers filled the caches. *Operations* is the same ratio of operations. Forward is "
        "without gradients, of the frozen layer; training is forward and all gradients. *Efficiency*: see the "
        "benchmark's first lines.",
    ]
    order = {setting: number for number, setting in enumerate(settings(full=True))}
    for setting in sorted(by_key, key=lambda s: order.get(s, len(order))):
        result = by_key[setting]
        facts = result["environment"]
        lines += [
            "",
            f"## {setting.shape[0]} x {setting.shape[1]}, batch {setting.batch}, {setting.dtype}, {setting.work}, "
            f"{setting.threads} thread{'s' if setting.threads > 1 else ''}",
            "",
            f"{facts['processor']} ({facts['native']}), torch {facts['torch']}; dense takes "
            f"{statistics.median(r['microseconds']['dense'] for r in result['layers']):.0f} microseconds.",
            "",
            "| layer | microseconds | times faster | first | operations | reference | native | efficiency |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in result["layers"]:
            by = row["dense_by"]
            alone = [f"{by[name]:.2f}" if name in by else "—" for name in ("reference", "native")]
            lines.append(
                f"| `{row['structure']}` | {row['microseconds']['auto']:.1f} | {by['auto']:.2f} | "
                f"{row['dense_by_first']['auto']:.2f} | "
                f"{row['operations_ratio']:.1f} | {alone[0]} | {alone[1]} | {row['efficiency']:.2f} |"
            )
    STUDY.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "setting", "table"), default="run")
    parser.add_argument("--full", action="store_true", help="all shapes, batches, dtypes and passes")
    parser.add_argument("--again", action="store_true", help="settings that are done, too")
    parser.add_argument("--key", help="the setting that this process runs")
    options = parser.parse_args()
    chosen = settings(options.full)
    if options.action == "setting":
        setting = next(s for s in settings(full=True) if s.key == options.key)
        write(setting.result, run_setting(setting))
        return
    for number, setting in enumerate(chosen if options.action == "run" else (), 1):
        if setting.result.exists() and not options.again:
            continue
        print(f"[{number}/{len(chosen)}] {setting.key}", flush=True)
        command = [sys.executable, "-m", "benchmarks.kernels", "setting", "--key", setting.key]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            print("    failed; the next run tries again", flush=True)
        write_table()
    write_table()


if __name__ == "__main__":
    main()
