"""Stage by dtype by direction by instruction set: native, or a declared gap."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from instruction_sets import compiled, every, printed_by
from native_table import DIRECTIONS, DTYPES, GAPS, LINES, Cell, Gap, problems, table

from structmat.kernels import native
from structmat.program import Stage

here = native()


@pytest.mark.skipif(not here.available, reason=f"no native library: {here.reason}")
@pytest.mark.parametrize("name", every())
def test_every_stage_is_native_or_a_declared_gap(name: str, record_property: Callable[[str, object], None]) -> None:
    if name not in here.supported:
        pytest.skip(f"this machine has no {name}")
    folder = str(Path(__file__).resolve().parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import native_table; print(native_table.report())"
    found = json.loads(printed_by(code, name))
    assert found["instruction_set"] == name
    cells = [Cell(**cell) for cell in found["cells"]]
    assert len(cells) == len(LINES) * len(DTYPES) * len(DIRECTIONS)
    record_property("table", table(cells, name))  # printed at the end of the tests
    assert problems(cells, name) == []


def kinds() -> set[str]:
    """Every final class of stages in the library."""
    pending, found = [Stage], set()
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if dataclasses.is_dataclass(kind) and kind.__module__.startswith("structmat."):
            found.add(kind.__name__)
    return found


def test_every_kind_of_stage_has_a_line() -> None:
    assert len(kinds()) >= 13
    assert {name.partition(",")[0] for name in LINES} == kinds() | {"Chain", "Sum"}
    for name, programs in LINES.items():
        assert programs
        if "x" not in name:
            assert {type(program).__name__ for program in programs} == {name.partition(",")[0]}


def test_every_declared_gap_names_what_there_is() -> None:
    for gap in GAPS:
        assert gap.reason
        for names, known in ((gap.stages, LINES), (gap.dtypes, DTYPES), (gap.directions, DIRECTIONS)):
            assert set(names or ()) <= set(known)
        assert set(gap.instruction_sets or ()) <= set(compiled())


def test_gaps_are_caught() -> None:
    native_cell = Cell("Pad", "float32", "backward", True)
    reference_cell = dataclasses.replace(native_cell, native=False)
    gap = Gap("because", stages=("Pad",), instruction_sets=("avx2",))
    assert problems([native_cell], "avx2", ()) == []
    assert problems([reference_cell], "avx2", (gap,)) == []
    assert "not declared" in problems([reference_cell], "avx2", ())[0]
    assert "not declared" in problems([reference_cell], "base", (gap,))[0]
    assert "because" in problems([native_cell], "avx2", (gap,))[0]
    assert "native (n)" in table([Cell(s, d, k, True) for s in LINES for d in DTYPES for k in DIRECTIONS], "avx2")
