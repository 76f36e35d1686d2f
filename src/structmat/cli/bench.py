"""structmat bench"""

from __future__ import annotations

from typing import Annotated

import typer

from structmat.cli.common import fail, refusing_bad_input, show, show_json


def bench(
    size: Annotated[str, typer.Option(help="Shape of the layer: OUTxIN, or one number.")] = "1024",
    budget: Annotated[float, typer.Option(help="Share of the dense parameters.")] = 0.25,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Rows; may be repeated.")] = None,
    family: Annotated[list[str] | None, typer.Option("--family", help="Only this family; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="To spend on each layer and batch size.")] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time structured layers against nn.Linear on this machine, run in turns (float32, no gradients)."""
    with refusing_bad_input():
        import statistics
        from functools import partial

        import torch
        from rich.progress import track
        from rich.table import Table
        from rich.text import Text

        from structmat.cli.common import words
        from structmat.compression.candidates import families_of
        from structmat.compression.report import environment
        from structmat.compression.timing import interleaved
        from structmat.nn.linear import StructuredLinear
        from structmat.structure import check_shape, count_stored, resolve
        from structmat.structures.dense import Dense

        if not 0 < budget < 1:
            raise fail(f"--budget {budget} lies not strictly between 0 and 1.")
        try:
            numbers = [int(part) for part in size.lower().split("x")]
        except ValueError as error:
            raise fail(f"--size {size} is not OUTxIN, such as 1024x4096.") from error
        shape = check_shape(numbers * 2 if len(numbers) == 1 else numbers)
        batches = batch or [1, 64, 1024]
        structures = []
        for kind in families_of(family or None):
            if kind is not Dense:
                structures += [resolve(s, shape) for s in kind.configurations(shape, int(budget * shape[0] * shape[1]))]
        if not structures:
            raise fail(f"No family has a member of {shape[0]} x {shape[1]} within {budget:.2%} of its parameters.")
        generator = torch.Generator().manual_seed(0)
        dense = torch.nn.Linear(shape[1], shape[0])
        rows = []
        with torch.inference_mode():
            for structure in track(structures, description="bench", console=words(), transient=True):
                layer = StructuredLinear(shape[1], shape[0], structure=structure, generator=generator)
                times = {}
                for count in batches:
                    x = torch.randn(count, shape[1], generator=generator)
                    first, second = interleaved(partial(dense, x), partial(layer, x), seconds=seconds)
                    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
                    times[count] = (1e6 * statistics.median(first), 1e6 * statistics.median(second), ratio)
                rows.append(
                    (structure, count_stored(structure, shape) / (shape[0] * shape[1]), layer.matrix.flops, times)
                )
        facts = environment()
        if as_json:
            show_json(
                {
                    "environment": facts,
                    "shape": list(shape),
                    "layers": [
                        {
                            "structure": str(structure),
                            "share": share,
                            "flops": flops,
                            "microseconds": [
                                {"batch": c, "dense": t[0], "structured": t[1], "ratio": t[2]} for c, t in times.items()
                            ],
                        }
                        for structure, share, flops, times in rows
                    ],
                }
            )
            return
        table = Table(
            title=f"{shape[0]} x {shape[1]}, float32: microseconds (multiple of nn.Linear)",
            caption=f"{facts['processor']}, threads: {facts['threads']}, torch {facts['torch']}",
        )
        table.add_column("layer")
        table.add_column("parameters", justify="right")
        for count in batches:
            table.add_column(f"batch {count}", justify="right")
        medians = [statistics.median(times[c][0] for *_, times in rows) for c in batches]
        table.add_row("nn.Linear", "100 %", *(f"{m:.1f}" for m in medians))
        for structure, share, _, times in rows:
            cells = [
                Text(f"{after:.1f} ({ratio:.2f})", style="green" if ratio < 0.97 else "red" if ratio > 1.03 else "")
                for _, after, ratio in times.values()
            ]
            table.add_row(str(structure), f"{share:.1%}", *cells)
        show(table)
