"""Code in a process of its own, with the kernels of one instruction set."""

from __future__ import annotations

import os
import subprocess
import sys


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
