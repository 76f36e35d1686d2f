"""How many instructions a few kernels take on the AVX2 path, counted by callgrind: the same on a busy machine.

    python tests/instruction_counts.py        renews the record, instruction_counts.json

(valgrind knows no AVX-512.) Only the products themselves are counted: no plans, no reading of files.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from native_driver import build, case, compiler, instruction_sets

import structmat as sm
from structmat import program as programs
from structmat.matrix import draw
from structmat.program import FOR_NATIVE, Program, fuse
from structmat.structure import resolve

RECORD = Path(__file__).resolve().with_name("instruction_counts.json")

RENEW = f"python tests/{Path(__file__).name}"

PATH = "avx2"


@dataclass(frozen=True)
class Kernel:
    """One product that is counted.

    Args:
        structure: of a square matrix.
        size: its rows and columns.
        rows: of the input.
        way: of the driver: ``tiles``, ``vectors`` (few rows) or ``backward`` (all gradients).
        dtype: of everything.
        frozen: whether the program is put together as for deployment.
    """

    structure: sm.Structure
    size: int
    rows: int
    way: str
    dtype: torch.dtype = torch.float32
    frozen: bool = False


KERNELS = {
    "Monarch": Kernel(sm.Monarch(blocks=16), 256, 64, "tiles"),
    "Monarch, float64": Kernel(sm.Monarch(blocks=16), 256, 64, "tiles", torch.float64),
    "Monarch, bfloat16": Kernel(sm.Monarch(blocks=16), 256, 64, "tiles", torch.bfloat16),
    "Monarch, one row": Kernel(sm.Monarch(blocks=16), 256, 1, "vectors"),
    "Monarch, backward": Kernel(sm.Monarch(blocks=16), 256, 64, "backward"),
    "Butterfly, 2 x 2": Kernel(sm.Butterfly(), 256, 64, "tiles"),
    "Butterfly, 4 x 4": Kernel(sm.Butterfly(), 256, 64, "tiles", frozen=True),
    "Butterfly, backward": Kernel(sm.Butterfly(), 256, 64, "backward"),
    "Kronecker": Kernel(sm.Kronecker(terms=1, factors=2), 256, 64, "tiles"),
    "Low rank": Kernel(sm.LowRank(rank=32), 256, 64, "tiles"),
    "Sparse": Kernel(sm.Sparse(density=0.1), 256, 64, "tiles"),
    "Sparse, backward": Kernel(sm.Sparse(density=0.1), 256, 64, "backward"),
}

ENTRY = {"tiles": "execute", "vectors": "execute_vectors", "backward": "execute_backward"}
"""The function of the library that each way calls: what is counted, with all that it calls."""


def obstacle() -> str | None:
    """Why nothing can be counted here, or None."""
    if compiler() is None:
        return "no C++ compiler"
    if PATH not in instruction_sets():
        return f"no {PATH} on {platform.machine()}"
    return None if shutil.which("valgrind") else "no valgrind"


def versions() -> dict[str, str]:
    """What the counts depend on beside the source."""
    found = compiler()
    assert found is not None
    return {"compiler": _first_line(found), "valgrind": _first_line("valgrind")}


def _first_line(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def measure(folder: Path) -> dict[str, int]:
    """Instructions of every kernel; builds the driver in an empty folder first."""
    driver = build(folder, ["-O3", "-ffp-contract=fast"], unused=[n for n in instruction_sets() if n != PATH])
    return {name: _count(driver, kernel) for name, kernel in KERNELS.items()}


def _count(driver: Path, kernel: Kernel) -> int:
    torch.manual_seed(0)
    file, out = driver.parent / "case", driver.parent / "counts"
    file.write_bytes(case(*_program(kernel), kernel.dtype, kernel.rows))
    command = [
        "valgrind",
        "--tool=callgrind",
        f"--toggle-collect=structmat::{ENTRY[kernel.way]}(*",
        f"--callgrind-out-file={out}",
        str(driver),
        str(file),
        kernel.way,
    ]
    done = subprocess.run(command, env={**os.environ, "STRUCTMAT_ISA": PATH}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"1 cases, {PATH}, "), done.stdout
    totals = re.search(r"^totals: (\d+)$", out.read_text(encoding="utf-8"), re.MULTILINE)
    assert totals is not None
    return int(totals[1])


def _program(kernel: Kernel) -> tuple[Program, dict[str, Any]]:
    shape = (kernel.size, kernel.size)
    structure = resolve(kernel.structure, shape)
    tensors = draw(structure, shape, generator=torch.Generator().manual_seed(0), dtype=kernel.dtype)
    program = programs.build(structure, shape)
    return fuse(program, tensors, FOR_NATIVE) if kernel.frozen else (program, tensors)


def main() -> None:
    reason = obstacle()
    if reason is not None:
        raise SystemExit(f"Nothing can be counted: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        data = {**versions(), "instructions": measure(Path(folder))}
    RECORD.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(RECORD.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
