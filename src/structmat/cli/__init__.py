"""The command line: one file a command, torch imported inside the commands so that ``--help`` is instant."""

from __future__ import annotations

import typer

from structmat.cli import bench, compress, demo, diff, info, inspect, report

app = typer.Typer(
    name="structmat",
    help="Structured linear maps for neural networks: compress trained models, inspect matrices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("inspect")(inspect.inspect)
app.command("compress")(compress.compress)
app.command("report")(report.report)
app.command("diff")(diff.diff)
app.command("bench")(bench.bench)
app.command("info")(info.info)


def main() -> None:
    """The console script ``structmat``."""
    app()
