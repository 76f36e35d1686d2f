"""Options of ``compress`` checked for their kinds, before any work begins."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from structmat.compression.candidates import check_choices
from structmat.compression.distill import Distill
from structmat.compression.plan import Plan
from structmat.errors import BudgetError, DataError, ModelError

_CALLED = {
    "evaluate": "evaluate(model), which returns the quality",
    "forward": "forward(model, batch), which returns the output",
    "loss": "loss(output, batch), which returns a scalar tensor",
}


def check_options(
    *,
    plan: Plan | None,
    overrides: Mapping[str, Any] | None,
    structures: Sequence[Any] | None,
    include: Sequence[str],
    exclude: Sequence[str],
    split: Mapping[str, Any] | None,
    recover: Distill | None,
    functions: Mapping[str, Any],
    counts: Mapping[str, Any],
    floor: float,
    temperature: float | None,
    frontier: Sequence[float],
    folder: str | os.PathLike[str] | None,
) -> None:
    """Raise unless every option is of a kind that :func:`structmat.compress_` takes.

    Args:
        functions: what is called, by the option's name; None where it is not given.
        counts: numbers of something, by the option's name.
        plan, overrides, structures, include, exclude, split, recover, floor, temperature, frontier, folder: as they are
            there.

    Raises:
        BudgetError: a number is none, or is out of its range.
        DataError: what should be called can't be.
        ModelError: something else is not what its name says.
        StructureError: ``structures`` holds what is no family.
    """
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise DataError(f"{name}= is called as {_CALLED[name]}; got {value!r}.")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
            raise BudgetError(f"{name}={value!r} is an integer, 0 or more.")
    if isinstance(floor, bool) or not isinstance(floor, Real) or not 0.0 <= floor < 1.0:
        raise BudgetError(f"floor={floor!r} is a share of each layer's dense cost, at least 0 and below 1.")
    soft: object = temperature
    if soft is not None and (isinstance(soft, bool) or not isinstance(soft, Real) or not 0 < float(soft) < math.inf):
        raise BudgetError(f"temperature={temperature!r} is a number above 0, or None for one that fits the data.")
    if isinstance(frontier, str) or not isinstance(frontier, Sequence):
        raise BudgetError(f"frontier={frontier!r} is a list of shares, such as (0.2, 0.4).")
    if plan is not None and not isinstance(plan, Plan):
        raise ModelError(f"plan= is a structmat.Plan, such as Plan.read('plan.json'); got {type(plan).__name__}.")
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ModelError(f"{name}={patterns!r} is a list of glob patterns, such as ('*attn*',).")
    for name, table in (("overrides", overrides), ("split", split)):
        if table is not None and not isinstance(table, Mapping):
            raise ModelError(f"{name}= is a dict from glob patterns to what matches gets; got {table!r}.")
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise ModelError(f"folder={folder!r} is a path.")
    if recover is not None and not isinstance(recover, Distill):
        raise ModelError(f"recover= is a structmat.Distill, such as Distill(steps=300); got {recover!r}.")
    check_choices(structures)
