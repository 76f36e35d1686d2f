"""Whole models before and after: prefill and one token, batch 1 and 64, the compressed model also after ``sm.tune``.

    python -m benchmarks.end_to_end                 every cell that is not done
    python -m benchmarks.end_to_end --minutes 3     no new cell after 3 minutes
    python -m benchmarks.end_to_end table           the table again, from what is there

- ``novel-lm``: the language model of the data folder, compressed by ``compress`` (every family). What
  ``benchmarks.compress_real`` left in ``build/compress_real``, or in the folder that ``--compressed`` names, is loaded;
  without it the model is compressed here, without recovery, which changes no time.
- ``gpt2-small`` and ``llama-1b``: one block of that shape with random weights, every linear layer of one family.

A cell (model, budget, phase, batch, threads) runs in a process of its own and is written when it ends: an interrupted
run goes on where it stopped. Within a cell the original and all compressed models run in turns, frozen for the number
of rows; then they are tuned, where layers may hold their dense matrix, and run in turns once more.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.files import RESULTS, ROOT, environment, write

STUDY = RESULTS / "end_to_end"

COMPRESSED = ROOT / "build" / "compress_real"

PREFILL, TOKEN = "prefill", "token"

PAST = 256
"""Tokens before the one that is added."""

SECONDS = 2.0
"""To spend on the models of a cell, twice: before and after tuning. At least seven turns are made."""

Build = Callable[[int, int, bool], nn.Module]
"""A linear layer of so many inputs and outputs, with a bias or without."""

Past = tuple[Tensor, Tensor]
"""Keys and values (batch, heads, tokens, width of a head)."""

Run = Callable[[], object]


# ----------------------------------------------------------------------------------------------------------- blocks


class GPT2Block(nn.Module):
    """A transformer block of GPT-2 small: 12 heads, normalization before each half, GELU."""

    width, heads, inner = 768, 12, 3072

    def __init__(self, linear: Build) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        self.qkv, self.out = linear(self.width, 3 * self.width, True), linear(self.width, self.width, True)
        self.up, self.down = linear(self.width, self.inner, True), linear(self.inner, self.width, True)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """``x`` (batch, tokens, width)."""
        q, k, v = (_heads(t, self.heads) for t in self.qkv(self.first(x)).chunk(3, dim=-1))
        x = x + self.out(_attention(q, k, v, past))
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))

    def past(self, batch: int, tokens: int) -> Past:
        """Random keys and values."""
        return tuple(torch.randn(2, batch, self.heads, tokens, self.width // self.heads))


class LlamaBlock(nn.Module):
    """A transformer block of a Llama of a billion parameters: 32 heads with 8 for keys and values, SwiGLU."""

    width, heads, key_heads, inner = 2048, 32, 8, 8192

    def __init__(self, linear: Build) -> None:
        super().__init__()
        size = self.width // self.heads
        self.first, self.second = nn.RMSNorm(self.width), nn.RMSNorm(self.width)
        self.q, self.out = (linear(self.width, self.width, False) for _ in range(2))
        self.k, self.v = (linear(self.width, self.key_heads * size, False) for _ in range(2))
        self.gate, self.up = (linear(self.width, self.inner, False) for _ in range(2))
        self.down = linear(self.inner, self.width, False)
        self.register_buffer("speeds", 500_000.0 ** (-torch.arange(0, size, 2) / size))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """``x`` (batch, tokens, width)."""
        y, begin = self.first(x), 0 if past is None else past[0].shape[2]
        angles = torch.outer(torch.arange(begin, begin + x.shape[1]), self.speeds)
        q, k = _rotated(_heads(self.q(y), self.heads), angles), _rotated(_heads(self.k(y), self.key_heads), angles)
        x = x + self.out(_attention(q, k, _heads(self.v(y), self.key_heads), past))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def past(self, batch: int, tokens: int) -> Past:
        """Random keys and values."""
        return tuple(torch.randn(2, batch, self.key_heads, tokens, self.width // self.heads))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, past: Past | None) -> Tensor:
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


# ------------------------------------------------------------------------------------------------------------ cells


@dataclasses.dataclass(frozen=True)
class Cell:
    """The original and the compressed models that run in turns.

    Args:
        model: its name.
        budget: share of the parameters of the linear layers.
        phase: ``"prefill"``, or ``"token"``: one more after 256.
        batch: sequences.
        threads: of PyTorch.
    """

    model: str
    budget: float
    phase: str
    batch: int
    threads: int

    @property
    def tokens(self) -> int:
        """Of each sequence. Prefilling 64 sequences of a large block would take many seconds."""
        return 1 if self.phase == TOKEN else 256 if self.batch == 1 or self.model == "novel-lm" else 32

    @property
    def key(self) -> str:
        return f"{self.model}_{self.budget:g}_{self.phase}_{self.batch}_{self.threads}"

    @property
    def result(self) -> Path:
        return STUDY / f"{self.key}.json"


def cells() -> list[Cell]:
    """All of them; one thread for the smaller budget only."""
    many = os.cpu_count() or 1
    budgets = {"novel-lm": (0.25, 0.5), "gpt2-small": (0.25, 0.125), "llama-1b": (0.25, 0.125)}
    found = []
    for model, own in budgets.items():
        for budget, phase, batch in itertools.product(own, (TOKEN, PREFILL), (1, 64)):
            found.append(Cell(model, budget, phase, batch, many))
        found += [Cell(model, 0.25, phase, 1, 1) for phase in (TOKEN, PREFILL)]
    return list(dict.fromkeys(found))


def structures(budget: float) -> dict[str, Any]:
    """Of all linear layers of a block."""
    import structmat as sm

    return {
        "Monarch, 4 blocks": sm.Monarch(blocks=4, rank=budget),
        "Monarch, 16 blocks": sm.Monarch(blocks=16, rank=budget),
        "BLAST, 4 blocks": sm.BLAST(blocks=4, rank=budget),
        "low rank": sm.LowRank(rank=budget),
        "block diagonal": sm.BlockDiagonal(blocks=round(1 / budget)),
    }


def block(kind: Callable[[Build], nn.Module], structure: Any | None) -> nn.Module:
    """A block with random weights; dense without a structure."""
    import structmat as sm

    def linear(inputs: int, outputs: int, bias: bool) -> nn.Module:
        if structure is None:
            return nn.Linear(inputs, outputs, bias)
        return sm.nn.StructuredLinear(inputs, outputs, bias, structure=structure)

    return kind(linear).eval()


def language_model(cell: Cell, folder: Path) -> nn.Module:
    """The compressed language model: loaded, recovered or not, or made."""
    import structmat as sm
    from benchmarks.compress_cells import Cell as StudyCell
    from benchmarks.compress_phases import compressed
    from benchmarks.real_models import MODELS

    real, own = MODELS[cell.model], StudyCell(cell.model, "ours", cell.budget, 0)
    for state in ("after", "before"):
        if (folder / own.key / state).is_dir():
            return sm.load(folder / own.key / state, real.load())
    if not (own.folder / "before").is_dir():
        made, _ = compressed(own, real)
        sm.save(made, own.folder / "before")
    return sm.load(own.folder / "before", real.load())


def models(cell: Cell, folder: Path) -> dict[str, nn.Module]:
    """The original first."""
    if cell.model == "novel-lm":
        from benchmarks.real_models import MODELS

        return {"original": MODELS[cell.model].load(), "compressed": language_model(cell, folder)}
    kind = {"gpt2-small": GPT2Block, "llama-1b": LlamaBlock}[cell.model]
    built = {name: block(kind, structure) for name, structure in structures(cell.budget).items()}
    return {"original": block(kind, None), **built}


def runner(cell: Cell, model: nn.Module) -> Run:
    """One call of the model as the cell wants it."""
    if cell.model == "novel-lm":
        return _language_run(cell, model)
    x = torch.randn(cell.batch, cell.tokens, model.width, generator=torch.Generator().manual_seed(0))
    past = model.past(cell.batch, PAST) if cell.phase == TOKEN else None
    return lambda: model(x, past)


def _language_run(cell: Cell, model: nn.Module) -> Run:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        return torch.randint(90, (cell.batch, count), generator=generator)

    if cell.phase == PREFILL:
        x = tokens(cell.tokens)
        return lambda: model(input_ids=x, use_cache=False)
    past, one = model(input_ids=tokens(PAST), use_cache=True).past_key_values, tokens(1)

    def run() -> None:
        model(input_ids=one, past_key_values=past, use_cache=True)
        past.crop(-1)

    return run


# ----------------------------------------------------------------------------------------------------- measurements


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Time all models of a cell in turns, then tune them, and time them again."""
    import structmat as sm
    from structmat.compression.timing import interleaved

    torch.set_num_threads(cell.threads)
    torch.manual_seed(0)
    rows = cell.batch * cell.tokens
    own = models(cell, folder)
    facts = {name: sizes(own["original"], model) for name, model in own.items()}
    frozen = {name: model if name == "original" else sm.freeze(model, rows=rows) for name, model in own.items()}
    del own
    with torch.inference_mode():
        calls = [runner(cell, model) for model in frozen.values()]
        plain = interleaved(*calls, seconds=SECONDS)
        tunings = [sm.tune(model, [rows], allow_dense=True) for model in list(frozen.values())[1:]]
        tuned = interleaved(*calls, seconds=SECONDS)
    found = []
    for number, name in enumerate(list(frozen)[1:], 1):
        chosen = [entry.chosen.value for entry in tunings[number - 1].layers]
        found.append(
            {
                "name": name,
                **facts[name],
                "frozen": times(plain, number),
                "tuned": {
                    **times(tuned, number),
                    "ways": {way: chosen.count(way) for way in sorted(set(chosen))},
                    "dense_bytes": tunings[number - 1].dense_bytes,
                },
            }
        )
    return {
        "cell": {**dataclasses.asdict(cell), "tokens": cell.tokens},
        "turns": len(plain[0]),
        "models": found,
        "environment": environment(),
        "command": "python -m benchmarks.end_to_end",
    }


