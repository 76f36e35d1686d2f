"""The whole way: a trained model and a budget in, a smaller model, its plan and an honest report out."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from structmat.compression import budget as budgets
from structmat.compression import statistics
from structmat.compression.allocate import Allocation, allocate
from structmat.compression.budget import Budget
from structmat.compression.calibrate import Calibration, calibrate, facts, from_tensors, to_tensors
from structmat.compression.candidates import Choice
from structmat.compression.contest import contest
from structmat.compression.figures import (
    Clock,
    Timer,
    as_they_are,
    bytes_of,
    layer_report,
    stored_numbers,
    total_flops,
)
from structmat.compression.fill import fill
from structmat.compression.plan import Plan
from structmat.compression.replace import replace_layers
from structmat.compression.report import Report, Totals, environment
from structmat.compression.report_html import write_html
from structmat.compression.running import Forward, Loss, check_loader
from structmat.compression.scan import Scan, Site, Skipped, adapter_of, is_meta, matching, scan
from structmat.compression.score import Measurement, corrected, score
from structmat.compression.screen import check_weight, screen
from structmat.compression.split import split_, whole_again_
from structmat.compression.workfolder import WorkFolder, digest, fingerprint, form_and_start
from structmat.errors import BudgetError, DataError, ModelError, StructureError
from structmat.projection.project import DEFAULT_SWEEPS
from structmat.structure import Structure, resolve
from structmat.structures.dense import Dense

if TYPE_CHECKING:
    from structmat.compression.recover import Distill

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Evaluate = Callable[[nn.Module], float | Mapping[str, float]]
"""A user's measure of quality: a number, or several by name."""


@dataclass(frozen=True)
class Result(Generic[Model]):
    """What :func:`compress` returns: the smaller model, the plan that made it, and the report."""

    model: Model
    plan: Plan
    report: Report


def compress(model: Model, *, budget: Budget, **options: Any) -> Result[Model]:
    """:func:`compress_` on a copy: the model that is given is not modified."""
    return compress_(copy.deepcopy(model), budget=budget, original=model, **options)


