"""Pictures of learned windows: well-formed, and they show the numbers."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import torch

from structmat.errors import StructureError
from structmat.learn.pictures import budget_per_layer, coverage, film_strip, quality_against_cost
from structmat.learn.windows import Snapshot
from structmat.projection.masks import boxcar

WINDOWS = torch.tensor([[0, 6, 0, 8], [5, 3, 6, 4], [2, 0, 1, 3]], dtype=torch.int32)
SHAPE = (6, 8)


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]


def test_coverage_counts_terms() -> None:
    w = WINDOWS.long()
    by_hand = boxcar(w[:, 1], w[:, 0], 6).double().T @ boxcar(w[:, 3], w[:, 2], 8).double()
    assert torch.equal(coverage(WINDOWS, SHAPE), by_hand)
    coarse = coverage(WINDOWS, SHAPE, 2)
    torch.testing.assert_close(coarse, by_hand.reshape(2, 3, 2, 4).mean((1, 3)))


def test_film_strip() -> None:
    history = [Snapshot(0, 21, {"a": WINDOWS}), Snapshot(10, 14, {"a": WINDOWS[:1]})]
    svg = film_strip(history, "a", SHAPE)
    assert texts(svg) == ["step 0", "2 terms, 44%", "step 10", "1 terms, 29%"]
    coarse = film_strip(history, "a", SHAPE, cells=2)
    assert coarse.count("<rect") < svg.count("<rect")
    with pytest.raises(StructureError, match="No snapshots of 'b'"):
        film_strip(history, "b", SHAPE)


def test_curves() -> None:
    pytest.importorskip("matplotlib")
    history = [Snapshot(0, 21, {"a": WINDOWS}), Snapshot(10, 14, {"a": WINDOWS[:1]})]
    (line,) = budget_per_layer(history, {"a": SHAPE}).get_lines()
    assert line.get_xydata().tolist() == [[0, 21 / 48], [10, 14 / 48]]
    points = {"low <rank>": [(0.5, 0.9), (0.2, 0.7)], "one": [(0.3, 0.8)], **{f"{i}": [(0.1, 0.1)] for i in range(20)}}
    axes = quality_against_cost(points, "accuracy")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(points)
    assert axes.get_lines()[0].get_xydata().tolist() == [[0.2, 0.7], [0.5, 0.9]]
    assert len({(line.get_color(), line.get_marker()) for line in axes.get_lines()}) == len(points)
    with pytest.raises(StructureError, match="nothing to draw"):
        quality_against_cost({}, "accuracy")
