"""structmat diff"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structmat.cli.common import refusing_bad_input, show, show_json

if TYPE_CHECKING:
    from structmat.compression.difference import Difference, LayerSide


def diff(
    a: Annotated[Path, typer.Argument(help="Folder of results (report.json) or of a saved model.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two results, or two saved models: every layer, and the totals."""
    with refusing_bad_input():
        from structmat.compression.difference import difference, read_side

        found = difference(read_side(a), read_side(b))
        if as_json:
            show_json(found.to_json())
            return
        layers, totals = _tables(found)
        show(layers)
        show(totals)


def _tables(found: Difference) -> tuple[Any, Any]:
    from rich.table import Table
    from rich.text import Text

    def pair(before: float | None, after: float | None, form: str) -> Text:
        texts = ["-" if value is None else format(value, form) for value in (before, after)]
        return Text(texts[0] if texts[0] == texts[1] else f"{texts[0]} > {texts[1]}")

    def of(side: LayerSide | None, name: str) -> Any:
        return None if side is None else getattr(side, name)

    title = f"{found.changed} of {len(found.layers)} layers differ: {found.a.title} > {found.b.title}"
    layers = Table(title=Text(title))
    layers.add_column("layer", overflow="fold")
    layers.add_column("structure", overflow="fold")
    for name in ("parameters", "FLOPs", "microseconds", "error"):
        layers.add_column(name, justify="right")
    for name, one, other in found.layers:
        texts = [str(of(side, "structure") or "-") for side in (one, other)]
        is_equal = texts[0] == texts[1]
        layers.add_row(
            Text(name),
            Text(texts[0] if is_equal else f"{texts[0]}\n> {texts[1]}"),
            pair(of(one, "parameters"), of(other, "parameters"), ",.0f"),
            pair(of(one, "flops"), of(other, "flops"), ",.0f"),
            pair(of(one, "microseconds"), of(other, "microseconds"), ".1f"),
            pair(of(one, "error"), of(other, "error"), ".4f"),
            style="dim" if is_equal else "",
        )
    totals = Table(title="totals")
    totals.add_column("")
    for name in ("a", "b", "b by a"):
        totals.add_column(name, justify="right")
    for label, before, after in found.totals:
        share = f"{after / before:.1%}" if before and after is not None else ""
        totals.add_row(
            label, *("-" if v is None else f"{v:,.6g}" if v < 1e6 else f"{v:,.0f}" for v in (before, after)), share
        )
    return layers, totals