def compress_(
    model: Model,
    *,
    budget: Budget,
    original: nn.Module | None = None,
    calibration: Iterable[Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Structure] | None = None,
    structures: Sequence[Choice] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    recover: Distill | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    floor: float = 0.0,
    measure: bool = True,
    sequential: bool = True,
    sweeps: int = DEFAULT_SWEEPS,
    progress: bool = False,
) -> Result[Model]:
    """Compress a trained model in place, choosing a structure for each layer under one global budget.

    The steps, each callable alone: scan, calibrate, screen, score, allocate, contest, replace, recover, evaluate,
    report.

    Args:
        model: any module with ``nn.Linear`` layers, convolutions, recurrent nets or attention.
        budget: :class:`Parameters`, :class:`Flops` or :class:`Latency` of all compressible layers together.
        original: the same model as another object, which is not modified, if there is one at hand. Otherwise a copy is
            made where one is needed: with calibration data or recovery.
        calibration: batches of data that can be read again and again: tensors, tuples ``(inputs, labels)`` or dicts.
            Without it only the weights count, and errors are those of the weights.
        include, exclude: glob patterns on names of layers; an exact name in ``include`` also asks for a layer that
            would be kept, see :func:`scan`.
        overrides: glob pattern to the structure that the matching layers get; later patterns win. Their cost is part of
            the budget. ``Dense()`` keeps layers.
        structures: families (names or classes) and single structures to choose from; None for all.
        forward: ``forward(model, batch)`` returns the output, if a batch is none of the usual.
        loss: ``loss(output, batch)`` returns a scalar; without it the effect on the output itself counts.
        recover: how to train afterwards, from the original; None for not at all.
        evaluate: ``evaluate(model)`` returns the quality, a number or several by name.
        seed: of every random choice.
        folder: where finished work is kept. If the work is interrupted, the same call goes on from there, with the same
            result. Also gets ``plan.json``, ``report.json`` and ``report.html``.
        floor: no layer goes below this share of its dense cost.
        measure: measure the effect of single layers, to correct the predictions (needs calibration data).
        sequential: fit each layer behind the compressed layers before it, so that it makes up for what they lost (needs
            calibration data).
        sweeps: that the final fits may spend.
        progress: show progress on stderr.

    Raises:
        BudgetError: the budget can't be met; the message names the smallest feasible one.
        DataError: weights, activations or gradients are NaN or infinite, or there is no calibration data in the loader.
        ModelError: there is nothing to compress, or a pattern matches nothing.
    """
    _check(model, budget, calibration, overrides, floor)
    if original is model:
        raise ModelError("The original is the model that is compressed in place. Pass a copy of it, or nothing.")
    from structmat import __version__

    clock = Clock()
    work = WorkFolder(folder)
    overrides = overrides or {}
    with clock("scan"):
        asked = [pattern for pattern, s in overrides.items() if not isinstance(s, Dense)]
        found = scan(model, include, exclude, [p for p in asked if _is_exact(p)])
        fixed = _fixed(found, overrides, model)
        base = digest(__version__, fingerprint(model), [dataclasses.astuple(s) for s in found.sites], seed)
    sequential = sequential and calibration is not None
    if original is None and (recover is not None or calibration is not None):
        original = copy.deepcopy(model)
    with clock("evaluate"):
        quality = {"before": _quality(evaluate, model, work, "before", base)} if evaluate else {}
    splits = whole_again_(model, split_(model), [site.name for site in found.sites])
    for site in found.sites:
        module = model.get_submodule(site.name)
        check_weight(site, adapter_of(module).matrices(module))
    with clock("calibrate"):
        seen, key = _calibrated(model, found, calibration, forward, loss, seed, work, base, progress)
        sites, skipped = _called(found, seen)
    with clock("screen"):
        screening = screen(
            model,
            sites,
            budget,
            calibration=seen,
            structures=structures,
            overrides=fixed,
            seed=seed,
            folder=work,
            key=key,
            progress=progress,
        )
    measured: Mapping[str, tuple[Measurement, ...]] = {}
    if seen is not None and measure:
        assert calibration is not None
        with clock("score"):
            _, measured = score(
                model,
                sites,
                screening,
                seen,
                calibration,
                forward=forward,
                loss=loss,
                seed=seed,
                folder=work,
                key=key,
                progress=progress,
            )
    with clock("allocate"):
        allocation = allocate(corrected(screening, measured), budget, fixed=fixed, floor=floor)
    with clock("contest"):
        screening, outcomes = contest(
            model,
            sites,
            screening,
            allocation,
            budget,
            calibration=seen,
            fixed=fixed,
            sweeps=sweeps,
            seed=seed,
            folder=work,
            key=key,
            progress=progress,
        )
    with clock("allocate"):
        screening = corrected(screening, measured)
        allocation = allocate(screening, budget, fixed=fixed, floor=floor)
        screening, allocation = fill(
            model,
            sites,
            screening,
            allocation,
            budget,
            calibration=seen,
            measured=measured,
            outcomes=outcomes,
            structures=structures,
            fixed=fixed,
            floor=floor,
            seed=seed,
        )
        plan = _plan(allocation, sites, budget, seed, folder)
    parameters_before, bytes_before = stored_numbers(model), bytes_of(model)
    with clock("replace"):
        replaced = replace_layers(
            model,
            plan,
            calibration=seen,
            original=original if sequential else None,
            loader=calibration,
            forward=forward,
            sweeps=sweeps,
            seed=seed,
            folder=work,
            key=key,
            progress=progress,
        )
    whole_again_(model, splits, plan.changed)
    fresh = None
    if original is not None and calibration is not None:
        with clock("statistics"):
            fresh = _statistics(
                model, original, calibration, forward, work, digest(key, plan.to_json(), sequential, sweeps)
            )
    if evaluate:
        with clock("evaluate"):
            quality["after"] = _quality(evaluate, model, work, "after", digest(key, plan.to_json(), sequential, sweeps))
    recovery = None
    if recover is not None:
        assert original is not None
        with clock("recover"):
            recovery = _recovered(model, original, calibration, recover, forward, loss, seed, folder, progress)
        if recover.windows:
            allocation = as_they_are(allocation, model, sites, budget, seen)
            plan = _plan(allocation, sites, budget, seed, folder)
        if evaluate:
            with clock("evaluate"):
                quality["recovered"] = _numbers(evaluate, model)
    with clock("time"):
        timer = Timer(sites, calibration, forward, seen)
        timings = timer.compare(original, model, plan)
    report = Report(
        model=type(model).__name__,
        budget={
            **budgets.to_json(budget),
            "unit": budget.unit,
            "limit": allocation.limit,
            "spent": allocation.cost,
            "dense": allocation.dense_cost,
        },
        parameters=Totals(
            sum(s.numbers for s in sites),
            sum(c.parameters for c in allocation.chosen.values()),
        ),
        model_parameters=Totals(parameters_before, stored_numbers(model)),
        model_bytes=Totals(bytes_before, bytes_of(model)),
        flops=total_flops(sites, allocation, seen),
        quality=quality,
        timings=timings,
        layers=tuple(layer_report(site, allocation, screening, measured, replaced, fixed, timer) for site in sites),
        skipped=tuple(dataclasses.asdict(s) for s in skipped),
        predicted_loss=allocation.loss,
        loss_bound=allocation.bound,
        exact=allocation.exact,
        calibration=None if seen is None else facts(seen),
        recovery=recovery,
        seconds=clock.seconds,
        environment=environment(),
        seed=seed,
        statistics=fresh,
    )
    if folder is not None:
        report.write(Path(folder) / "report.json")
        write_html(report, Path(folder) / "report.html")
    return Result(model, plan, report)


