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

from structmat.compression import statistics
from structmat.compression.again import Round, choose_again
from structmat.compression.allocate import Allocation
from structmat.compression.budget import Parameters
from structmat.compression.build import Builder
from structmat.compression.calibrate import Calibration, calibrate, facts, from_tensors, to_tensors
from structmat.compression.candidates import Choice
from structmat.compression.choose import Chooser
from structmat.compression.decide import budget_facts, decide, frontier_of, plan_of, with_result
from structmat.compression.figures import (
    Clock,
    Timer,
    as_they_are,
    bytes_of,
    layer_report,
    stored_numbers,
    total_flops,
)
from structmat.compression.frontier import Point, write_plans
from structmat.compression.goals import Goal, Goals, read_goals
from structmat.compression.plan import Plan
from structmat.compression.replace import Replaced, replace_layers
from structmat.compression.report import Report, Totals, environment
from structmat.compression.report_html import write_html
from structmat.compression.running import Forward, Loss, check_loader
from structmat.compression.scan import Scan, Site, Skipped, adapter_of, is_meta, matching, scan
from structmat.compression.score import Measurement, score
from structmat.compression.screen import check_weight, screen
from structmat.compression.split import Splits, split_, split_apart, whole_again_
from structmat.compression.workfolder import WorkFolder, digest, fingerprint, form_and_start
from structmat.errors import BudgetError, DataError, ModelError, StructureError
from structmat.projection.project import DEFAULT_SWEEPS
from structmat.structure import Structure, count_stored, resolve
from structmat.structures.dense import Dense

if TYPE_CHECKING:
    from structmat.compression.recover import Distill

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Evaluate = Callable[[nn.Module], float | Mapping[str, float]]
"""A user's measure of quality: a number, or several by name."""


@dataclass(frozen=True)
class Result(Generic[Model]):
    """What :func:`compress` returns: the smaller model, the plan that made it, the report, and what other sizes the
    model could have, by rising cost."""

    model: Model
    plan: Plan
    report: Report
    frontier: tuple[Point, ...] = ()


def compress(model: Model, *, budget: Goal | None = None, **options: Any) -> Result[Model]:
    """:func:`compress_` on a copy: the model that is given is not modified."""
    return compress_(copy.deepcopy(model), budget=budget, original=model, **options)


