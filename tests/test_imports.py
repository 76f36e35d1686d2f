"""Imports point one way, and importing the package is instant."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from imports import loaded_imports, violations

import structmat

PACKAGE = Path(structmat.__file__).parent


def test_imports_point_one_way() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "line", "caught"),
    [
        ("program/stages.py", "from structmat.matrix import StructuredMatrix", True),
        ("program/stages.py", "import structmat.nn.linear", True),
        ("program/stages.py", "from structmat import nn", True),
        ("program/stages.py", "try:\n    from structmat.nn import linear\nexcept ImportError:\n    pass", True),
        ("structure.py", "from structmat.program import build", True),
        ("structures/new.py", "from structmat.nn.linear import StructuredLinear", True),
        ("elsewhere.py", "x = 1", True),
        ("program/stages.py", "from structmat.structure import Shape", False),
        ("structures/new.py", "from structmat.projection.target import Fit", False),
        ("structure.py", "if TYPE_CHECKING:\n    from structmat.program import Program", False),
        ("structure.py", "def f():\n    from structmat.program import Program", False),
    ],
)
def test_the_order_can_be_violated(tmp_path: Path, module: str, line: str, caught: bool) -> None:
    path = tmp_path / module
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(line + "\n", encoding="utf-8")
    assert bool(violations(tmp_path)) is caught


def test_relative_imports_are_refused() -> None:
    with pytest.raises(AssertionError, match="relative import"):
        list(loaded_imports(ast.parse("from .stages import Stage")))


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_does_not_import_torch() -> None:
    assert "torch" not in loaded_after("import structmat")


def test_that_test_can_fail() -> None:
    assert "torch" in loaded_after("import structmat; structmat.StructuredMatrix")


@pytest.mark.parametrize(
    "module", ["structmat.matrix", "structmat.kernels", "structmat.program", "structmat.structures", "structmat.io"]
)
def test_a_module_can_be_the_first_to_be_imported(module: str) -> None:
    assert module in loaded_after(f"import {module}")
