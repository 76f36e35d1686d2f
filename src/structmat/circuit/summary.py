"""A circuit in a few lines of text."""

from __future__ import annotations

import numpy as np

from structmat.circuit.circuit import Circuit, Kind

_WIDTHS = 12
"""Levels whose widths are listed; of more, the first and the last ones."""


def summary(circuit: Circuit) -> str:
    """What the circuit is, its counts in both forms, and the widths of its levels."""
    kind = "linear" if circuit.is_linear else "general"
    binary, wide = circuit.counts, circuit.wide
    lines = [
        f"{kind.capitalize()} circuit of {_counted(circuit.in_features, 'input')} and "
        f"{_counted(circuit.out_features, 'output')}",
        f"  {'':<22}{'binary':>12}{'unbounded fan-in':>20}",
    ]
    rows = [
        ("gates", binary.gates, wide.gates),
        ("size, with inputs", binary.size, wide.size),
        ("depth", binary.depth, wide.depth),
    ]
    lines += [f"  {name:<22}{first:>12,}{second:>20,}" for name, first, second in rows]
    lines.append(f"  {'multiplications':<22}{binary.multiplications:>12,}")
    lines.append(f"  {'additions':<22}{binary.additions:>12,}")
    if binary.divisions:
        lines.append(f"  {'divisions':<22}{binary.divisions:>12,}")
    constants = int(np.count_nonzero(circuit.kind == Kind.CONSTANT))
    if constants:
        lines.append(f"  {'constants':<22}{constants:>12,}")
    groups = ", ".join(f"{g.name} {g.shape}" for g in circuit.groups)
    lines.append(f"  {'parameters':<22}{binary.parameters:>12,}{'  ' + groups if groups else ''}")
    lines.append(f"  level widths: {widths_in_words(circuit)}")
    return "\n".join(lines)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def widths_in_words(circuit: Circuit) -> str:
    """The number of nodes of each level, sources first."""
    widths = [f"{w:,}" for w in circuit.levels.widths.tolist()]
    if len(widths) > _WIDTHS:
        half = _WIDTHS // 2
        widths = [*widths[:half], f"... ({len(widths) - _WIDTHS} more)", *widths[-half:]]
    return " ".join(widths)
