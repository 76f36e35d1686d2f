"""A third party's family: one file and an entry point, and it appears everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAMILY = '''
"""Matrices that are constant along each row."""

from dataclasses import dataclass

import torch

from structmat.program import Call
from structmat.projection.target import Certificate, Fit
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Structure


def spread(x, level):
    """Every row of the matrix holds one number."""
    return x.sum(-1, keepdim=True) * level


@dataclass(frozen=True)
class RowConstant(Structure):
    """Every row holds one number, ``level`` (out,)."""

    def parameters(self, shape):
        return {"level": ParameterSpec((shape[0],), Normal((DENSE_GAIN / shape[1]) ** 0.5))}

    def program(self, shape):
        rows, columns = shape
        return Call(spread, (("level", rows),), rows, columns, rows, columns - 1, 4)

    def project(self, target):
        moment = target.second_moment
        if moment is None:
            moment = torch.eye(target.native[1], dtype=target.weight.dtype)
        seen = moment.sum()
        level = (target.weight @ moment).sum(1) / seen if float(seen.real) > 0 else target.weight.mean(1)
        member = level[:, None].expand(target.native)
        return Fit({"level": level}, Certificate.OPTIMAL, target.error(member), "weighted means")

    @classmethod
    def configurations(cls, shape, budget):
        if shape[0] <= budget:
            yield cls()
'''

USES = {
    "appears among the families": """
assert "RowConstant" in sm.families(), sorted(sm.families())
assert sm.RowConstant is sm.families()["RowConstant"]
assert "RowConstant" in dir(sm)
""",
    "is a layer": """
layer = sm.nn.StructuredLinear(6, 4, structure=sm.RowConstant())
y = layer(torch.randn(3, 6))
y.sum().backward()
assert y.shape == (3, 4) and layer.level.grad.shape == (4,)
""",
    "is projected on": """
W = torch.arange(4.0)[:, None].expand(4, 6).double()
found = sm.project(W, sm.RowConstant())
assert found.error < 1e-15 and found.certificate.value == "optimal", found
""",
    "is part of a structure's JSON": """
from structmat.structure import to_json
from structmat.structures import from_json
data = to_json(sm.RowConstant())
assert data == {"family": "RowConstant"}, data
assert from_json(data) == sm.RowConstant()
""",
    "keeps the contract": """
from structmat.testing import CHECKS, check_structure
groups = [g for g in CHECKS if g not in ("inductor", "export", "onnx")]
for shape in [(1, 1), (5, 7), (12, 10)]:
    check_structure(sm.RowConstant(), shape, groups=groups)
""",
    "is chosen by compress": """
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
with torch.no_grad():
    model[0].weight.copy_(torch.arange(8.0)[:, None].expand(8, 6))
for structures in (("RowConstant", "LowRank"), (sm.RowConstant,), None):
    result = sm.compress(model, budget=sm.Parameters(0.6), structures=structures, exclude=("2",))
    assert result.plan.layers == {"0": sm.RowConstant()}, (structures, result.plan.layers)
    (layer,) = result.report.layers
    assert layer.parameters == 8 and layer.error < 1e-6 and layer.certificate == "optimal", layer
x = torch.rand(5, 6)
out, wanted = result.model(x).detach(), model(x).detach()
assert torch.allclose(out, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())), (out - wanted).abs().max()
""",
    "is chosen with calibration data": """
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
x = torch.rand(64, 6)
result = sm.compress(model, budget=sm.Parameters(0.7), calibration=[x], structures=("RowConstant",))
assert sm.RowConstant() in result.plan.layers.values(), result.plan.layers
assert result.report.budget["spent"] <= 0.7 * 96
""",
    "is saved and loaded": """
import tempfile
make = lambda: torch.nn.Sequential(torch.nn.Linear(6, 4))
model = make()
model[0] = sm.nn.StructuredLinear.from_linear(model[0], sm.RowConstant())
with tempfile.TemporaryDirectory() as folder:
    sm.save(model, folder)
    loaded = sm.load(folder, make())
assert loaded[0].structure == sm.RowConstant() and torch.equal(loaded[0].level, model[0].level)
""",
    "is used by the command line": """
import json, os, tempfile
from safetensors.torch import save_file
from typer.testing import CliRunner
from structmat.cli import app
def data(*arguments):
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)
with tempfile.TemporaryDirectory() as folder:
    weights, out = os.path.join(folder, "weights.safetensors"), os.path.join(folder, "out")
    save_file({"a.weight": torch.arange(8.0)[:, None].expand(8, 6).contiguous()}, weights)
    (layer,) = data("compress", weights, "--budget", "0.5", "--family", "RowConstant", "--out", out)["layers"]
    assert layer["structure"] == "RowConstant()", layer
    assert sm.Plan.read(os.path.join(out, "plan.json")).layers == {"a": sm.RowConstant()}
    found = data("inspect", weights, "--family", "RowConstant")
    assert found["a.weight"]["exact"] == [{"family": "RowConstant"}], found
assert "RowConstant" in [row["family"] for row in data("info")["families"]]
found = data("bench", "--size", "8", "--batch", "2", "--seconds", "0", "--family", "RowConstant")
(layer,) = found["settings"][0]["layers"]
assert layer["structure"] == "RowConstant()", layer
""",
    "stands in the docs table": """
sys.path.insert(0, sys.argv[1] + "/docs")
import gen_families
assert "| `RowConstant` |" in gen_families.table()
""",
}

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip leaves it: the module and a dist-info that names the entry point."""
    site = tmp_path_factory.mktemp("site")
    (site / "row_constant.py").write_text(FAMILY, encoding="utf-8")
    info = site / "row_constant-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: row-constant\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[structmat.structures]\nrow = row_constant\n", encoding="utf-8")
    return site


def run(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(site), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    program = f"import sys\nimport torch\nimport structmat as sm\n{code}"
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program, str(ROOT), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


RUNNER = """
import json, traceback
outcomes = {}
for what, code in json.loads(sys.argv[2]).items():
    try:
        exec(code, {"sm": sm, "torch": torch, "sys": sys})
    except Exception:
        outcomes[what] = traceback.format_exc()
sys.stdout.write(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def failures(installed: Path) -> dict[str, str]:
    """What went wrong in each use; all in one process, since starting one takes seconds."""
    done = run(installed, RUNNER, json.dumps({**USES, "fails": "raise ValueError('on purpose')"}))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("what", USES)
def test_a_third_partys_family(failures: dict[str, str], what: str) -> None:
    assert what not in failures, failures[what]


def test_these_tests_can_fail(failures: dict[str, str]) -> None:
    assert "on purpose" in failures["fails"]


def test_a_name_taken_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(FAMILY.replace("RowConstant", "LowRank"), encoding="utf-8")
    info = tmp_path / "twin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twin\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[structmat.structures]\ntwin = twin\n", encoding="utf-8")
    done = run(tmp_path, "sm.families()")
    assert done.returncode != 0
    assert "Two families are named LowRank" in done.stderr
