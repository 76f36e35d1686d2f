"""Files of earlier versions of the format are read; what is no such version is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.errors import FormatError
from structmat.file_format import HEADER


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The folder with another header."""
    header = json.loads((folder / HEADER).read_text())
    change(header)
    (folder / HEADER).write_text(json.dumps(header))


def to_version_1(header: dict[str, Any]) -> None:
    """What version 1 wrote: it knew linear layers only, and had nothing to say of modules that are taken apart."""
    header["version"] = 1
    assert header.pop("split") == {}
    for layer in header["layers"].values():
        assert not {"copies", "more"} & set(layer)


def model(structured: bool) -> nn.Sequential:
    torch.manual_seed(int(structured))
    first: nn.Module = nn.Linear(12, 8)
    if structured:
        first = sm.nn.StructuredLinear(12, 8, structure=sm.Monarch(2, 1))
    return nn.Sequential(first, nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False))


def test_a_model_of_version_1(tmp_path: Path) -> None:
    saved = model(True).eval()
    sm.save(saved, tmp_path)
    rewritten(tmp_path, to_version_1)
    x = torch.randn(3, 12)
    loaded = sm.load(tmp_path, model(False).eval())
    assert isinstance(loaded[0], sm.nn.StructuredLinear)
    assert torch.equal(loaded(x), saved(x))
    on_meta = model(False).eval().to("meta")
    assert torch.equal(sm.load(tmp_path, on_meta)(x), saved(x))


@pytest.mark.parametrize("structure", [sm.LowRank(3), sm.Sparse(nonzeros=7), sm.Permutation()], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_of_version_1(structure: sm.structure.Structure, transposed: bool, tmp_path: Path) -> None:
    matrix = sm.StructuredMatrix.random(structure, (8, 8), generator=torch.Generator().manual_seed(0))
    matrix = matrix.T if transposed else matrix
    sm.save(matrix, tmp_path)
    rewritten(tmp_path, to_version_1)
    loaded = sm.load(tmp_path)
    assert (loaded.structure, loaded.shape) == (matrix.structure, matrix.shape)
    assert torch.equal(loaded.to_dense(), matrix.to_dense())


def test_tied_weights_of_version_1(tmp_path: Path) -> None:
    saved = model(True)
    tied = nn.ModuleDict({"one": saved, "other": saved[0]})
    sm.save(tied, tmp_path)
    rewritten(tmp_path, to_version_1)
    dense = model(False)
    loaded = sm.load(tmp_path, nn.ModuleDict({"one": dense, "other": dense[0]}))
    assert loaded["one"][0] is loaded["other"]
    assert torch.equal(loaded["other"].matrix.to_dense(), saved[0].matrix.to_dense())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=1), "unknown|missing|split"),
        (lambda h: h.pop("split"), "split"),
        (lambda h: h.update(version=99), "Update structmat"),
        (lambda h: h.update(version=0), "versions are integers"),
        (lambda h: h.update(version=True), "versions are integers"),
        (lambda h: h.update(version="1"), "versions are integers"),
    ],
)
def test_what_is_no_version_is_refused(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    sm.save(model(True), tmp_path)
    rewritten(tmp_path, change)
    fresh = model(False)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        sm.load(tmp_path, fresh)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
