"""What the commands share: output, errors, reading of weights and of names of functions."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

BAD_INPUT = 2
"""Exit code for input that can't be used."""


def words() -> Console:
    """Where progress and words go: stderr."""
    return Console(stderr=True)


def show(value: Any) -> None:
    """A table or text as data, on stdout."""
    # A pipe has no width: tables must not be cut to the 80 columns that rich would assume.
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=140)
    console.print(value)


def show_json(value: Any) -> None:
    """JSON as data, on stdout."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def fail(message: str) -> typer.Exit:
    """Say in one line on stderr what is wrong with the input; raise what this returns."""
    typer.echo(f"structmat: {' '.join(message.split())}", err=True)
    return typer.Exit(BAD_INPUT)


@contextlib.contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Errors about the user's input become one line and exit code 2; mistakes of the library keep their traceback."""
    from structmat.errors import StructmatError

    try:
        yield
    except StructmatError as error:
        raise fail(str(error)) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise fail(f"{error.filename}: {error.strerror}.") from error
    except KeyboardInterrupt as error:
        typer.echo("structmat: interrupted.", err=True)
        raise typer.Exit(130) from error


@contextlib.contextmanager
def only_data_on_stdout() -> Iterator[None]:
    """What libraries print meanwhile, from C too (HiGHS does, now and then), goes to stderr: stdout is for data."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    try:
        os.dup2(2, 1)
        yield
        sys.stdout.flush()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors, npy or npz file by name; nothing is unpickled.

    Raises:
        FormatError: the file is missing, of another kind, or damaged.
    """
    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from structmat.errors import FormatError

    if not path.is_file():
        raise FormatError(f"{path} is not a file. Give a .safetensors, .npy or .npz file.")
    kind = path.suffix.lower()
    try:
        if kind == ".safetensors":
            return load_file(path)
        if kind == ".npy":
            arrays = {path.stem: np.load(path, allow_pickle=False)}
        elif kind == ".npz":
            # Opened here: where the archive is damaged, NumPy leaves a file that it opened itself open.
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        else:
            raise FormatError(f"{path} has the ending {kind or 'none'}; .safetensors, .npy and .npz can be read.")
    except SafetensorError as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}.") from error
    except (ValueError, OSError, EOFError, KeyError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is not a readable {kind} file: {error}.") from error
    except Exception as error:  # zipfile.BadZipFile and zlib.error derive from nothing narrower
        raise FormatError(f"{path} is damaged: {error}.") from error
    tensors = {}
    for name, array in arrays.items():
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        try:
            tensors[name] = torch.from_numpy(np.ascontiguousarray(native))
        except TypeError as error:
            raise FormatError(f"{name} in {path} has the dtype {array.dtype}, which is no number.") from error
    return tensors


def find(name: str, option: str, folder: Path | None = None) -> Callable[..., Any]:
    """The function that ``package.module:function`` names; the current folder is searched too, and before it another
    one if it is given.

    Raises:
        ModelError: it can't be imported or is no function.
    """
    from structmat.errors import ModelError

    module_name, separator, attribute = name.partition(":")
    if not separator or not module_name or not attribute:
        raise ModelError(f"{option} {name} does not name a function. Write package.module:function.")
    for place in (Path.cwd(), *([folder] if folder is not None else [])):
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"{option} {name}: {module_name} can't be imported: {error}.") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ModelError(f"{option} {name}: {module_name} has no function {attribute}.")
    return found  # type: ignore[no-any-return]
