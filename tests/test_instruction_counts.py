"""The kernels take as many instructions as were recorded: what got slower shows on a busy machine too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from instruction_counts import KERNELS, RECORD, RENEW, measure, obstacle, versions

SAME, OTHER = 0.03, 0.15
"""Differences that are allowed, with the compiler of the record and with another one."""


def changes(found: Mapping[str, int], recorded: Mapping[str, int], tolerance: float) -> list[str]:
    """One line for each kernel whose count differs by more than a tolerance, and for each that only one side has."""
    lines = [f"{name} is not in both" for name in sorted(found.keys() ^ recorded.keys())]
    for name in sorted(found.keys() & recorded.keys()):
        ratio = found[name] / recorded[name]
        if abs(ratio - 1) > tolerance:
            lines.append(f"{name}: {found[name]} instructions, {ratio - 1:+.1%} of the {recorded[name]} recorded")
    return lines


def recorded() -> dict[str, int]:
    counts: dict[str, int] = json.loads(RECORD.read_text(encoding="utf-8"))["instructions"]
    return counts


@pytest.mark.slow
def test_kernels_take_as_many_instructions_as_recorded(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    reason = obstacle()
    if reason is not None:
        pytest.skip(f"instructions can't be counted: {reason}")
    record, here = json.loads(RECORD.read_text(encoding="utf-8")), versions()
    is_same = here["compiler"] == record["compiler"]
    tolerance = SAME if is_same else OTHER
    found = measure(tmp_path)
    lines = [f"{here['compiler']}; recorded with {record['compiler']}, so {tolerance:.0%} is allowed"]
    lines += [
        f"{n:22} {count:>8} {count / record['instructions'].get(n, count) - 1:+.1%}" for n, count in found.items()
    ]
    record_property("table", "\n".join(lines))
    assert not changes(found, record["instructions"], tolerance), f"If this is meant, renew the record: {RENEW}"


def test_the_record_is_of_these_kernels() -> None:
    assert recorded().keys() == KERNELS.keys()
    assert min(recorded().values()) > 10_000


def test_changes_are_noticed() -> None:
    same = recorded()
    assert changes(same, same, SAME) == []
    name = next(iter(same))
    assert changes({**same, name: round(1.02 * same[name])}, same, SAME) == []
    for factor in (0.95, 1.05):
        (line,) = changes({**same, name: round(factor * same[name])}, same, SAME)
        assert name in line
    assert changes({**same, "new": 1}, same, SAME) == ["new is not in both"]
