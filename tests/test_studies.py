"""The studies of ``benchmarks``: every one can be started, and their tables can be written before anything has run."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

benchmarks = pytest.importorskip("benchmarks", reason="the folder benchmarks/ is not part of an installed package")
MODULES = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_a_study_can_be_started(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    study = getattr(module, "STUDY", None)
    if hasattr(study, "cells"):
        keys = [cell.key for cell in study.cells]
        assert len(set(keys)) == len(keys)
        assert all(isinstance(line, str) for line in study.tables({}))
