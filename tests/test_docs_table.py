"""The table of families in the documentation is generated, and lists them all."""

from __future__ import annotations

import sys
from pathlib import Path

import structmat as sm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import gen_families  # noqa: E402


def test_every_family_has_a_row() -> None:
    lines = gen_families.table().splitlines()
    assert len(lines) == 2 + len(sm.families())
    columns = lines[0].count("|")
    for line in lines:
        assert line.replace("\\|", "").count("|") == columns, line
    for name in sm.families():
        assert any(line.startswith(f"| `{name}` |") for line in lines)


def test_rows_say_something() -> None:
    row = next(line for line in gen_families.table().splitlines() if line.startswith("| `LowRank`"))
    assert "`rank`" in row
    assert "optimal" in row
    assert "24.6%" in row or "23.4%" in row, row
