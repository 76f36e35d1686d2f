"""The native library: found, loaded and registered with PyTorch once."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from structmat.kernels import activated
from structmat.kernels.by_address import ByAddress
from structmat.kernels.operator import define_fakes

FILE = Path(__file__).resolve().parent.parent / "_native.so"

_STABLE_INTERFACE = (2 << 56) | (10 << 48)
"""The version of PyTorch's C interface that the library was written for: 2.10, the first with all that it calls."""


@dataclass(frozen=True)
class Native:
    """What there is of the native backend.

    Args:
        available: whether programs can run on it.
        reason: why not, if not; or why it is called by address instead of by operators of PyTorch.
        instruction_set: which of the compiled ones runs here; the environment variable ``STRUCTMAT_ISA`` caps it.
            ``amx_emulated`` computes as ``amx`` would, slowly, and is for tests: it runs only if named there.
        supported: all that were compiled and that the machine has.
        by_address: how it is called where the loaded PyTorch did not take its operators.
    """

    available: bool
    reason: str = ""
    instruction_set: str = ""
    supported: tuple[str, ...] = ()
    by_address: ByAddress | None = None

    @property
    def multiplies_matrices(self) -> bool:
        """Whether it multiplies small matrices of bfloat16 by instructions for them (AMX), or emulates these."""
        return self.instruction_set.startswith("amx")

    @property
    def multiplies_pairs(self) -> bool:
        """Whether it multiplies pairs of bfloat16 by instructions for them (AVX512_BF16)."""
        return self.multiplies_matrices or self.instruction_set == "avx512_bf16"


@cache
def native() -> Native:
    """Load the library on first use."""
    if not FILE.is_file():
        return Native(False, "it was not built when structmat was installed (there was no C++ compiler)")
    try:
        library = ctypes.CDLL(str(FILE))
    except OSError as error:
        return Native(False, f"it can't be loaded: {error}")
    problem = _register(library)
    if not problem:
        define_fakes()
        activated.define_operators()
    library.structmat_instruction_set.restype = ctypes.c_char_p
    chosen, supported = library.structmat_instruction_set().decode(), tuple(_supported(library))
    return Native(True, problem, chosen, supported, ByAddress.of(library) if problem else None)


def _register(library: ctypes.CDLL) -> str:
    """Make the library's operators known to PyTorch; why that failed, or nothing."""
    if os.environ.get("STRUCTMAT_OPERATORS") == "0":
        return "STRUCTMAT_OPERATORS=0"
    library.structmat_register.restype = ctypes.c_char_p
    library.structmat_register.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    problem: bytes | None = library.structmat_register(str(libtorch).encode(), _STABLE_INTERFACE)
    return f"PyTorch {torch.__version__} did not take its operators: {problem.decode()}" if problem else ""


def _supported(library: ctypes.CDLL) -> list[str]:
    name, found, number = ctypes.c_char_p(), [], 0
    while (here := library.structmat_supported(number, ctypes.byref(name))) >= 0:
        if here and name.value is not None:
            found.append(name.value.decode())
        number += 1
    return found
