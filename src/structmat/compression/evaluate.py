"""A user's measure of quality: asked, checked, and kept on disk, since it can take long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from structmat.compression.running import evaluating
from structmat.compression.workfolder import WorkFolder, digest
from structmat.errors import DataError

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]
"""A user's measure of quality: a number, or several by name."""


def quality_of(evaluate: Evaluate, model: nn.Module) -> dict[str, float]:
    """What ``evaluate`` says of a model, which it gets in evaluation mode, by name.

    Raises:
        DataError: it says something that is no number.
    """
    with torch.no_grad(), evaluating(model, fast=True):
        value = evaluate(model)
    named: Mapping[str, Any] = value if isinstance(value, Mapping) else {"quality": value}
    found = {}
    for name, number in named.items():
        try:
            found[str(name)] = float(number)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"evaluate(model) returns a number or a dict of numbers; {name} is {number!r}.") from None
    return found


def kept_quality(evaluate: Evaluate, model: nn.Module, work: WorkFolder, moment: str, key: str) -> dict[str, float]:
    """The same, or what was kept of it.

    Args:
        evaluate, model: as of :func:`quality_of`.
        work: where it is kept.
        moment: such as ``"before"``.
        key: the digest of what it depends on beside the function's name.
    """
    key = digest(key, name_of(evaluate))
    kept = work.load(f"quality-{moment}", key)
    if kept is not None:
        return dict(kept[0])
    found = quality_of(evaluate, model)
    work.store(f"quality-{moment}", key, found)
    return found


def name_of(function: Callable[..., Any] | None) -> str | None:
    """What tells a user's functions apart between processes."""
    return None if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))
