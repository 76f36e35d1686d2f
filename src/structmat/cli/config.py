"""Config files: every option of a command in TOML, read strictly."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from structmat.cli.common import fail

Read = Callable[[Any, Path], Any]
"""What an option becomes from its value in the file and the file's folder; raises ``TypeError`` with what it should
be."""


def read_config(path: Path, options: Mapping[str, Read]) -> dict[str, Any]:
    """The options that a file sets, checked and converted; paths in it are relative to its folder.

    Args:
        path: of the TOML file.
        options: what each key is read by; no other key is allowed.

    Raises:
        typer.Exit: the file can't be used; one line on stderr says why.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise fail(f"{path} is not TOML: {error}.") from error
    found = {}
    for key, value in data.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, 1)
            meant = f" Did you mean {near[0]}?" if near else f" Known are {', '.join(sorted(options))}."
            raise fail(f"{path}: there is no option {key}.{meant}")
        try:
            found[key] = options[key](value, path.resolve().parent)
        except TypeError as error:
            raise fail(f"{path}: {key} is {error}; got {value!r}.") from error
    return found


def merged(
    context: typer.Context, values: Mapping[str, Any], config: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    """The values of a command's parameters: what the command line says, else what the file says, else the defaults.

    Args:
        context: knows which parameters were given.
        values: of all parameters as they were parsed.
        config: of the file, by key.
        names: parameter of each key where they differ.
    """
    found = dict(values)
    for key, value in config.items():
        name = names.get(key, key.replace("-", "_"))
        source = context.get_parameter_source(name)
        if source is None or source.name not in ("COMMANDLINE", "ENVIRONMENT"):
            found[name] = value
    return found


# ----------------------------------------------------------------------------------------------------------- kinds


def text(value: Any, folder: Path) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError("a string")
    return value


def texts(value: Any, folder: Path) -> list[str]:
    """A list of strings, or one string for a list of one."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise TypeError("a list of strings")
    return items


def number(value: Any, folder: Path) -> float:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    return float(value)


def numbers(value: Any, folder: Path) -> list[float]:
    """A list of numbers."""
    if not isinstance(value, list):
        raise TypeError("a list of numbers")
    return [number(item, folder) for item in value]


def whole(least: int) -> Read:
    """An integer of at least so much."""

    def read(value: Any, folder: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise TypeError(f"an integer of at least {least}")
        return value

    return read


def integer(value: Any, folder: Path) -> int:
    """An integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("an integer")
    return value


def flag(value: Any, folder: Path) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def path(value: Any, folder: Path) -> Path:
    """A path, relative to the file."""
    return folder / text(value, folder)