# ---------------------------------------------------------------------------------------------------------- steps


def _plan(
    allocation: Allocation, sites: Sequence[Site], budget: Budget, seed: int, folder: str | os.PathLike[str] | None
) -> Plan:
    """What the allocation chose, written to the work folder if there is one."""
    plan = Plan(
        {name: candidate.structure for name, candidate in allocation.chosen.items()},
        {site.name: site.shape for site in sites},
        budget,
        seed,
    )
    if folder is not None:
        plan.write(Path(folder) / "plan.json")
    return plan


def _check(
    model: nn.Module,
    budget: Budget,
    calibration: Iterable[Any] | None,
    overrides: Mapping[str, Structure] | None,
    floor: float,
) -> None:
    if not isinstance(budget, Budget):
        raise BudgetError(f"A budget is Parameters(0.4), Flops(0.4) or Latency(0.5); got {budget!r}.")
    if is_meta(model):
        raise ModelError("The model is on the meta device: its weights have no values. Load them first.")
    if calibration is not None:
        check_loader(calibration)
    for pattern, structure in (overrides or {}).items():
        if not isinstance(structure, Structure):
            raise StructureError(f"overrides[{pattern!r}] is a structure such as LowRank(rank=64); got {structure!r}.")
    if not 0.0 <= floor < 1.0:
        raise BudgetError(f"floor={floor!r} is a share of each layer's dense cost, at least 0 and below 1.")


def _is_exact(pattern: str) -> bool:
    return not any(c in pattern for c in "*?[")


def _fixed(found: Scan, overrides: Mapping[str, Structure], model: nn.Module) -> dict[str, Structure]:
    """The structures of overridden sites, resolved."""
    fixed: dict[str, Structure] = {}
    shapes = {site.name: site.shape for site in found.sites}
    for pattern, structure in overrides.items():
        names = matching(pattern, found.sites)
        if not names and not isinstance(structure, Dense):
            raise ModelError(
                f"The pattern {pattern!r} in overrides matches none of the {len(found.sites)} layers that are "
                f"compressed, such as {found.sites[0].name}. Name a kept layer exactly, without wildcards."
            )
        fixed |= {name: resolve(structure, shapes[name]) for name in names}
    return fixed


