"""Compiled code that writes to the standard output whatever it is told."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator

_OUTPUT = 1
"""The file descriptor of the standard output."""


@contextlib.contextmanager
def without_lines(start: bytes) -> Iterator[None]:
    """Lines with this beginning that anything in the process writes to the standard output are left out; all others
    come when the work inside ends."""
    try:
        kept = os.dup(_OUTPUT)
    except OSError:  # there is none
        yield
        return
    with tempfile.TemporaryFile() as held:
        _flush()
        os.dup2(held.fileno(), _OUTPUT)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, _OUTPUT)
            os.close(kept)
            held.seek(0)
            rest = b"".join(line for line in held if not line.startswith(start))
            while rest:
                rest = rest[os.write(_OUTPUT, rest) :]


def _flush() -> None:
    """What Python and the C library still hold."""
    if sys.__stdout__ is not None:
        sys.__stdout__.flush()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # where the C library has no such name
        ctypes.CDLL(None).fflush(None)
