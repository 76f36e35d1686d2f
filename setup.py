"""Builds the native library: plain C++17, compiled once for each instruction set, no header of Python or PyTorch.

Without a working compiler the package installs all the same and runs on PyTorch operations; with the environment
variable ``STRUCTMAT_REQUIRE_NATIVE=1`` that is an error.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = (
    "plan.cpp",
    "execute.cpp",
    "execute_pairs.cpp",
    "execute_vectors.cpp",
    "recur.cpp",
    "convolve.cpp",
    "backward_plan.cpp",
    "backward.cpp",
    "pooled.cpp",
    "cpu.cpp",
    "permission.cpp",
    "kept_plans.cpp",
    "plain_binding.cpp",
    "libtorch.cpp",
    "torch_layers.cpp",
    "torch_standing.cpp",
    "torch_binding.cpp",
)
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")

AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512")
INSTRUCTION_SETS = {
    "isa_base": (),
    "isa_avx2": ("-mavx2", "-mfma"),
    "isa_avx512": AVX512,
}
BFLOAT16 = (*AVX512, "-mavx512bf16")
AMX = (*BFLOAT16, "-mamx-tile", "-mamx-bf16")
KERNELS = ("kernels.cpp", "pooling.cpp")
"""What is compiled for every instruction set."""
PAIRS = {"bfloat16.cpp": (BFLOAT16,), "amx.cpp": (AMX, BFLOAT16)}
"""Kernels for pairs of bfloat16 numbers: the flags for each, the first that the compiler knows, or none."""

ON_X86 = platform.machine().lower() in ("x86_64", "amd64")


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """What is compiled for this machine: the others have the portable kernels alone."""
    return INSTRUCTION_SETS if ON_X86 else {"isa_base": ()}


class BuildNative(build_ext):
    """Compiles and links ``structmat/_native.so`` by the C++ compiler itself."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("STRUCTMAT_REQUIRE_NATIVE") == "1":
                raise
            self.warn(f"structmat is installed without its native kernels, and runs on PyTorch alone: {error}")

    def _build(self, target: Path) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [self._compile(compiler, source, folder, ("-O3",)) for source in SOURCES]
        for name, flags in instruction_sets().items():
            own = ("-O3", "-ffp-contract=fast", f"-DSTRUCTMAT_ISA={name}", *flags)
            for source in KERNELS:
                object_name = name if source == KERNELS[0] else f"{name}_{Path(source).stem}"
                objects.append(self._compile(compiler, source, folder, own, object_name))
        for source, choices in PAIRS.items():
            known = next((flags for flags in choices if ON_X86 and self._knows(compiler, flags)), ())
            objects.append(self._compile(compiler, source, folder, ("-O3", *known)))
        # Linked under another name and renamed: a process that has the old library loaded keeps it.
        draft = target.with_suffix(".partial")
        self._run([compiler, "-shared", "-s", "-o", str(draft), *map(str, objects), "-ldl", "-pthread"])
        os.replace(draft, target)

    def _compile(self, compiler: str, source: str, folder: Path, flags: tuple[str, ...], name: str = "") -> Path:
        made = folder / f"{name or Path(source).stem}.o"
        self._run([compiler, *COMMON, *flags, "-c", str(ROOT / "csrc" / source), "-o", str(made)])
        return made

    def _knows(self, compiler: str, flags: tuple[str, ...]) -> bool:
        command = [compiler, *flags, "-x", "c++", "-E", "-", "-o", os.devnull]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0

    def _run(self, command: list[str]) -> None:
        outcome = subprocess.run(command, capture_output=True, text=True)
        if outcome.returncode:
            sys.stderr.write(outcome.stderr)
            raise subprocess.CalledProcessError(outcome.returncode, command[0], stderr=outcome.stderr)


class PlainWheel(bdist_wheel):
    """One wheel serves every version of Python: the library knows none."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("structmat._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlainWheel},
)
