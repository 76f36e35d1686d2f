"""What a user gives wrongly is named, with what would be accepted."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.errors import ModelError, StructmatError, StructureError


def structured() -> nn.Module:
    return nn.Sequential(sm.nn.StructuredLinear(8, 8, structure=sm.LowRank(2)))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8))


def normed() -> nn.Module:
    """With a weight that has been computed from others once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.Linear(8, 8), torch.nn.utils.weight_norm(nn.Linear(8, 8)))
    model(torch.zeros(1, 8))
    return model


def locked() -> nn.Module:
    model = dense()
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


MISTAKES: dict[str, tuple[Callable[[], Any], type[StructmatError], str]] = {
    **{
        f"{name}={value!r}": (
            lambda name=name, value=value: sm.compress(  # type: ignore[misc]
                nn.Sequential(nn.Linear(8, 8)), budget=sm.Parameters(0.5), **{name: value}
            ),
            StructmatError,
            message,
        )
        for name, value, message in (
            ("evaluate", 3, r"evaluate= is called as evaluate\(model\), which returns the quality; got 3"),
            ("forward", "x", r"forward= is called as forward\(model, batch\), .* got 'x'"),
            ("loss", 3, r"loss= is called as loss\(output, batch\), .* got 3"),
            ("seed", "a", r"seed='a' is an integer, 0 or more"),
            ("rounds", "2", r"rounds='2' is an integer, 0 or more"),
            ("sweeps", -1, r"sweeps=-1 is an integer, 0 or more"),
            ("sweeps", 1.5, r"sweeps=1\.5 is an integer, 0 or more"),
            ("floor", "x", r"floor='x' is a share of each layer's dense cost"),
            ("frontier", 0.3, r"frontier=0\.3 is a list of shares, such as \(0\.2, 0\.4\)"),
            ("folder", 3, r"folder=3 is a path"),
            ("include", "*", r"include='\*' is a list of glob patterns"),
            ("overrides", ["0"], r"overrides= is a dict from glob patterns .* got \['0'\]"),
            ("structures", "LowRank", r"structures= is a list of families, such as \['LowRank', 'Monarch'\]; got 'Low"),
            ("structures", ["Lowrank"], r"Unknown family 'Lowrank'\. Did you mean 'LowRank'\? Known are"),
            ("structures", ["Tuckers"], r"Unknown family 'Tuckers'"),
            ("plan", {}, r"plan= is a structmat\.Plan, such as Plan\.read\('plan\.json'\); got dict"),
        )
    },
    **{
        f"Distill({name}={value!r})": (
            lambda name=name, value=value: sm.Distill(**{name: value}),  # type: ignore[misc]
            StructureError,
            message,
        )
        for name, value, message in (
            ("minutes", "5", r"minutes='5'\): minutes is a number"),
            ("learning_rate", "1e-3", r"learning_rate='1e-3'\): learning_rate is a number"),
            ("temperature", True, r"temperature=True\): temperature is a number"),
            ("minutes", float("inf"), r"minutes is above 0 and finite, or None"),
            ("blocks", 3, r"blocks=3\) is a sequence of patterns, such as"),
            ("blocks", [1], r"blocks=\[1\]\) is a sequence of patterns, such as"),
        )
    },
    "a recovery that is none": (
        lambda: sm.compress(nn.Sequential(nn.Linear(8, 8)), budget=sm.Parameters(0.5), recover=300),
        ModelError,
        r"recover= is a structmat\.Distill, such as Distill\(steps=300\); got 300",
    ),
    "a group of layers that there are not": (
        lambda: sm.compress(nn.Sequential(nn.Linear(8, 8)), budget={"*attn*": sm.Parameters(0.5)}),
        ModelError,
        r"pattern '\*attn\*' of a budget matches none of the 1 layers",
    ),
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
    "weights that are computed": (
        lambda: sm.compress(normed(), budget=sm.Parameters(0.5)),
        ModelError,
        r"can't be copied: .*remove_weight_norm on .*parametrizations\.weight_norm",
    ),
    "an attribute that can't be copied": (
        lambda: sm.compress(locked(), budget=sm.Parameters(0.5)),
        ModelError,
        r"can't be copied: cannot pickle '_thread\.lock' object\. .* compress_ with original=",
    ),
    "the same in place": (
        lambda: sm.compress_(locked(), budget=sm.Parameters(0.5), calibration=[torch.zeros(4, 8)]),
        ModelError,
        r"can't be copied: cannot pickle '_thread\.lock' object",
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
