"""Recovery from the words of the command line and of config files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from structmat.cli.common import fail, find

_LOADERS = ("data", "held_out")
"""Settings that are functions which return batches."""


def recovery(value: Any, folder: Path) -> int | Mapping[str, Any]:
    """From a config file: a number of steps, or a table of the settings of :class:`structmat.Distill`."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError("a number of steps of at least 0, or a table of settings such as {steps = 300, own-loss = 0.1}")
    return value


def distill(asked: int | Mapping[str, Any], folder: Path | None) -> Any:
    """The settings, or None where nothing is asked for.

    Args:
        asked: what :func:`recovery` returned.
        folder: where functions are searched, too.

    Raises:
        typer.Exit: a setting does not exist or is none of its choices; one line on stderr says which do.
        StructureError: a setting is out of its range.
        ModelError: a loader can't be found.
    """
    from structmat.compression.distill import Distill, Optimizer, Rates

    if not asked:
        return None
    if isinstance(asked, int):
        return Distill(steps=asked)
    choices: dict[str, type[StrEnum]] = {"rates": Rates, "optimizer": Optimizer}
    known = Distill.__dataclass_fields__
    found: dict[str, Any] = {}
    for key, value in asked.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            words = f"Did you mean {_key(near[0])}?" if near else f"Known are {', '.join(map(_key, sorted(known)))}."
            raise fail(f"recover: there is no setting {key}. {words}")
        if name in _LOADERS:
            value = find(str(value), f"recover: {key}", folder)()
        elif name in choices:
            value = _choice(key, value, choices[name])
        found[name] = value
    if "minutes" in found and "steps" not in found:
        found["steps"] = None
    return Distill(**found)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _choice(key: str, value: Any, choices: type[StrEnum]) -> StrEnum:
    for choice in choices:
        if isinstance(value, str) and value.lower() in (choice.name.lower(), choice.value.lower()):
            return choice
    raise fail(f"recover: {key} is one of {', '.join(choice.name.lower() for choice in choices)}; got {value!r}.")
