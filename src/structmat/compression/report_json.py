"""The plain values of a ``report.json``: reading them, and what is asked of them in several places."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from structmat.errors import FormatError


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain values of a ``report.json``. Raises :class:`~structmat.errors.FormatError` if it is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} is no report of structmat.")
    return data


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Turn what values of the wrong kind lead to into a :class:`~structmat.errors.FormatError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise FormatError(f"The report is damaged: {type(error).__name__}: {error}.") from error


def family(layer: Mapping[str, Any]) -> str:
    """The family of a layer or candidate, from its structure's JSON."""
    structure = layer["structure_json"] if "structure_json" in layer else layer["structure"]
    return str(structure["family"])


def ratio(timing: Mapping[str, Any], kind: str) -> float:
    """After by before: as it was measured in turns, where it was."""
    measured = timing.get(f"{kind}_ratio")
    return float(measured) if measured is not None else float(timing[f"{kind}_after"]) / float(timing[f"{kind}_before"])
