"""The portable kernels on Arm: compiled for it, and run by an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from native_driver import STORAGE, build, case
from native_programs import programs, tensors_of

from structmat.program import Program


@pytest.mark.slow
def test_the_portable_kernels_run_on_arm(tmp_path: Path) -> None:
    """Of all stages and dtypes, without a warning of the compiler; what they compute is tested on this machine."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no compiler for Arm, or no emulator (Debian: g++-aarch64-linux-gnu, qemu-user)")
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    driver = build(tmp_path, flags, machine="aarch64", by=compiler)
    cases: list[bytes] = []

    @settings(deadline=None, max_examples=100, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(programs(depth=2), st.sampled_from(list(STORAGE)), st.integers(0, 70), st.booleans())
    def collect(program: Program, dtype: torch.dtype, rows: int, with_bias: bool) -> None:
        cases.append(case(program, tensors_of(program, dtype, 0), dtype, rows, with_bias))

    collect()
    (tmp_path / "cases").write_bytes(b"".join(cases))
    done = subprocess.run([emulator, driver, tmp_path / "cases"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(cases)} cases, base")
