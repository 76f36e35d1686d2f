"""The native kernels under AddressSanitizer and UBSan, on random programs, without PyTorch in the process."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from native_programs import programs, tensors_of
from torch import Tensor

from structmat.kernels.text import Text, text_of
from structmat.program import Pad, Program

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FLAGS = {
    "isa_base": [],
    "isa_avx2": ["-mavx2", "-mfma"],
    "isa_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"],
}


def case(program: Program, dtype: torch.dtype, rows: int, seed: int, with_bias: bool) -> bytes:
    """A program, its input and its tensors as the driver reads them; the rows of the input lie apart."""
    text = text_of(program)
    assert isinstance(text, Text)
    made = tensors_of(program, dtype, seed)
    tensors = [made[name] for name in text.names]
    if with_bias:
        tensors.append(torch.randn(program.out_features).to(dtype))
    x = torch.randn(max(0, rows * (program.in_features + 3) - 3)).to(dtype)
    words = (text.biased if with_bias else text.plain).encode()
    parts = [struct.pack("<q", len(words)), words]
    parts += [struct.pack("<qqq", rows, STORAGE[dtype], program.in_features + 3), held(x)]
    parts += [struct.pack("<q", len(tensors))]
    for tensor in tensors:
        parts += [struct.pack("<q", tensor.numel()), held(tensor)]
    return b"".join(parts)


def held(tensor: Tensor) -> bytes:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(data)) + data


def build(folder: Path, compiler: str, flags: list[str]) -> Path:
    """The driver with the kernels of every instruction set."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = FLAGS if on_x86 else {"isa_base": FLAGS["isa_base"]}
    common = [compiler, "-std=c++17", "-g", "-O1", *flags]
    objects = []
    for source in ("plan", "execute", "execute_pairs", "execute_vectors", "backward_plan", "backward", "cpu", "driver"):
        objects.append(str(folder / f"{source}.o"))
        subprocess.run([*common, "-c", str(SOURCES / f"{source}.cpp"), "-o", objects[-1]], check=True)
    for name, own in sets.items():
        objects.append(str(folder / f"{name}.o"))
        command = [*common, *own, f"-DSTRUCTMAT_ISA={name}", "-c", str(SOURCES / "kernels.cpp"), "-o", objects[-1]]
        subprocess.run(command, check=True)
    objects.append(str(folder / "bfloat16.o"))
    own = [*FLAGS["isa_avx512"], "-mavx512bf16"] if on_x86 else []
    subprocess.run([*common, *own, "-c", str(SOURCES / "bfloat16.cpp"), "-o", objects[-1]], check=True)
    subprocess.run([*common, *objects, "-o", str(folder / "driver")], check=True)
    return folder / "driver"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for the tests of this module, with both sanitizers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("driver")
    return build(folder, compiler, ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])


def run(driver: Path, cases: list[bytes], instruction_set: str | None = None) -> subprocess.CompletedProcess[str]:
    file = driver.parent / "cases"
    file.write_bytes(b"".join(cases))
    chosen = {} if instruction_set is None else {"STRUCTMAT_ISA": instruction_set}
    return subprocess.run([driver, file], env={**os.environ, **chosen}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizers")
def test_the_kernels_are_clean_under_sanitizers(driver: Path) -> None:
    # A program without a tensor comes first: nothing is summed for it, and nothing was reserved before it.
    cases = [case(Pad(5, 9, 2), dtype, 3, 0, False) for dtype in STORAGE]

    @settings(deadline=None, max_examples=400, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(programs(depth=3), st.sampled_from(list(STORAGE)), st.integers(0, 70), st.integers(0, 10**6), st.booleans())
    def collect(program: Program, dtype: torch.dtype, rows: int, seed: int, with_bias: bool) -> None:
        cases.append(case(program, dtype, rows, seed, with_bias))

    collect()
    assert len(cases) >= 400
    for name in ("base", "avx2", "avx512", "avx512_bf16"):
        done = run(driver, cases, name)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.startswith(f"{len(cases)} cases")


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizers")
def test_the_sanitizers_see_what_is_wrong(driver: Path) -> None:
    """A read beyond the end of a tensor ends the driver: the test above can fail."""
    words = b"rows 4 contract 1 4 8 1 0 0 0 0"
    x, weight = torch.randn(2 * 8), torch.randn(31)  # one number is missing, though the case says 32
    parts = [struct.pack("<q", len(words)), words, struct.pack("<qqq", 2, 0, 8), held(x), struct.pack("<qq", 1, 32)]
    done = run(driver, [*parts, held(weight)])
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
