"""Budgets and quality from the words of the command line and of config files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structmat.cli.common import fail

UNITS = ("parameters", "flops", "latency", "memory")


def budgets(value: Any, folder: Path) -> list[str]:
    """From a config file: a number, a size, ``unit=amount``, a list of these, or a table of units."""
    if isinstance(value, Mapping):
        return [f"{unit}={_amount(amount)}" for unit, amount in value.items()]
    return [_amount(item) for item in (value if isinstance(value, list) else [value])]


def groups(value: Any, folder: Path) -> list[str]:
    """From a config file: a table from patterns to shares, or to tables of units; or a list as on the command line."""
    if isinstance(value, Mapping):
        found = []
        for pattern, given in value.items():
            items = given.items() if isinstance(given, Mapping) else [("", given)]
            found += [f"{pattern}={unit}={_amount(a)}" if unit else f"{pattern}={_amount(a)}" for unit, a in items]
        return found
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError('a table such as {"*attn*" = 0.5}')
    return value


def _amount(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError("a number, a string such as '20MB' or 'latency=0.7', or a table of these by unit")
    return repr(value) if isinstance(value, float) else str(value)


def goal(
    budget: Sequence[str], group: Sequence[str], unit: str, batch: int, quality: Mapping[str, Any]
) -> tuple[Any, ...]:
    """What is asked for, as :func:`structmat.compress` takes it; empty if nothing is.

    Args:
        budget: each an amount in ``unit``, or ``unit=amount``.
        group: each ``pattern=amount`` or ``pattern=unit=amount``.
        unit: of amounts without one.
        batch: of latency.
        quality: arguments of :class:`structmat.Quality`, all None or False where none is to be kept.
    """
    import structmat as sm

    if unit not in UNITS:
        raise fail(f"--unit {unit} is none of {', '.join(UNITS)}.")

    def one(kind: str, amount: str, where: str) -> Any:
        if kind == "memory":
            return sm.Memory(_number(amount) if _is_number(amount) else amount)
        if kind not in UNITS:
            raise fail(f"{where}: {kind} is none of {', '.join(UNITS)}.")
        if not _is_number(amount):
            raise fail(f"{where}: {amount} is no number. Write 0.5 for half, or an integer.")
        kinds: dict[str, Any] = {"parameters": sm.Parameters, "flops": sm.Flops}
        return sm.Latency(_number(amount), batch) if kind == "latency" else kinds[kind](_number(amount))

    found: list[Any] = []
    for text in budget:
        kind, separator, amount = text.rpartition("=")
        found.append(one(kind if separator else unit, amount, f"--budget {text}"))
    by_pattern: dict[str, list[Any]] = {}
    for text in group:
        pattern, separator, amount = text.rpartition("=")
        if not separator or not pattern:
            raise fail(f"--group {text} is not PATTERN=SHARE, such as '*attn*=0.5'.")
        head, _, kind = pattern.rpartition("=")  # no name of a module holds one
        pattern, kind = (head, kind) if head else (pattern, unit)
        by_pattern.setdefault(pattern, []).append(one(kind, amount, f"--group {text}"))
    if by_pattern:
        found.append(by_pattern)
    asked = {name: value for name, value in quality.items() if value is not None and value is not False}
    if asked:
        if quality.get("better") not in (None, "higher", "lower"):
            raise fail(f"--better {quality['better']} is neither higher nor lower.")
        spends: dict[str, Any] = {
            "parameters": sm.Parameters(0.5),
            "flops": sm.Flops(0.5),
            "latency": sm.Latency(0.5, batch),
        }
        if unit not in spends:
            raise fail(f"--unit {unit}: a model for a quality is made small in {', '.join(spends)}.")
        found.append(sm.Quality(**asked, minimise=spends[unit]))
    return tuple(found)


def _is_number(text: str) -> bool:
    try:
        _number(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
