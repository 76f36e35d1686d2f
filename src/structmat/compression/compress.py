"""The whole way: a trained model and a budget in, a smaller model, its plan and an honest report out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import nn

from structmat.compression.again import Round, choose_again
from structmat.compression.allocate import Allocation
from structmat.compression.asked import asked_of, check_given, goals_of
from structmat.compression.budget import Budget
from structmat.compression.build import Builder
from structmat.compression.calibrate import facts
from structmat.compression.candidates import Choice, Screening, kinds_of
from structmat.compression.choose import Chooser
from structmat.compression.decide import Decision, budget_facts, decide, frontier_of, plan_of, with_result
from structmat.compression.effects import Effects
from structmat.compression.evaluate import Evaluate, kept_quality, quality_of
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
from structmat.compression.goals import Goal, Goals
from structmat.compression.make import Maker
from structmat.compression.norms import check_weight
from structmat.compression.options import check_options
from structmat.compression.parts import Split
from structmat.compression.plan import Plan
from structmat.compression.report import Report, Totals, environment
from structmat.compression.report_html import write_html
from structmat.compression.running import Forward, Loss
from structmat.compression.scan import Site, adapter_of
from structmat.compression.score import Measurement, score
from structmat.compression.screen import screen
from structmat.compression.split import split_, split_apart, whole_again_
from structmat.compression.untouched import copied, left_as_it_was
from structmat.compression.watched import as_called, calibrated, called
from structmat.compression.workfolder import WorkFolder, digest, fingerprint
from structmat.projection.project import DEFAULT_SWEEPS
from structmat.structure import Structure

if TYPE_CHECKING:
    from structmat.compression.recover import Distill


Model = TypeVar("Model", bound=nn.Module)


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
    return compress_(copied(model), budget=budget, original=model, **options)


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
    split: Mapping[str, Split] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    temperature: float | None = None,
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

    If it fails or is interrupted, the model is left as it was. The steps, each callable alone: scan, calibrate, screen,
    score, allocate, contest, confirm, replace, recover, evaluate, report.

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
        split: glob pattern to the parts of the rows of the matching layers that may get structures and sizes of their
            own, beside what the whole could get: a number of equal parts, such as 3 for a fused projection of queries,
            keys and values; a list of the outputs of each; ``"gates"`` of a recurrent net; see :func:`parts_of`.
        forward: ``forward(model, batch)`` returns the output, if a batch is none of the usual.
        loss: ``loss(output, batch)`` returns a scalar; without it the effect on the output itself counts.
        temperature: that logits are divided by before their effect is measured; None for the least at which at least
            half of the calibration data count: above 1 for classifiers that are certain of what they were trained on,
            of which few would count otherwise. See :func:`structmat.compression.softening.temperature_for`.
        recover: how to train afterwards, from the original; None for not at all.
        evaluate: ``evaluate(model)`` returns the quality, a number or several by name. The model comes in evaluation
            mode.
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
        ModelError: there is nothing to compress, a pattern matches nothing, or the model can't be copied.
    """
    from structmat import __version__

    check_options(
        plan=plan,
        overrides=overrides,
        structures=structures,
        include=include,
        exclude=exclude,
        split=split,
        recover=recover,
        functions={"evaluate": evaluate, "forward": forward, "loss": loss},
        counts={"seed": seed, "sweeps": sweeps, "rounds": rounds},
        floor=floor,
        temperature=temperature,
        frontier=frontier,
        folder=folder,
    )
    goals = goals_of(budget, plan, overrides, split, evaluate, recover, frontier, rounds, calibration)
    check_given(model, original, calibration, overrides)
    work = WorkFolder(
        folder, remember=bool(frontier) or rounds > 0 or (goals is not None and goals.quality is not None)
    )
    clock = Clock()
    with left_as_it_was(model) as kept:
        with clock("scan"):
            asked = asked_of(model, goals, plan, overrides or {}, include, exclude, split)
            found, goals = asked.found, asked.goals
            base = digest(__version__, fingerprint(model), [dataclasses.astuple(s) for s in found.sites], seed)
        if original is None and (recover is not None or calibration is not None):
            original = copied(model)
        kept.twin = original
        before = _Before(stored_numbers(model), bytes_of(model))
        with clock("evaluate"):
            quality = {"before": kept_quality(evaluate, model, work, "before", base)} if evaluate else {}
        splits = whole_again_(model, split_(model), [site.name for site in found.sites])
        for site in found.sites:
            module = model.get_submodule(site.name)
            check_weight(site, adapter_of(module).matrices(module))
        with clock("calibrate"):
            seen, key = calibrated(
                model,
                found,
                calibration,
                forward=forward,
                loss=loss,
                temperature=temperature,
                seed=seed,
                work=work,
                base=base,
                progress=progress,
            )
            sites, skipped = called(found, seen)
        maker = Maker(
            original,
            calibration,
            forward,
            loss,
            seen,
            recover,
            sequential and calibration is not None,
            sweeps,
            seed,
            work,
            key,
            progress,
        )
        builder = Builder(model, splits, maker, evaluate)
        chooser = _chooser(
            model, sites, goals.unit, asked.fixed, structures, maker, floor, measure and plan is None, clock
        )
        chosen = decide(chooser, goals, builder, quality.get("before", {}), clock)
        screening, allocation, again = _again(chosen, builder, goals, rounds, clock)
        final = _plan(allocation, sites, goals, seed, folder)
        with clock("frontier"):
            points = () if plan is not None else frontier_of(chosen, builder, frontier)
        with clock("replace"):
            fitted = maker.fit_(model, final, splits)
        if evaluate and (not chosen.quality or recover is not None):
            own = digest(key, final.to_json(), maker.sequential, sweeps)
            with clock("evaluate"):
                quality["after"] = kept_quality(evaluate, model, work, "after", own)
        recovery = None
        if chosen.built is not None:  # exactly the model that was accepted, even if recovery is not repeatable
            model.load_state_dict(chosen.built.model.state_dict())
            recovery = chosen.built.recovery
        elif recover is not None and (goals.quality is None or final.changed):
            with clock("recover"):
                recovery = maker.recover_(model, builder.key(final))
            if recover.windows:
                allocation = as_they_are(allocation, model, sites, goals.unit, seen)
                final = _plan(allocation, sites, goals, seed, folder)
            if evaluate:
                with clock("evaluate"):
                    quality["recovered"] = quality_of(evaluate, model)
        if chosen.quality and (recover is None or chosen.built is not None):
            quality["after" if recover is None else "recovered"] = dict(chosen.quality)
        if plan is None:
            points = with_result(points, chosen, allocation, chosen.quality or quality.get("after"))
        with clock("time"):
            timer = Timer(sites, calibration, forward, seen)
            timings = timer.compare(original, model, final)
        report = Report(
            model=type(model).__name__,
            budget=budget_facts(goals, allocation, chosen.judge),
            parameters=Totals(
                sum(s.numbers for s in sites),
                sum(c.parameters for c in allocation.chosen.values()),
            ),
            model_parameters=Totals(before.numbers, stored_numbers(model)),
            model_bytes=Totals(before.bytes, bytes_of(model)),
            flops=total_flops(sites, allocation, seen),
            quality=quality,
            timings=timings,
            layers=tuple(
                layer_report(site, allocation, screening, chooser.measured, fitted.layers, asked.fixed, timer)
                for site in as_called(sites, seen)
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
            statistics=fitted.statistics,
        )
        if folder is not None:
            report.write(Path(folder) / "report.json")
            write_html(report, Path(folder) / "report.html")
            if points:
                write_plans(points, Path(folder) / "frontier")
        return Result(model, final, report, points)


# ---------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class _Before:
    """Sizes of the model before anything changed."""

    numbers: int
    bytes: int


def _chooser(
    model: nn.Module,
    sites: Sequence[Site],
    unit: Budget,
    fixed: Mapping[str, Structure],
    structures: Sequence[Choice] | None,
    maker: Maker,
    floor: float,
    measure: bool,
    clock: Clock,
) -> Chooser:
    """All that choices are made from: every layer screened, and single layers measured where there is data."""
    seen, seed, work, key, progress = maker.seen, maker.seed, maker.work, maker.key, maker.progress
    with clock("screen"):
        screening = screen(
            model,
            sites,
            unit,
            calibration=seen,
            structures=structures,
            overrides=fixed,
            seed=seed,
            folder=work,
            key=key,
            progress=progress,
        )
    measured: Mapping[str, tuple[Measurement, ...]] = {}
    effects: Effects | None = None
    if seen is not None and maker.loader is not None and measure:
        with clock("score"):
            _, measured = score(
                model,
                sites,
                screening,
                seen,
                maker.loader,
                forward=maker.forward,
                loss=maker.loss,
                seed=seed,
                folder=work,
                key=key,
                progress=progress,
            )
        effects = Effects(model, seen, maker.loader, maker.forward, maker.loss, sweeps=maker.sweeps, seed=seed)
    kinds = {site.name: kinds_of(structures, site) for site in sites}
    return Chooser(
        model,
        sites,
        screening,
        measured,
        unit,
        seen,
        kinds,
        fixed,
        floor,
        maker.sweeps,
        seed,
        work,
        key,
        progress,
        effects=effects,
    )


def _again(
    chosen: Decision, builder: Builder, goals: Goals, rounds: int, clock: Clock
) -> tuple[Screening, Allocation, tuple[Round, ...]]:
    """The choice, made again from what layers lose in the compressed model if that is asked for."""
    maker, sites, seed = builder.maker, chosen.chooser.sites, builder.maker.seed
    if not rounds or goals.quality is not None:
        return chosen.screening, chosen.allocation, ()
    original, loader = maker.original, maker.loader
    assert original is not None and loader is not None, "rounds= without data was refused"  # noqa: PT018
    with clock("again"), split_apart(original):
        return choose_again(
            chosen.chooser,
            chosen.limits,
            chosen.screening,
            chosen.allocation,
            lambda wanted: builder.model(plan_of(wanted.chosen, sites, goals, seed)),
            original,
            loader,
            rounds,
            forward=maker.forward,
            loss=maker.loss,
        )


def _plan(
    allocation: Allocation, sites: Sequence[Site], goals: Goals, seed: int, folder: str | os.PathLike[str] | None
) -> Plan:
    """What the allocation chose, written to the work folder if there is one."""
    plan = plan_of(allocation.chosen, sites, goals, seed)
    if folder is not None:
        plan.write(Path(folder) / "plan.json")
    return plan
