"""Parts of layers' rows from the words of the command line and of config files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structmat.cli.common import fail

_WANTED = (
    'a table such as {"*.qkv" = 3}, from patterns to a number of parts, a list of their outputs, "gates", or a table '
    "of rows and groups"
)


def splits(value: Any, folder: Path) -> list[str]:
    """From a config file: a table from patterns to parts, or a list as on the command line."""
    if isinstance(value, Mapping):
        return [f"{pattern}={_text(given)}" for pattern, given in value.items()]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(_WANTED)
    return value


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and "rows" in value and set(value) <= {"rows", "groups"}:
        return f"{_text(value['rows'])}x{_text(value.get('groups', 1))}"
    if isinstance(value, list) and value and all(_is_count(item) for item in value):
        return ",".join(map(str, value))
    if isinstance(value, str) or _is_count(value):
        return str(value)
    raise TypeError(_WANTED)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def asked(texts: Sequence[str]) -> dict[str, Any]:
    """As :func:`structmat.compress` takes it; each text is ``PATTERN=PARTS``, such as ``*.qkv=3``, ``*.qkv=64,16,16``,
    ``lstm.*=gates``, or ``*.qkv=16,16,16x4`` for four groups."""
    found: dict[str, Any] = {}
    for text in texts:
        pattern, _, parts = text.rpartition("=")
        rows, times, groups = parts.partition("x")
        sizes = [] if rows == "gates" else rows.split(",")
        if not pattern or not all(size.isdecimal() for size in (*sizes, *([groups] if times else []))):
            raise fail(
                f"--split {text} is not PATTERN=PARTS, such as '*.qkv=3', '*.qkv=64,16,16', '*.qkv=16,16,16x4' (four "
                f"groups) or 'lstm.*=gates'."
            )
        counts = [int(size) for size in sizes]
        given: Any = counts if len(counts) > 1 else counts[0] if counts else rows
        found[pattern] = {"rows": given, "groups": int(groups)} if times else given
    return found