def _calibrated(
    model: nn.Module,
    found: Scan,
    loader: Iterable[Any] | None,
    forward: Forward | None,
    loss: Loss | None,
    seed: int,
    work: WorkFolder,
    base: str,
    progress: bool,
) -> tuple[Calibration | None, str]:
    """What calibration saw, now or when the folder was begun, and a digest of that and all before it."""
    if loader is None:
        return None, base
    key, start = digest(base, _name(forward), _name(loss)), ""
    if work.path is not None:
        form, start = form_and_start(loader)
        key = digest(key, form)
    kept = work.load("calibration", key)
    if kept is not None:
        if kept[0]["start"] != start:
            logger.warning(
                "The calibration data starts with another batch than that of the moments in %s, which are used. Data "
                "that is shuffled anew does so; for other data, use another folder.",
                work.path,
            )
        return from_tensors(kept[0]["seen"], kept[1]), digest(key, kept[0]["start"])
    seen = calibrate(model, found.sites, loader, forward=forward, loss=loss, seed=seed, progress=progress)
    numbers, tensors = to_tensors(seen)
    work.store("calibration", key, {"seen": numbers, "start": start}, tensors)
    return seen, digest(key, start)


def _name(function: Callable[..., Any] | None) -> str | None:
    """What tells a user's functions apart between processes."""
    return None if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))


def _called(found: Scan, seen: Calibration | None) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """The sites that take part: those that calibration saw."""
    if seen is None:
        return found.sites, found.skipped
    sites = tuple(site for site in found.sites if site.name in seen.moments)
    idle = tuple(
        Skipped(site.name, site.kind, site.shape, site.numbers, "never called on calibration data")
        for site in found.sites
        if site.name not in seen.moments
    )
    if not sites:
        raise ModelError(
            f"None of the {len(found.sites)} layers was called on the calibration data. "
            f"Pass forward=... that runs the part of the model which holds them."
        )
    return sites, found.skipped + idle


def _statistics(
    model: nn.Module, original: nn.Module, loader: Iterable[Any], forward: Forward | None, work: WorkFolder, key: str
) -> dict[str, Any] | None:
    """Statistics of batch normalisations, estimated again now or when the folder was begun."""
    kept = work.load("statistics", key)
    if kept is not None:
        statistics.write_(model, kept[1])
        return kept[0]
    found = statistics.reestimate(model, original, loader, forward=forward)
    if found is None:
        return None
    work.store("statistics", key, dataclasses.asdict(found), statistics.tensors_of(model))
    return dataclasses.asdict(found)


def _recovered(
    model: nn.Module,
    original: nn.Module,
    data: Iterable[Any] | None,
    settings: Distill,
    forward: Forward | None,
    loss: Loss | None,
    seed: int,
    folder: str | os.PathLike[str] | None,
    progress: bool,
) -> dict[str, Any]:
    from structmat.compression.recover import recover

    if data is None and settings.data is None:
        raise DataError("Recovery needs data. Pass calibration=..., or Distill(data=...).")
    where = None if folder is None else Path(folder) / "recovery"
    outcome = recover(
        model, original, data or (), settings, forward=forward, loss=loss, seed=seed, folder=where, show=progress
    )
    return dataclasses.asdict(outcome)


def _quality(evaluate: Evaluate, model: nn.Module, work: WorkFolder, moment: str, key: str) -> dict[str, float]:
    """The quality, or what was kept of it: evaluations can take long."""
    key = digest(key, _name(evaluate))
    kept = work.load(f"quality-{moment}", key)
    if kept is not None:
        return dict(kept[0])
    found = _numbers(evaluate, model)
    work.store(f"quality-{moment}", key, found)
    return found


def _numbers(evaluate: Evaluate, model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        value = evaluate(model)
    named: Mapping[str, Any] = value if isinstance(value, Mapping) else {"quality": value}
    found = {}
    for name, number in named.items():
        try:
            found[str(name)] = float(number)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"evaluate(model) returns a number or a dict of numbers; {name} is {number!r}.") from None
    return found
