"""Compression in steps: a little, recovery, then more of what was recovered, down to the last budget."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from structmat.compression.budget import Budget, Flops, Latency, Memory, Parameters
from structmat.compression.compress import Result, compress
from structmat.compression.distill import Distill, Recovery
from structmat.compression.evaluate import quality_of
from structmat.compression.recover import recover as recover_
from structmat.compression.replace import to_dense
from structmat.compression.workfolder import digest, fingerprint
from structmat.errors import BudgetError, DataError

if TYPE_CHECKING:
    from structmat.compression.evaluate import Evaluate

Model = TypeVar("Model", bound=nn.Module)


def compress_gradually(
    model: Model,
    budgets: Sequence[Budget],
    recover: Distill,
    *,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Result[Model]:
    """Compress to each budget in turn, every time the dense form of what the one before left after recovery.

    The matrices that the last structures are fitted to are then nearly of such structures. Every recovery imitates the
    model that was given, not the step before.

    Args:
        model: not modified.
        budgets: of all compressible layers, one after the other smaller, such as
            ``[Parameters(0.5), Parameters(0.25)]``.
        recover: how each step recovers; its ``steps`` and ``minutes`` are those of all steps together, in equal parts.
        evaluate: of the model that was given, and of the last one before and after its recovery.
        seed: of every random choice.
        folder: where finished work is kept; a call that was interrupted goes on from there.
        options: of :func:`structmat.compression.compress.compress`, among them ``calibration``.

    Returns:
        The last model, with the plan and the report of its step.

    Raises:
        BudgetError: there is no budget, or one that is no amount.
        DataError: neither ``calibration`` nor ``recover.data`` is given.
    """
    if not budgets:
        raise BudgetError("compress_gradually takes one budget for each step; got none.")
    for given in budgets:
        if not isinstance(given, Parameters | Flops | Latency | Memory):
            raise BudgetError(
                f"compress_gradually takes Parameters, Flops, Latency or Memory for each step, such as "
                f"Parameters(0.5); got {given!r}."
            )
    shares = [b.amount for b in budgets if not isinstance(b, Latency) and isinstance(b.amount, float)]
    if len(shares) == len(budgets) and any(a < b for a, b in itertools.pairwise(shares)):
        raise BudgetError(f"Budgets get smaller from step to step; got the shares {shares}. Sort them.")
    data = recover.data if recover.data is not None else options.get("calibration")
    if data is None:
        raise DataError("Recovery needs data. Pass calibration=..., or Distill(data=...).")
    settings = dataclasses.replace(
        recover,
        steps=None if recover.steps is None else max(1, recover.steps // len(budgets)),
        minutes=None if recover.minutes is None else recover.minutes / len(budgets),
    )

    def step(current: Model, number: int, judge: Evaluate | None) -> tuple[Result[Model], Recovery]:
        own = None if folder is None else Path(folder) / f"step-{number}"
        result = compress(current, budget=budgets[number], seed=seed, folder=own, evaluate=judge, **options)
        done = recover_(
            result.model,
            model,
            data,
            settings,
            forward=options.get("forward"),
            loss=options.get("loss"),
            seed=seed,
            folder=None if own is None else own / _recovery_name(result.model, model, settings),
            show=bool(options.get("progress", False)),
        )
        return result, done

    before = {} if evaluate is None else quality_of(evaluate, model)
    current = model
    for number in range(len(budgets) - 1):
        current = to_dense(step(current, number, None)[0].model)
    result, done = step(current, len(budgets) - 1, evaluate)
    report = dataclasses.replace(result.report, recovery=dataclasses.asdict(done))
    if evaluate is not None:
        quality = {"before": before, "after": report.quality["after"], "recovered": quality_of(evaluate, result.model)}
        report = dataclasses.replace(report, quality=quality)
    if folder is not None:
        report.write(Path(folder) / "report.json")
    return dataclasses.replace(result, report=report)


def _recovery_name(model: nn.Module, original: nn.Module, settings: Distill) -> str:
    """The folder of a step's checkpoints: what differs in any of these begins anew."""
    return f"recovery-{digest(fingerprint(model), fingerprint(original), settings.identity)[:12]}"
