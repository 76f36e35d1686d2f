"""Inspection: exact structure is named, tables and pictures are drawn, bad input is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import structmat as sm
from structmat.errors import DataError, ShapeError, StructureError


def member(
    structure: sm.Structure, shape: tuple[int, int] = (48, 64), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return sm.StructuredMatrix.random(structure, shape, generator=generator, dtype=torch.float64).to_dense().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "structure",
    [
        sm.LowRank(rank=1),
        sm.LowRank(rank=5),
        sm.LowRank(rank=11),
        sm.BlockDiagonal(blocks=4),
        sm.BlockDiagonal(blocks=6),
    ],
    ids=str,
)
def test_an_exact_member_is_named(structure: sm.Structure, dtype: torch.dtype) -> None:
    found = sm.inspect(member(structure, dtype=dtype), structures=["LowRank", "BlockDiagonal"])
    assert [f.structure for f in found.exact] == [structure]
    assert str(structure) in found.verdict
    assert "exactly" in found.verdict
    assert "exact" in str(found)


def test_every_family_whose_projection_is_optimal_is_recognised() -> None:
    shape = (64, 64)
    missed = []
    for name, family in sm.families().items():
        if name == "Dense":
            continue
        for structure in list(family.configurations(shape, 64 * 64 // 4))[:1]:
            matrix = member(structure, shape, torch.float64)
            if sm.project(matrix, structure).certificate.value == "optimal":
                found = sm.inspect(matrix, structures=[name])
                if not found.exact or found.exact[0].numbers > found.dense // 4:
                    missed.append(structure)
    assert not missed


def test_a_matrix_without_structure() -> None:
    found = sm.inspect(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    assert not found.exact
    assert found.verdict.startswith("It has no structure exactly. Nearest within half of the parameters is ")
    for finding in found.findings:
        assert finding.lower_bound <= finding.error * (1 + 1e-9) <= 1 + 1e-6


def test_zero_matrix_is_everything() -> None:
    found = sm.inspect(torch.zeros(16, 16), structures=["LowRank"])
    assert found.exact[0].structure == sm.LowRank(rank=1)


def test_second_moment_changes_the_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, inputs = (
        torch.randn(24, 24, generator=generator),
        torch.randn(24, 3, generator=generator, dtype=torch.float64),
    )
    assert not sm.inspect(matrix, structures=["LowRank"]).exact
    found = sm.inspect(matrix, inputs @ inputs.T, structures=["LowRank"])
    assert found.exact[0].structure == sm.LowRank(rank=3)  # only three directions ever occur
    assert found.norm == "activation-weighted"


def test_json_and_single_structures() -> None:
    found = sm.inspect(torch.randn(16, 24), structures=[sm.LowRank(rank=3), sm.LowRank(rank=40)], shares=[0.5])
    data = json.loads(json.dumps(found.to_json()))
    assert [f["structure"]["rank"] for f in data["findings"]] == [3]
    assert "at most 16" in data["refused"]["LowRank"]
    assert "LowRank was not tried" in str(found)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib: pip install structmat[plot]")
    found = sm.inspect(torch.randn(16, 24))
    axes = found.plot()
    assert len(axes.lines) == len({f.family for f in found.findings})
    axes.figure.savefig(tmp_path / "plot.png")
    assert found.plot(axes) is axes


def test_bad_input() -> None:
    with pytest.raises(DataError, match="1 entries"):
        sm.inspect(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ShapeError, match="two axes"):
        sm.inspect(torch.zeros(3))
    with pytest.raises(ShapeError, match="at least 1"):
        sm.inspect(torch.zeros(0, 3))
    with pytest.raises(StructureError, match="strictly between 0 and 1"):
        sm.inspect(torch.zeros(3, 3), shares=[2])
    with pytest.raises(StructureError, match="Unknown family 'Magic'"):
        sm.inspect(torch.zeros(3, 3), structures=["Magic"])
