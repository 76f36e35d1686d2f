"""structmat info"""

from __future__ import annotations

from typing import Annotated

import typer

from structmat.cli.common import refusing_bad_input, show, show_json


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, this machine, and the families of structured matrices."""
    with refusing_bad_input():
        import inspect
        import re

        from rich.table import Table
        from rich.text import Text

        from structmat.compression.report import environment
        from structmat.kernels import tuning
        from structmat.structure import count_stored, resolve
        from structmat.structures import families

        shape = (256, 256)
        rows = []
        for name, family in sorted(families().items()):
            smallest = None
            for budget in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
                sizes = [count_stored(resolve(s, shape), shape) for s in family.configurations(shape, budget)]
                if sizes:
                    smallest = min(sizes)
                    break
            summary = (inspect.getdoc(family) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")
            summary = re.sub(r":\w+:`([^`]*)`", r"\1", summary)
            rows.append({"family": name, "smallest_at_256": smallest, "summary": summary})
        facts = {**environment(), "tuned": f"{len(tuning.known())} programs, in {tuning.path()}"}
        if as_json:
            show_json({"environment": facts, "families": rows})
            return
        for key, value in facts.items():
            show(f"{key:<10} {value}")
        table = Table(title="families")
        table.add_column("family", no_wrap=True)
        table.add_column("smallest of 256 x 256", justify="right")
        table.add_column("what it is")
        for row in rows:
            size = row["smallest_at_256"]
            table.add_row(str(row["family"]), f"{size:,}" if isinstance(size, int) else "-", Text(str(row["summary"])))
        show(table)