def compress_(
    model: Model,
    *,
    budget: Goal | None = None,
    plan: Plan | None = None,
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
    frontier: Sequence[float] = (),
    rounds: int = 0,
    progress: bool = False,
) -> Result[Model]:
    """Compress a trained model in place, choosing a structure for each layer under one global budget.

    The steps, each callable alone: scan, calibrate, screen, score, allocate, contest, replace, recover, evaluate,
    report.

    Args:
        model: any module with ``nn.Linear`` layers, convolutions, recurrent nets or attention.
        budget: :class:`Parameters`, :class:`Flops` or :class:`Latency` of all compressible layers together;
            :class:`Memory`, the bytes of the saved model; or :class:`Quality`, for the smallest model that ``evaluate``
            accepts. A dict from glob patterns to budgets limits groups of layers, each by itself; layers of no group
            stay as they are. Several of all these in a list or tuple hold at once.
        plan: what every layer becomes, instead of a budget; layers that it does not name stay as they are. With the
            folder of the run that made it, nothing is fitted that was fitted there.
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
        frontier: shares of the dense cost, such as ``(0.2, 0.4)``, at which models are built (without recovery) and
            evaluated besides, for ``result.frontier``; the rest of that curve is predicted.
        rounds: how often the choice is made again from what each layer loses in the compressed model, while that brings
            the output nearer to the original's on the calibration data.
        progress: show progress on stderr.

    Raises:
        BudgetError: the budget can't be met; the message names the smallest feasible one.
        DataError: weights, activations or gradients are NaN or infinite, or there is no calibration data in the loader.
        ModelError: there is nothing to compress, or a pattern matches nothing.
    """
    goals = _goals(budget, plan, overrides, evaluate, recover, frontier, rounds, calibration)
    _check(model, calibration, overrides, floor)
    if original is model:
        raise ModelError("The original is the model that is compressed in place. Pass a copy of it, or nothing.")
    from structmat import __version__

    clock, follows = Clock(), plan is not None
    work = WorkFolder(
        folder, remember=bool(frontier) or rounds > 0 or (goals is not None and goals.quality is not None)
    )
    overrides = {"*": Dense(), **plan.layers} if plan is not None else overrides or {}
    with clock("scan"):
        asked = [pattern for pattern, s in overrides.items() if not isinstance(s, Dense)]
        if plan is not None:  # a wrong name is found out below, and called one of the plan
            present = dict(model.named_modules())
            asked = [name for name in asked if name in present]
        found = scan(model, include, exclude, [p for p in asked if _is_exact(p)])
        if plan is not None:
            _check_plan(plan, found)
        fixed = _fixed(found, overrides, model)
        if plan is not None:
            numbers = {s.name: max(s.copies * count_stored(fixed[s.name], s.shape), s.numbers) for s in found.sites}
            goals = read_goals(Parameters(sum(numbers.values())))
            measure = False
        assert goals is not None, "either a budget or a plan is given"
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
            goals.unit,
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
    chooser = Chooser(
        model,
        sites,
        screening,
        measured,
        goals.unit,
        seen,
        structures,
        fixed,
        floor,
        sweeps,
        seed,
        work,
        key,
        progress,
    )

    def fit(
        target: nn.Module, wanted: Plan, taken_apart: Splits
    ) -> tuple[tuple[Replaced, ...], Mapping[str, Any] | None]:
        """Put the structures of a plan into a model, and estimate batch statistics again."""
        done = replace_layers(
            target,
            wanted,
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
        whole_again_(target, taken_apart, wanted.changed)
        if original is None or calibration is None:
            return done, None
        own = digest(key, wanted.to_json()["layers"], sequential, sweeps)
        return done, _statistics(target, original, calibration, forward, work, own)

    builder = Builder(
        model,
        lambda copied, wanted: fit(copied, wanted, copy.deepcopy(splits)),
        None
        if recover is None
        else lambda copied, name: _recovered(
            copied,
            original if original is not None else model,
            calibration,
            recover,
            forward,
            loss,
            seed,
            None if folder is None else Path(folder) / f"recovery-{name}",
            progress,
        ),
        None if evaluate is None else lambda copied: _numbers(evaluate, copied),
        work,
        digest(key, sequential, sweeps, _name(evaluate), None if recover is None else dataclasses.asdict(recover)),
    )
    chosen = decide(chooser, goals, builder, quality.get("before", {}), clock)
    screening, allocation = chosen.screening, chosen.allocation
    again: tuple[Round, ...] = ()
    if rounds and goals.quality is None:
        assert original is not None and calibration is not None  # noqa: PT018
        with clock("again"), split_apart(original):
            screening, allocation, again = choose_again(
                chosen.chooser,
                chosen.limits,
                screening,
                allocation,
                lambda wanted: builder.model(plan_of(wanted.chosen, sites, goals, seed)),
                original,
                calibration,
                rounds,
                forward=forward,
                loss=loss,
            )
    plan = _plan(allocation, sites, goals, seed, folder)
    with clock("frontier"):
        points = () if follows else frontier_of(chosen, builder, frontier)
    parameters_before, bytes_before = stored_numbers(model), bytes_of(model)
    with clock("replace"):
        replaced, fresh = fit(model, plan, splits)
    built = chosen.built
    if evaluate and (not chosen.quality or recover is not None):
        with clock("evaluate"):
            quality["after"] = _quality(evaluate, model, work, "after", digest(key, plan.to_json(), sequential, sweeps))
    recovery = None
    if built is not None:  # exactly the model that was accepted, even if recovery is not repeatable
        model.load_state_dict(built.model.state_dict())
        recovery = built.recovery
    elif recover is not None and (goals.quality is None or plan.changed):
        assert original is not None
        with clock("recover"):
            where = None if folder is None else Path(folder) / _recovery_name(builder, plan, goals)
            recovery = _recovered(model, original, calibration, recover, forward, loss, seed, where, progress)
        if recover.windows:
            allocation = as_they_are(allocation, model, sites, goals.unit, seen)
            plan = _plan(allocation, sites, goals, seed, folder)
        if evaluate:
            with clock("evaluate"):
                quality["recovered"] = _numbers(evaluate, model)
    if chosen.quality and (recover is None or built is not None):
        quality["after" if recover is None else "recovered"] = dict(chosen.quality)
    own = chosen.quality or quality.get("after")
    points = () if follows else with_result(points, chosen, allocation, own)
    with clock("time"):
        timer = Timer(sites, calibration, forward, seen)
        timings = timer.compare(original, model, plan)
    report = Report(
        model=type(model).__name__,
        budget=budget_facts(goals, allocation, chosen.judge),
        parameters=Totals(
            sum(s.numbers for s in sites),
            sum(c.parameters for c in allocation.chosen.values()),
        ),
        model_parameters=Totals(parameters_before, stored_numbers(model)),
        model_bytes=Totals(bytes_before, bytes_of(model)),
        flops=total_flops(sites, allocation, seen),
        quality=quality,
        timings=timings,
        layers=tuple(
            layer_report(site, allocation, screening, measured, replaced, fixed, timer)
            for site in _as_called(sites, seen)
        ),
        skipped=tuple(dataclasses.asdict(s) for s in skipped),
        predicted_loss=allocation.loss,
        loss_bound=allocation.bound,
        exact=allocation.exact,
        calibration=None if seen is None else facts(seen),
        recovery=recovery,
        seconds=clock.seconds,
        environment=environment(),
        seed=seed,
        frontier=tuple(point.to_json() for point in points),
        tried=tuple(tried.to_json() for tried in chosen.tried),
        again=tuple(dataclasses.asdict(r) for r in again),
        statistics=fresh,
    )
    if folder is not None:
        report.write(Path(folder) / "report.json")
        write_html(report, Path(folder) / "report.html")
        if points:
            write_plans(points, Path(folder) / "frontier")
    return Result(model, plan, report, points)


# ---------------------------------------------------------------------------------------------------------- steps


def _plan(
    allocation: Allocation, sites: Sequence[Site], goals: Goals, seed: int, folder: str | os.PathLike[str] | None
) -> Plan:
    """What the allocation chose, written to the work folder if there is one."""
    plan = plan_of(allocation.chosen, sites, goals, seed)
    if folder is not None:
        plan.write(Path(folder) / "plan.json")
    return plan


def _as_called(sites: Sequence[Site], seen: Calibration | None) -> list[Site]:
    """The sites in the order of their first calls."""
    order = {} if seen is None else {name: number for number, name in enumerate(seen.moments)}
    return sorted(sites, key=lambda site: order.get(site.name, len(order)))


def _recovery_name(builder: Builder, plan: Plan, goals: Goals) -> str:
    """The folder of the recovery's checkpoints."""
    return "recovery" if goals.quality is None else f"recovery-{builder.key(plan)[:12]}"


def _goals(
    budget: Goal | None,
    plan: Plan | None,
    overrides: Mapping[str, Structure] | None,
    evaluate: Evaluate | None,
    recover: Distill | None,
    frontier: Sequence[float],
    rounds: int,
    calibration: Iterable[Any] | None,
) -> Goals | None:
    """What is asked for, checked; None where a plan says it."""
    if (budget is None) == (plan is None):
        raise BudgetError("A model is compressed under a budget or by a plan. Give budget= or plan=, and not both.")
    if plan is not None and overrides:
        raise BudgetError("A plan says what every layer becomes; leave out overrides, or edit the plan.")
    for share in frontier:
        given: object = share
        if not isinstance(given, float) or not 0 < share <= 1:
            raise BudgetError(f"frontier={tuple(frontier)!r}: each is a share above 0 and up to 1, as a float.")
    if frontier and evaluate is None:
        raise BudgetError("The models of frontier= are measured by evaluate=, which is missing.")
    if rounds < 0:
        raise BudgetError(f"rounds={rounds!r} is a number of repetitions, 0 or more.")
    if rounds and calibration is None:
        raise DataError("rounds= measures layers in the compressed model, on calibration data. Pass calibration=....")
    goals = None if budget is None else read_goals(budget)
    if goals is not None and goals.quality is not None:
        if evaluate is None:
            raise BudgetError("Quality is what evaluate= measures, which is missing. Pass evaluate=....")
        if recover is not None and recover.windows:
            raise BudgetError(
                "Quality and Distill(windows=True) can't be had together: the size would move. Choose one."
            )
    return goals


def _check_plan(plan: Plan, found: Scan) -> None:
    """Raise :class:`~structmat.errors.ModelError` if a layer of a plan is missing or has another shape."""
    shapes = {site.name: site.shape for site in found.sites}
    for name, shape in plan.shapes.items():
        if name not in shapes:
            raise ModelError(f"The plan names the layer {name}, which is none that can be compressed in this model.")
        if shapes[name] != shape:
            raise ModelError(f"The plan's layer {name} has the shape {shape}; the model's has {shapes[name]}.")


def _check(
    model: nn.Module,
    calibration: Iterable[Any] | None,
    overrides: Mapping[str, Structure] | None,
    floor: float,
) -> None:
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
    piece = f"statistics/{key[:12]}"
    kept = work.load(piece, key)
    if kept is not None:
        statistics.write_(model, kept[1])
        return kept[0]
    found = statistics.reestimate(model, original, loader, forward=forward)
    if found is None:
        return None
    work.store(piece, key, dataclasses.asdict(found), statistics.tensors_of(model))
    return dataclasses.asdict(found)


def _recovered(
    model: nn.Module,
    original: nn.Module,
    data: Iterable[Any] | None,
    settings: Distill,
    forward: Forward | None,
    loss: Loss | None,
    seed: int,
    where: Path | None,
    progress: bool,
) -> dict[str, Any]:
    from structmat.compression.recover import recover

    if data is None and settings.data is None:
        raise DataError("Recovery needs data. Pass calibration=..., or Distill(data=...).")
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
