"""A report as a table for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from structmat.compression.report import LayerReport, Report, Totals


def summary(report: Report) -> Group:
    """The chosen structure of every layer, then the figures before and after."""
    layers = Table(title=Text(f"{report.model}: the structure chosen for every layer"))
    layers.add_column("layer", overflow="fold")
    layers.add_column("shape", justify="right")
    layers.add_column("structure", overflow="fold")
    layers.add_column("kept", justify="right")
    layers.add_column("error", justify="right")
    layers.add_column("certificate")
    layers.add_column("time", justify="right")
    for layer in report.layers:
        layers.add_row(*_row(layer))
    figures = Table(title=f"before and after ({report.environment['processor']})")
    figures.add_column("")
    figures.add_column("before", justify="right")
    figures.add_column("after", justify="right")
    figures.add_column("share", justify="right")
    for name, totals in (
        ("parameters, compressible layers", report.parameters),
        ("parameters, whole model", report.model_parameters),
        ("bytes, whole model", report.model_bytes),
        ("FLOPs a sample, those layers", report.flops),
    ):
        figures.add_row(name, f"{totals.before:,.0f}", f"{totals.after:,.0f}", _share(totals))
    for timing in report.timings:
        if timing.model_before is not None and timing.model_after is not None:
            before, after, ratio = timing.model_before, timing.model_after, timing.model_ratio
            share = f"{after / before if ratio is None else ratio:.1%}"
            figures.add_row(f"milliseconds, batch {timing.batch}", f"{before:.3f}", f"{after:.3f}", share)
    parts: list[Table | Text] = [layers, figures]
    if report.quality:
        quality = Table(title="quality")
        quality.add_column("")
        titles = {"before": "original", "after": "compressed", "recovered": "recovered"}
        moments = [m for m in titles if m in report.quality]
        for moment in moments:
            quality.add_column(titles[moment], justify="right")
        for name in report.quality["before"]:
            quality.add_row(name, *(f"{report.quality[m][name]:.5g}" for m in moments))
        parts.append(quality)
    if report.tried:
        tried = Table(title=f"models that were tried for {report.budget['of']}")
        for name in (str(report.budget["unit"]), "value", "accepted"):
            tried.add_column(name, justify="right")
        for one in report.tried:
            tried.add_row(f"{one['cost']:,.0f}", f"{one['value']:.5g}", "yes" if one["accepted"] else "no")
        parts.append(tried)
    goals = Table(title="budgets")
    for name in ("", "limit", "spent"):
        goals.add_column(name, justify="right" if name else "left")
    for one in report.budget.get("goals", ()):
        goals.add_row(Text(str(one["unit"])), f"{one['limit']:,.6g}", f"{one['spent']:,.6g}")
    if goals.row_count:
        parts.append(goals)
    slower = [layer.name for layer in report.layers if layer.slower and layer.structure != "Dense()"]
    if slower:
        parts.append(Text(f"{len(slower)} replaced layers run slower than dense on this machine: {', '.join(slower)}"))
    return Group(*parts)


def _row(layer: LayerReport) -> tuple[str | Text, ...]:
    kept = layer.structure == "Dense()"
    ratio = layer.microseconds / layer.dense_microseconds if layer.dense_microseconds else 1.0
    return (
        Text(layer.name),  # text, not markup: names may hold brackets
        f"{layer.shape[0]} x {layer.shape[1]}",
        Text("kept dense", style="dim") if kept else Text(layer.structure),
        f"{layer.parameters / layer.dense_parameters:.1%}",
        "" if kept else f"{layer.error:.4f}",
        "" if kept else layer.certificate,
        "" if kept else f"{ratio:.2f} x",
    )


def _share(totals: Totals) -> str:
    return f"{totals.after / totals.before:.1%}" if totals.before else ""
