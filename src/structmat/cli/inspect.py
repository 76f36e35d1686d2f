"""structmat inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from structmat.cli.common import fail, read_weights, refusing_bad_input, show, show_json


def inspect(
    file: Annotated[Path, typer.Argument(help="A .safetensors, .npy or .npz file.")],
    name: Annotated[list[str] | None, typer.Option("--name", help="Only tensors whose name matches (glob).")] = None,
    family: Annotated[list[str] | None, typer.Option("--family", help="Only this family; may be repeated.")] = None,
    sweeps: Annotated[int, typer.Option(min=0, help="Sweeps of iterative fits; 0 screens, 20 fits in full.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg, .pdf); needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which structure do the matrices of a file have? Error against parameters for every family."""
    with refusing_bad_input():
        import fnmatch

        from rich.progress import track

        from structmat.cli.common import words
        from structmat.compression.inspection import inspect as inspect_matrix

        tensors = read_weights(file)
        wanted = {
            key: tensor
            for key, tensor in tensors.items()
            if tensor.dim() == 2
            and (tensor.is_floating_point() or tensor.is_complex())
            and (not name or any(fnmatch.fnmatchcase(key, pattern) for pattern in name))
        }
        if not wanted:
            known = ", ".join(f"{k} {tuple(t.shape)}" for k, t in list(tensors.items())[:5]) or "nothing"
            raise fail(f"{file} holds no matrix of floating point numbers{' of that name' if name else ''}: {known}.")
        if plot is not None and len(wanted) > 1:
            raise fail(f"--plot draws one matrix and {len(wanted)} were found. Choose one by --name.")
        found = {}
        for key in track(wanted, description="inspect", console=words(), transient=True):
            found[key] = inspect_matrix(wanted[key], structures=family or None, sweeps=sweeps)
        if plot is not None:
            try:
                axes = next(iter(found.values())).plot()
            except ImportError as error:
                raise fail("--plot needs matplotlib: pip install structmat[plot].") from error
            axes.figure.savefig(plot)
        if as_json:
            show_json({key: value.to_json() for key, value in found.items()})
            return
        for key, value in found.items():
            show(f"\n[bold]{key.replace('[', chr(92) + '[')}[/bold]")
            show(value)
