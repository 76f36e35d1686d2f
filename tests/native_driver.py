"""The stand-alone driver of the kernels: building it, and cases for it. There is no PyTorch in its process."""

from __future__ import annotations

import ast
import platform
import shutil
import struct
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from structmat.kernels.text import Text, text_of
from structmat.program import Program

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
WITH_PYTORCH = ("libtorch.cpp", "torch_layers.cpp", "torch_standing.cpp", "torch_binding.cpp")
STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++") or shutil.which("clang++")


def build(
    folder: Path,
    flags: Sequence[str],
    unused: Collection[str] = (),
    machine: str = "",
    by: str | None = None,
    instead: Mapping[str, Path] = MappingProxyType({}),
) -> Path:
    """The driver with the kernels of every instruction set that is built for a machine.

    Args:
        folder: for all that is made.
        flags: for every file.
        unused: instruction sets that will not run: linked, but not optimized, which takes its time.
        machine: as ``platform.machine()`` names it; this one if empty.
        by: the compiler for it.
        instead: sources that take the place of those named.
    """
    found = by or compiler()
    assert found is not None
    setup = _setup(machine)
    common = [found, "-std=c++17", "-g", *flags]
    jobs: dict[str, tuple[str, list[str]]] = {
        Path(name).stem: (name, []) for name in (*setup["SOURCES"], "driver.cpp") if name not in WITH_PYTORCH
    }
    for name, own in setup["instruction_sets"]().items():
        slow = ["-O0"] if name.removeprefix("isa_") in unused else []
        for source in setup["KERNELS"]:
            jobs[f"{name}_{Path(source).stem}"] = (source, [*own, *slow, f"-DSTRUCTMAT_ISA={name}"])
    for source, choices in setup["PAIRS"].items():
        jobs[Path(source).stem] = (source, list(choices[0]) if setup["ON_X86"] else [])
    for name, (source, own) in jobs.items():
        file = instead.get(source, SOURCES / source)
        command = [*common, *own, f"-I{SOURCES}", "-c", str(file), "-o", str(folder / f"{name}.o")]
        subprocess.run(command, check=True)
    objects = [str(folder / f"{name}.o") for name in jobs]
    subprocess.run([*common, *objects, "-o", str(folder / "driver")], check=True)
    return folder / "driver"


def instruction_sets() -> tuple[str, ...]:
    """Names of all that are built for this machine, as ``STRUCTMAT_ISA`` takes them."""
    pairs = ("avx512_bf16", "amx", "amx_emulated") if _setup()["ON_X86"] else ()
    return (*(name.removeprefix("isa_") for name in _setup()["instruction_sets"]()), *pairs)


@cache
def _setup(machine: str = "") -> dict[str, Any]:
    """What ``setup.py`` says is compiled, and how: its constants, without running the build, which needs setuptools."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) != "ROOT")
        or (isinstance(node, ast.FunctionDef) and node.name == "instruction_sets")
    ]
    names: dict[str, Any] = {"platform": _Platform(machine or platform.machine())}
    exec(compile("from __future__ import annotations\n" + ast.unparse(tree), "setup.py", "exec"), names)
    return names


@dataclass(frozen=True)
class _Platform:
    """As much of the module :mod:`platform` as ``setup.py`` asks."""

    name: str

    def machine(self) -> str:
        return self.name


def case(
    program: Program, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: int, with_bias: bool = False
) -> bytes:
    """A program, its tensors and an input as the driver reads them; the rows of the input lie apart."""
    text = text_of(program)
    assert isinstance(text, Text)
    given = [tensors[name] for name in text.names]
    if with_bias:
        given.append(torch.randn(program.out_features).to(dtype))
    return case_of(text.biased if with_bias else text.plain, program.in_features, given, dtype, rows)


def case_of(words: str, in_features: int, given: Sequence[Tensor], dtype: torch.dtype, rows: int) -> bytes:
    """The same of a text, and of the tensors in its order."""
    x = torch.randn(max(0, rows * (in_features + 3) - 3)).to(dtype)
    parts = [struct.pack("<q", len(words)), words.encode()]
    parts += [struct.pack("<qqq", rows, STORAGE[dtype], in_features + 3), held(x)]
    parts += [struct.pack("<q", len(given))]
    for tensor in given:
        parts += [struct.pack("<q", tensor.numel()), held(tensor)]
    return b"".join(parts)


def held(tensor: Tensor) -> bytes:
    """The numbers of a tensor, after how many bytes they are."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(data)) + data
