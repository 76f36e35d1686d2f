"""Products in the matrix registers of AMX: their emulation, the kernels over it, and the processor's own instructions,
which are carried out by the emulation where it lacks them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from instruction_sets import printed_by
from native_driver import SOURCES, build, case, compiler, instruction_sets
from native_programs import tensors_of

from structmat.kernels import native
from structmat.kernels.library import FILE
from structmat.program import Contraction, Sum

HERE = Path(__file__).resolve().parent

here = native()


@pytest.mark.parametrize("name", ["amx", "amx_emulated"])
def test_products_of_integers_are_exact(name: str) -> None:
    if name not in here.supported:
        pytest.skip(f"this machine has no {name}")
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import amx_products; print(amx_products.report())"
    assert printed_by(code, name) == name


def test_nothing_is_emulated_unless_asked_for() -> None:
    assert here.instruction_set != "amx_emulated" or os.environ["STRUCTMAT_ISA"] == "amx_emulated"
    if here.available:
        code = (
            f"import ctypes; name = ctypes.CDLL({str(FILE)!r}).structmat_instruction_set\n"
            "name.restype = ctypes.c_char_p; print(name().decode())"
        )
        assert printed_by(code, "the widest") in set(here.supported) - {"amx_emulated"}


# ------------------------------------------------------------------------------------------------------ the emulation


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checks, compiled."""
    found, program = compiler(), tmp_path_factory.mktemp("emulation") / "emulated_amx"
    if found is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    subprocess.run([found, *flags, str(HERE / "emulated_amx.cpp"), "-o", str(program)], check=True)
    return program


def test_the_emulation_does_what_the_reference_of_the_instructions_says(emulation: Path) -> None:
    done = subprocess.run([emulation], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_emulation_refuses_what_the_processor_refuses(emulation: Path) -> None:
    wrong = ("palette", "rows", "bytes", "half", "shape", "unconfigured", "unused", "same", "left on")
    assert [name for name in ("fine", *wrong) if subprocess.run([emulation, name]).returncode == 0] == ["fine"]


# ----------------------------------------------------------------------------------------- the instructions themselves


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizers")
def test_the_instructions_do_what_their_emulation_does(tmp_path: Path) -> None:
    """The same bits from the machine code for AMX: run by the processor, or decoded and carried out where it raises a
    signal (trapped_amx.cpp)."""
    if compiler() is None or "amx" not in instruction_sets():
        pytest.skip("no C++ compiler for AMX")
    if "avx512_bf16" not in here.supported:
        pytest.skip("this machine has no AVX512_BF16")
    instead = {} if "amx" in here.supported else {"permission.cpp": HERE / "trapped_amx.cpp"}
    driver = build(tmp_path, ["-O3"], unused=["base", "avx2", "avx512"], instead=instead)
    cases: list[bytes] = []
    sizes = st.integers(1, 70) | st.sampled_from([16, 32, 64])
    flags = st.tuples(st.booleans(), st.booleans(), st.booleans())

    @settings(deadline=None, max_examples=200, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.integers(1, 3), sizes, sizes, st.sampled_from([1, 3, 32]), flags, st.integers(16, 70))
    def collect(a: int, b: int, c: int, d: int, flags: tuple[bool, bool, bool], rows: int) -> None:
        program = Sum((Contraction("v", a, b, c, d, *flags), Contraction("w", a, b, c, d)))
        cases.append(case(program, tensors_of(program, torch.bfloat16, len(cases)), torch.bfloat16, rows))

    collect()
    (tmp_path / "cases").write_bytes(b"".join(cases))
    printed = {}
    for name in ("avx512_bf16", "amx_emulated", "amx"):
        done = subprocess.run(
            [driver, tmp_path / "cases", "tiles"],
            env={**os.environ, "STRUCTMAT_ISA": name},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (name, done.stderr)
        count, used, printed[name] = done.stdout.strip().split(", ")
        assert (count, used) == (f"{len(cases)} cases", name)
    assert printed["amx"] == printed["amx_emulated"]
    assert printed["amx"] != printed["avx512_bf16"]  # sums are in another order
