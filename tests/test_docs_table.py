"""The table of families in the documentation is generated, and lists them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import structmat as sm
from structmat.circuit.catalogue import fourier

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "circuits"
sys.path.insert(0, str(ROOT / "docs"))

import gen_families  # noqa: E402
import gen_wishes  # noqa: E402
import hooks  # noqa: E402


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


def test_the_table_of_wishes() -> None:
    """Every family is asked for every target; what theory knows of some of them is what is found."""
    page = hooks.on_page_markdown((ROOT / "docs" / "theory.md").read_text(encoding="utf-8"))
    lines = [line for line in page.splitlines() if line.startswith(("| `", "| kaleidoscope"))]
    names = [line.split("|")[1].strip(" `").split("(")[0].rstrip(" `") for line in lines]
    rows = {name: [cell.strip() for cell in line.split("|")[2:-1]] for name, line in zip(names, lines, strict=True)}
    assert set(rows) == {*sm.families(), "kaleidoscope"}
    for cells in rows.values():
        assert len(cells) == len(gen_wishes.HEADER) - 1
    answers = {name: dict(zip(gen_wishes.HEADER[1:], cells, strict=True)) for name, cells in rows.items()}
    targets = list(gen_wishes.targets())
    assert [answers["Butterfly"][t] for t in targets] == ["yes", "no", "yes", "no", "no"]
    assert [answers["Monarch"][t] for t in targets] == ["yes", "no", "yes", "no", "no"]
    assert [answers["Sparse"][t] for t in targets] == ["no", "no", "no", "yes", "yes"]
    assert [answers["LowRank"][t] for t in targets] == ["no"] * 5
    assert all(answers[name][t] == "yes" for name in ("Dense", "kaleidoscope") for t in targets)
    assert answers["Butterfly"]["parameters"] == "128"
    # Each of the 4 levels has 32 products and 16 sums; backwards twice the products and 16 sums more for the inputs.
    assert answers["Butterfly"]["product"] == str(4 * 48)


def test_the_picture_of_a_circuit_is_what_the_library_draws() -> None:
    """Made by ``fourier(8).draw("docs/theory_circuit.svg")``."""
    assert fourier(8).draw() == (ROOT / "docs" / "theory_circuit.svg").read_text(encoding="utf-8")


def test_the_theory_names_the_figures_that_were_measured() -> None:
    """What the page says of times stands in the results of the benchmark, rounded to a tenth."""
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8").partition("## On the clock")[2].partition("##")[0]
    cells = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in RESULTS.glob("*.json")}
    assert len(cells) == 8
    steps = {name: step[0] for name, step in cells["Fourier_circuit_0"]["steps"].items()}
    deep = cells["serial_prefix_sums_0"]["steps"]
    random = [cell["steps"]["not recognized"][0] for name, cell in cells.items() if name.startswith("random")]
    together = [steps[name] for name in ("build", "transpose", "differentiate", "evaluate")]
    hadamard = cells["Hadamard__8_192_inputs_0"]["steps"]["not recognized"][0]
    again = [deep["evaluate"][0], deep["evaluate again"][0]]
    for seconds in (*together, sum(together), min(random), max(random), hadamard, *again):
        assert f"{seconds:.1f}" in page, seconds
