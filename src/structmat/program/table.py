"""A program as a table that a person can read."""

from __future__ import annotations

from structmat.program.combinators import Chain, Program
from structmat.program.cost import cost
from structmat.program.stage import Stage


def table(program: Program) -> str:
    """One line a stage, in order of application: what it is, its shape, its tensors, parameters and operations."""
    rows = [("stage", "in", "out", "tensors", "parameters", "MACs", "depth"), *_rows(program, 0)]
    total = cost(program)
    rows.append(
        (
            "total",
            f"{program.in_features}",
            f"{program.out_features}",
            "",
            f"{total.parameters}",
            f"{total.macs}",
            f"{total.depth}",
        )
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:3], widths[1:3], strict=True))]
        cells += [row[3].ljust(widths[3]), *(c.rjust(w) for c, w in zip(row[4:], widths[4:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(len(line) for line in lines)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _rows(program: Program, level: int) -> list[tuple[str, ...]]:
    indent = "  " * level
    if isinstance(program, Stage):
        own = cost(program)
        tensors = ", ".join((*program.weights, *program.indices))
        size = (f"{program.in_features}", f"{program.out_features}")
        return [(indent + str(program), *size, tensors, f"{own.parameters}", f"{own.macs}", f"{own.depth}")]
    if isinstance(program, Chain):
        return [row for step in program.steps for row in _rows(step, level)]
    rows: list[tuple[str, ...]] = []
    for number, part in enumerate(program.parts):
        rows.append((f"{indent}{'sum of' if number == 0 else 'plus'}", "", "", "", "", "", ""))
        rows += _rows(part, level + 1)
    return rows
