"""What was measured of programs on this machine: which backend is faster for how many rows.

Measurements are made by :func:`structmat.tune` alone, never by a call of a layer. They are kept in a small JSON file,
found again by processor, versions and number of threads, and read once a process.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from structmat.files import write_text
from structmat.kernels.library import native
from structmat.kernels.text import Text, running_text
from structmat.processor import processor_generation
from structmat.program import Program

FORMAT = 1
"""Of the file; others are not read."""


class Way(enum.Enum):
    """How a product can be made."""

    NATIVE = "native"
    REFERENCE = "reference"
    DENSE = "dense"


Times = Mapping[int, Mapping[Way, float]]
"""Microseconds of each way that was tried, by the number of rows."""

Key = tuple[str, int]
"""The name of a program, and how many threads PyTorch had."""


generation = 0
"""Grows with every measurement that is noted: what was concluded from older ones is to be concluded anew. A variable,
since layers ask at every call."""


def path() -> Path:
    """The file: ``tuned.json`` in the folder that the environment variable ``STRUCTMAT_CACHE`` names, else in
    ``structmat`` in the user's folder for caches."""
    folder = os.environ.get("STRUCTMAT_CACHE")
    if folder:
        return Path(folder) / "tuned.json"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "structmat" / "tuned.json"


@cache
def machine() -> str:
    """What measurements depend on beside the program: processor, cores, versions, instruction set."""
    from structmat import __version__

    found = native()
    parts = (
        processor_generation(),
        os.cpu_count(),
        __version__,
        torch.__version__,
        found.instruction_set or "reference",
    )
    return ", ".join(map(str, parts))


def name_of(program: Program, dtype: torch.dtype) -> str:
    """What a program and a dtype are found by: a digest of the form of the stages, whatever they hold."""
    kept: dict[torch.dtype, str] = program.__dict__.setdefault("_tuning_name", {})
    if dtype not in kept:
        text = running_text(program)
        form = text.plain if isinstance(text, Text) else repr(program)
        kept[dtype] = f"{hashlib.sha256(form.encode()).hexdigest()[:24]} {str(dtype).removeprefix('torch.')}"
    return kept[dtype]


def is_known(name: str) -> bool:
    """Whether anything was measured of a program, in this process or another one, on this machine."""
    return any(known == name for known, _ in _table())


def best(name: str, rows: int, ways: tuple[Way, ...]) -> Way | None:
    """The fastest way for the nearest number of rows that was measured with as many threads.

    None where none lies within a factor of 2, or fewer than two of the ways were tried.
    """
    return _best(name, rows, ways, torch.get_num_threads(), generation)


@lru_cache(maxsize=4096)  # it is asked at every call of a layer, and working it out takes as long as a small product
def _best(name: str, rows: int, ways: tuple[Way, ...], threads: int, _: int) -> Way | None:
    found = _table().get((name, threads))
    if not found or rows < 1:
        return None
    nearest = min(found, key=lambda known: (abs(math.log2(known / rows)), known))
    if not rows / 2 <= nearest <= 2 * rows:
        return None
    times = {way: t for way, t in found[nearest].items() if way in ways}
    return fastest(times) if len(times) > 1 else None


DENSE_WORTH = 0.95
"""A dense matrix must take at most this part of the time of the structured ways: it costs memory, and measurements are
no better than this."""


def fastest(times: Mapping[Way, float]) -> Way:
    """The way that takes the least time; the dense matrix only where it is clearly faster than all others."""
    others = {way: t for way, t in times.items() if way is not Way.DENSE}
    if not others:
        return Way.DENSE
    best = min(others, key=lambda way: (others[way], way.value))
    return Way.DENSE if times.get(Way.DENSE, math.inf) < DENSE_WORTH * times[best] else best


def known() -> dict[Key, Times]:
    """All that was measured on this machine."""
    return dict(_table())


def note(name: str, found: Times) -> None:
    """Keep measurements made with as many threads as PyTorch has now, in this process and in the file; those for other
    numbers of rows stay.

    A file that can't be written is a warning: the measurements hold in this process.
    """
    global generation
    table, key = _table(), (name, torch.get_num_threads())
    table[key] = {**table.get(key, {}), **found}
    generation += 1
    try:
        _write(table)
    except OSError as error:
        warnings.warn(f"The measurements can't be kept in {path()}: {error}", stacklevel=3)


@contextmanager
def trying(name: str, rows: int) -> Iterator[Callable[[Way], None]]:
    """Within this context a program with so many rows runs the way that the function it gives was last called with.

    Layers take all their short cuts meanwhile, as they will once the fastest way is known.
    """
    global generation
    table, key = _table(), (name, torch.get_num_threads())
    before = table.get(key)
    forced: dict[int, Mapping[Way, float]] = {**(before or {})}
    table[key] = forced
    generation += 1
    order = {way: {other: float(other is not way) for other in Way} for way in Way}

    def choose(way: Way) -> None:
        global generation
        if forced.get(rows) is not order[way]:
            forced[rows] = order[way]
            generation += 1  # for all that keep what is the best way

    try:
        yield choose
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before
        generation += 1


def forget() -> None:
    """Drop all that is known on this machine, from this process and from the file."""
    global generation
    _table().clear()
    generation += 1
    if path().exists():
        _write({})


@cache
def _table() -> dict[Key, Times]:
    table: dict[Key, Times] = {}
    for name, by_threads in _read().get(machine(), {}).items():
        try:
            for threads, by_rows in by_threads.items():
                table[name, int(threads)] = {
                    int(rows): {Way(way): float(t) for way, t in ways.items()} for rows, ways in by_rows.items()
                }
        except (TypeError, ValueError, AttributeError):
            continue  # an entry that nobody can read is as good as none
    return table


def _read() -> dict[str, dict[str, Any]]:
    """The whole file, by machine; empty where there is none, or none of this format."""
    try:
        data = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("machines"), dict):
        return {}
    machines: dict[str, dict[str, Any]] = data["machines"]
    return machines


def _write(table: Mapping[Key, Times]) -> None:
    entries: dict[str, dict[str, Any]] = {}
    for (name, threads), times in table.items():
        entries.setdefault(name, {})[str(threads)] = {
            str(rows): {way.value: t for way, t in ways.items()} for rows, ways in times.items()
        }
    data = {"format": FORMAT, "machines": {**_read(), machine(): entries}}
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(data, indent=1))
