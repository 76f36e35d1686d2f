"""Code in a process of its own, with the kernels of one instruction set."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

from structmat.kernels.library import FILE


def compiled() -> list[str]:
    """Names of all instruction sets that the native library holds, also of those that this machine lacks."""
    if not FILE.is_file():
        return []
    library, name, found = ctypes.CDLL(str(FILE)), ctypes.c_char_p(), []
    while library.structmat_supported(len(found), ctypes.byref(name)) >= 0:
        assert name.value is not None
        found.append(name.value.decode())
    return found


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
