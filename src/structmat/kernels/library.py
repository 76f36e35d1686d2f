"""The native library: found, loaded and registered with PyTorch once."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from structmat.kernels.operator import define_fakes

FILE = Path(__file__).resolve().parent.parent / "_native.so"

_STABLE_INTERFACE = (2 << 56) | (10 << 48)
"""The version of PyTorch's C interface that the library was written for: 2.10, the first with all that it calls."""


@dataclass(frozen=True)
class Native:
    """What there is of the native backend.

    Args:
        available: whether programs can run on it.
        reason: why not, if not.
        instruction_set: which of the compiled ones runs here; the environment variable ``STRUCTMAT_ISA`` caps it.
        supported: all that were compiled and that the machine has.
    """

    available: bool
    reason: str = ""
    instruction_set: str = ""
    supported: tuple[str, ...] = ()


@cache
def native() -> Native:
    """Load the library on first use."""
    if not FILE.is_file():
        return Native(False, "it was not built when structmat was installed (there was no C++ compiler)")
    try:
        library = ctypes.CDLL(str(FILE))
    except OSError as error:
        return Native(False, f"it can't be loaded: {error}")
    library.structmat_register.restype = ctypes.c_char_p
    library.structmat_register.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    problem = library.structmat_register(str(libtorch).encode(), _STABLE_INTERFACE)
    if problem:
        return Native(False, f"PyTorch {torch.__version__} did not take it: {problem.decode()}")
    define_fakes()
    library.structmat_instruction_set.restype = ctypes.c_char_p
    return Native(True, "", library.structmat_instruction_set().decode(), tuple(_supported(library)))


def _supported(library: ctypes.CDLL) -> list[str]:
    name, found, number = ctypes.c_char_p(), [], 0
    while (here := library.structmat_supported(number, ctypes.byref(name))) >= 0:
        if here and name.value is not None:
            found.append(name.value.decode())
        number += 1
    return found
