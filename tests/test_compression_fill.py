"""Sizes between and beyond those of the screening."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.compression import choose
from structmat.compression.fill import fill


@pytest.mark.parametrize("unit", [sm.Parameters(0.25), sm.Flops(0.3)])
def test_sizes_between_those_of_the_screening_lower_the_loss(
    unit: sm.Parameters | sm.Flops, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 30))
    seen = {}

    def watched(*given, **options):  # type: ignore[no-untyped-def]
        screening, allocation = fill(*given, **options)
        seen["from"], seen["before"], seen["screening"], seen["after"] = given[2], given[3], screening, allocation
        return screening, allocation

    monkeypatch.setattr(choose, "fill", watched)
    data = [torch.randn(64, 40) for _ in range(4)]
    result = sm.compress(model, budget=unit, calibration=data, structures=("Sparse",), progress=False)
    before, after = seen["before"], seen["after"]
    assert after.loss < 0.99 * before.loss
    assert after.cost <= unit.amount * sum(
        layer.candidates[-1].cost for layer in seen["screening"].values() if layer.candidates
    )
    tried = {name: {c.cost for c in layer.candidates} for name, layer in seen["from"].items()}
    assert any(c.cost not in tried[name] for name, c in after.chosen.items())
    for name, layer in seen["screening"].items():
        losses = [c.loss for c in layer.candidates if isinstance(c.structure, sm.Sparse)]
        # More entries, less loss: interpolated ones fit in.
        assert all(after <= 1.03 * before for before, after in itertools.pairwise(losses)), name
    assert {layer.name: layer.parameters for layer in result.report.layers} == {
        name: c.parameters for name, c in after.chosen.items()
    }
