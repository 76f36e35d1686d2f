"""Code in a process of its own, with the kernels of one instruction set."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
from _pytest.mark import ParameterSet

from structmat.kernels.library import FILE, native


def compiled() -> list[str]:
    """Names of all instruction sets that the native library holds, also of those that this machine lacks."""
    if not FILE.is_file():
        return []
    library, name, found = ctypes.CDLL(str(FILE)), ctypes.c_char_p(), []
    while library.structmat_supported(len(found), ctypes.byref(name)) >= 0:
        assert name.value is not None
        found.append(name.value.decode())
    return found


def every() -> list[ParameterSet]:
    """All of them as parameters of a test: fast are the first one and the one that this machine takes by itself."""
    fast = {"base", native().instruction_set}
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in compiled()]


def printed_by(code: str, instruction_set: str) -> str:
    """What the code prints; fails where it raises or warns."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "STRUCTMAT_ISA": instruction_set, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
