"""structmat bench"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structmat.cli.common import fail, refusing_bad_input, show, show_json

if TYPE_CHECKING:
    from structmat.benchmark import Setting


def bench(
    size: Annotated[list[str] | None, typer.Option("--size", help="OUTxIN, or one number; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Rows; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="As PyTorch names it; may be repeated.")] = None,
    work: Annotated[
        list[str] | None, typer.Option("--work", help="forward, training, reused or tuned; may be repeated.")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option("--threads", min=1, help="May be repeated.")] = None,
    family: Annotated[list[str] | None, typer.Option("--family", help="Only this family; may be repeated.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="All that families offer within this share of the dense parameters.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All sizes, batches, dtypes, works and threads (hours), or those named.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="To spend on each layer of a setting.")] = 2.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a JSON file of each setting; what is there is not run again.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time structured layers against dense ones on this machine, run in turns: times faster, operations, efficiency.

    Without options: a selection of settings that ends within 20 minutes. With some of --size, --batch, --dtype, --work
    and --threads: those (else 1024 x 1024, batches 1, 64 and 256, float32, forward, every core).
    """
    with refusing_bad_input():
        from structmat.benchmark import every_member, members_within, run_settings, typical_members
        from structmat.compression.progress import Progress
        from structmat.structure import Shape, Structure

        if budget is not None and not 0 < budget < 1:
            raise fail(f"--budget {budget} lies not strictly between 0 and 1.")
        settings = _settings(size, batch, dtype, work, threads, full)

        def members(shape: Shape) -> list[Structure]:
            if budget is None and not family:
                return every_member(shape) if full else typical_members(shape)
            return members_within(shape, 0.25 if budget is None else budget, family)

        for shape in dict.fromkeys(setting.shape for setting in settings):
            if not members(shape):
                share = 0.25 if budget is None else budget
                raise fail(f"No family has a member of {shape[0]} x {shape[1]} within {share:.2%} of its parameters.")
        results = []
        with Progress(True) as bar:
            found = run_settings(settings, members, seconds=seconds, folder=out)
            for result in bar.track(found, "bench", total=len(settings)):
                results.append(result)
                if not as_json:
                    with bar.hidden():
                        show(_table(result))
        if as_json:
            show_json({"environment": results[-1]["environment"], "settings": results})


def _settings(
    size: list[str] | None,
    batch: list[int] | None,
    dtype: list[str] | None,
    work: list[str] | None,
    threads: list[int] | None,
    full: bool,
) -> list[Setting]:
    """What the options ask for."""
    from structmat.benchmark import Setting, Work, all_threads, every_setting, telling_settings
    from structmat.kernels.choice import NATIVE_DTYPES
    from structmat.structure import check_shape

    dtypes = [str(known).removeprefix("torch.") for known in NATIVE_DTYPES]
    for name in dtype or ():
        if name not in dtypes:
            raise fail(f"--dtype {name} is none of {', '.join(dtypes)}.")
    for name in work or ():
        if name not in [known.value for known in Work]:
            raise fail(f"--work {name} is none of {', '.join(known.value for known in Work)}.")
    shapes = []
    for text in size or ():
        try:
            numbers = [int(part) for part in text.lower().split("x")]
        except ValueError as error:
            raise fail(f"--size {text} is not OUTxIN, such as 1024x4096.") from error
        shapes.append(check_shape(numbers * 2 if len(numbers) == 1 else numbers))
    works = [Work(name) for name in work or ()]
    given = (shapes, batch, dtype, works, threads)
    if full:
        axes = [(s, (s.shape, s.batch, s.dtype, s.work, s.threads)) for s in every_setting()]
        kept = [
            s for s, own in axes if all(not named or value in named for named, value in zip(given, own, strict=True))
        ]
        if not kept:
            raise fail("--full has no setting like that. Leave out --full to run any.")
        return kept
    if not any(given):
        return telling_settings()
    return [
        Setting(shape, rows, name, kind, count)
        for shape in shapes or [(1024, 1024)]
        for rows in batch or (1, 64, 256)
        for name in dtype or ("float32",)
        for kind in works or (Work.FORWARD,)
        for count in threads or all_threads()[:1]
    ]


def _table(result: dict[str, Any]) -> Any:
    """One setting's."""
    import statistics

    from rich.table import Table
    from rich.text import Text

    from structmat.benchmark import Setting

    facts, setting = result["environment"], Setting.from_json(result["setting"])
    dense = statistics.median(row["microseconds"]["dense"] for row in result["layers"])
    table = Table(
        title=f"{setting}: dense takes {dense:.1f} microseconds",
        caption=f"{facts['processor']} ({facts['native']}), torch {facts['torch']}",
    )
    table.add_column("layer")
    for name in ("parameters", "microseconds", "times faster", "operations", "reference", "native", "efficiency"):
        table.add_column(name, justify="right")
    for row in result["layers"]:
        by = row["dense_by"]
        ratio, operations = by["auto"], row["operations_ratio"]
        table.add_row(
            row["structure"],
            f"{row['stored'] / (setting.shape[0] * setting.shape[1]):.1%}",
            f"{row['microseconds']['auto']:.1f}",
            Text(f"{ratio:.2f}", style="green" if ratio > 1.03 else "red" if ratio < 0.97 else ""),
            "-" if operations is None else f"{operations:.1f}",
            *(f"{by[name]:.2f}" if name in by else "-" for name in ("reference", "native")),
            f"{row['efficiency']:.2f}",
        )
    return table
