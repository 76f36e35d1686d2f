"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path`` and move it there: readers see all of it, or what was there
    before."""
    with _draft(path.parent) as draft:
        write(draft)
        _publish(draft, path)


def write_named(folder: Path, write: Callable[[Path], str]) -> Path:
    """The same where ``write`` finds the file's name only while it writes, and returns it; gives its path in the
    folder."""
    with _draft(folder) as draft:
        path = folder / write(draft)
        _publish(draft, path)
    return path


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in this way."""
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A temporary file, removed unless it was moved away."""
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".unfinished-")
    os.close(descriptor)
    draft = Path(name)
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _publish(draft: Path, path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    draft.chmod(0o666 & ~umask)  # mkstemp makes files that only the owner can read
    with draft.open("rb+") as file:
        os.fsync(file.fileno())  # or a crash of the machine could leave the name with nothing behind it
    os.replace(draft, path)