def times(measured: tuple[list[float], ...], number: int) -> dict[str, float]:
    """Medians of the original's and a model's milliseconds, and over turns of how many times faster it is."""
    before, after = measured[0], measured[number]
    return {
        "before": 1e3 * statistics.median(before),
        "after": 1e3 * statistics.median(after),
        "faster": statistics.median(b / a for b, a in zip(before, after, strict=True)),
    }


def sizes(original: nn.Module, model: nn.Module) -> dict[str, float]:
    """Stored numbers and operations of the linear layers that may be replaced, of dense by structured."""
    from structmat.compression.budget import flops
    from structmat.compression.scan import scan
    from structmat.nn import StructuredLinear
    from structmat.structure import count_stored
    from structmat.structures.dense import Dense

    totals = {"parameters": [0, 0], "operations": [0, 0]}
    for site in scan(original).sites:
        module = model.get_submodule(site.name)
        chosen = module.structure if isinstance(module, StructuredLinear) else Dense()
        for which, structure in enumerate((Dense(), chosen)):
            totals["parameters"][which] += count_stored(structure, site.shape)
            totals["operations"][which] += flops(structure, site.shape)
    return {name: before / after for name, (before, after) in totals.items()}


# ----------------------------------------------------------------------------------------------------------- tables


def write_table() -> None:
    """``end_to_end.md`` from every cell that is done."""
    done = {cell: json.loads(cell.result.read_text(encoding="utf-8")) for cell in cells() if cell.result.exists()}
    machines = {
        f"{r['environment']['processor']} ({r['environment']['native']}), {r['environment']['cores']} cores, torch "
        f"{r['environment']['torch']}, structmat {r['environment']['structmat']} ({r['environment']['commit']})"
        for r in done.values()
    }
    lines = [
        "# Whole models before and after",
        "",
        "Written by `python -m benchmarks.end_to_end`. Milliseconds are medians, of models that run in turns in one "
        "process, float32; *times faster* is the median over turns of the original's time by that of the model. "
        "*Prefill* reads all tokens of a sequence at once, *token* adds one to 256. *Parameters* and *operations* are "
        "those of the dense linear layers by those of the structured ones. Frozen models choose the backend by the "
        "cost model; *tuned* ones by `sm.tune(..., allow_dense=True)`, which held so many MB of dense matrices beside.",
        "",
        f"Machine: {'; '.join(sorted(machines)) or 'none yet'}.",
    ]
    head = "model|threads|before, ms|after, ms|times faster|tuned, ms|times faster|dense MB|parameters|operations"
    for model, budget in dict.fromkeys((cell.model, cell.budget) for cell in done):
        lines += ["", f"## {model}, {budget:.1%} of the parameters", ""]
        lines += [_row(["phase", "batch x tokens", *head.split("|")]), _row(["---"] * (2 + len(head.split("|"))))]
        for cell, result in done.items():
            for found in result["models"] if (cell.model, cell.budget) == (model, budget) else ():
                frozen, tuned = found["frozen"], found["tuned"]
                lines.append(
                    _row(
                        [
                            cell.phase,
                            f"{cell.batch} x {cell.tokens}",
                            found["name"],
                            str(cell.threads),
                            _three(frozen["before"]),
                            _three(frozen["after"]),
                            f"{frozen['faster']:.2f}",
                            _three(tuned["after"]),
                            f"{tuned['faster']:.2f}",
                            f"{tuned['dense_bytes'] / 2**20:.1f}",
                            f"{found['parameters']:.2f}",
                            f"{found['operations']:.2f}",
                        ]
                    )
                )
    STUDY.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(entries: list[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _three(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "cell", "table"), default="run")
    parser.add_argument("--key", action="append", help="this cell only, by the name of its file; may be repeated")
    parser.add_argument("--again", action="store_true", help="cells that are done, too")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no new cell is begun")
    parser.add_argument("--compressed", type=Path, default=COMPRESSED, help="what benchmarks.compress_real left")
    options = parser.parse_args()
    chosen = [cell for cell in cells() if not options.key or cell.key in options.key]
    if options.action == "cell":
        with tempfile.TemporaryDirectory() as folder:
            os.environ["STRUCTMAT_CACHE"] = folder  # what was measured before decides nothing
            write(chosen[0].result, run_cell(chosen[0], options.compressed))
        return
    begin = time.monotonic()
    for number, cell in enumerate(chosen if options.action == "run" else (), 1):
        if cell.result.exists() and not options.again:
            continue
        if time.monotonic() - begin > 60 * options.minutes:
            break
        print(f"[{number}/{len(chosen)}] {cell.key}", flush=True)
        command = [sys.executable, "-m", "benchmarks.end_to_end", "cell", "--key", cell.key]
        done = subprocess.run([*command, "--compressed", str(options.compressed)], cwd=ROOT, check=False)
        if done.returncode:
            print("    failed; the next run tries again", flush=True)
        write_table()
    write_table()


if __name__ == "__main__":
    main()
