"""What a user gives wrongly is named, with what would be accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.errors import ModelError, StructmatError, StructureError


def structured() -> nn.Module:
    return nn.Sequential(sm.nn.StructuredLinear(8, 8, structure=sm.LowRank(2)))


MISTAKES: dict[str, tuple[Callable[[], Any], type[StructmatError], str]] = {
    "a model that is none": (
        lambda: sm.compress(3, budget=sm.Parameters(0.5)),  # type: ignore[type-var]
        ModelError,
        r"compress takes a torch\.nn\.Module; got int",
    ),
    "a batch for numbers of rows": (
        lambda: sm.tune(structured(), torch.zeros(4, 8)),  # type: ignore[arg-type]
        ModelError,
        r"such as \[1, 64\]; got a Tensor\. A batch .* example=",
    ),
    "one number of rows": (
        lambda: sm.tune(structured(), 64),  # type: ignore[arg-type]
        ModelError,
        r"such as \[1, 64\]; got a int",
    ),
    "a negative rate": (
        lambda: sm.parameter_groups(structured(), lr=-1e-3),
        ModelError,
        r"lr=-0\.001: it is at least 0",
    ),
    "a decay that is not finite": (
        lambda: sm.parameter_groups(structured(), lr=1e-3, weight_decay=float("inf")),
        ModelError,
        "weight_decay=inf: it is at least 0 and finite",
    ),
    "no steps": (lambda: sm.Distill(steps=0), StructureError, r"Distill\(steps=0\): steps is an integer of at least 1"),
    "a share above one": (
        lambda: sm.Distill(anneal=1.5),
        StructureError,
        r"Distill\(anneal=1\.5\): anneal is at least 0 and below 1",
    ),
    "rates by a word": (
        lambda: sm.Distill(rates="layer"),  # type: ignore[arg-type]
        StructureError,
        r"rates='layer'\): rates is one of Rates\.LAYER, Rates\.STAGE, Rates\.EQUAL",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_given_wrongly_is_named(mistake: str) -> None:
    act, error, words = MISTAKES[mistake]
    with pytest.raises(error, match=words):
        act()
