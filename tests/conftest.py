"""Strictness for all tests: one thread, fixed seeds, no global state left behind, deterministic hypothesis."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from structmat.kernels import tuning

ROOT = Path(__file__).resolve().parent.parent

# Nothing that was measured on this machine before decides what the tests run, also not in processes that they start.
CACHE = tempfile.TemporaryDirectory(prefix="structmat-tests-")
os.environ["STRUCTMAT_CACHE"] = CACHE.name

# Fixed examples where a failure must be a failure of the change (in CI); new ones each time elsewhere.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.register_profile("local", deadline=None, max_examples=50)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """Every test starts from the same seed, and none may leave another default behind."""
    torch.manual_seed(0)
    before = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
    yield
    if any(Path(CACHE.name).iterdir()):
        tuning.forget()
        tuning.path().unlink()
    after = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[2])
    assert before == after, f"the test changed the default dtype, device or gradient mode: {before} to {after}"


@pytest.fixture
def float64() -> Iterator[None]:
    """The default dtype is float64 for the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that the environment variable STRUCTMAT_DATA names."""
    given = os.environ.get("STRUCTMAT_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder; set STRUCTMAT_DATA to one that holds it")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tables that tests recorded, also of passed ones and of other processes."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in report.user_properties:
            if name == "table" and report.when == "call":
                terminalreporter.section(report.nodeid)
                terminalreporter.write_line(str(text))
