"""structmat report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from structmat.cli.common import fail, refusing_bad_input, show_json, words


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that holds report.json, or that file.")],
    out: Annotated[Path | None, typer.Option(help="Write the page here instead of beside report.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Build report.html again from report.json: one page that loads nothing from elsewhere, to send to anybody."""
    with refusing_bad_input():
        from structmat.compression.report_html import write_html
        from structmat.compression.report_json import read_report
        from structmat.compression.report_verdict import verdict_text

        source = folder / "report.json" if folder.is_dir() else folder
        if not source.is_file():
            raise fail(f"{folder} holds no report.json. Name the folder that structmat compress wrote (--out).")
        data = read_report(source)
        page = write_html(data, out if out is not None else source.with_name("report.html"))
        if as_json:
            show_json(data)
        else:
            typer.echo("\n".join(verdict_text(data)))
        words().print(f"report  {page.resolve()}", soft_wrap=True)
