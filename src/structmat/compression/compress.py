"""The whole way: a trained model and a budget in, a smaller model, its plan and an honest report out."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from structmat.compression import budget as budgets
from structmat.compression.allocate import Allocation, allocate
from structmat.compression.budget import Budget, Latency
from structmat.compression.calibrate import Calibration, calibrate, facts, from_tensors, to_tensors
from structmat.compression.contest import contest
from structmat.compression.fill import fill
from structmat.compression.plan import Plan
from structmat.compression.replace import Replaced, frozen_layers, replace_layers
from structmat.compression.report import LayerReport, Report, Timing, Totals, environment
from structmat.compression.report_html import write_html
from structmat.compression.running import Forward, Loss, check_loader
from structmat.compression.scan import Scan, Site, Skipped, dense_weight, is_meta, matching, scan
from structmat.compression.score import Measurement, corrected, score
from structmat.compression.screen import Choice, Screening, candidate_to_json, check_weight, screen
from structmat.compression.timing import ModelTiming, sized, time_models
from structmat.compression.workfolder import WorkFolder, digest, fingerprint
from structmat.errors import BudgetError, DataError, ModelError, StructureError
from structmat.nn.linear import StructuredLinear
from structmat.projection.project import DEFAULT_SWEEPS
from structmat.structure import ParameterSpec, Structure, resolve, specs
from structmat.structure import to_json as structure_to_json
from structmat.structures.dense import Dense

if TYPE_CHECKING:
    from structmat.compression.recover import Distill

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Evaluate = Callable[[nn.Module], float | Mapping[str, float]]
"""A user's measure of quality: a number, or several by name."""

BATCHES = (1, 8, 32)
"""Numbers of samples at which the report states times."""

MODEL_SECONDS = 0.3
"""To spend on timing both models at each of them."""


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
    """Compress a trained model in place, choosing a structure for each linear layer under one global budget.

    The steps, each callable alone: scan, calibrate, screen, score, allocate, contest, replace, recover, evaluate,
    report.

    Args:
        model: any module with ``nn.Linear`` layers (or transformers' ``Conv1D``).
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
    clock = _Clock()
    work = WorkFolder(folder)
    overrides = overrides or {}
    with clock("scan"):
        asked = [pattern for pattern, s in overrides.items() if not isinstance(s, Dense)]
        found = scan(model, include, exclude, [p for p in asked if _is_exact(p)])
        fixed = _fixed(found, overrides, model)
        for site in found.sites:
            check_weight(site, dense_weight(model.get_submodule(site.name)))
        base = digest(fingerprint(model), [dataclasses.astuple(s) for s in found.sites], seed)
    sequential = sequential and calibration is not None
    if original is None and (recover is not None or calibration is not None):
        original = copy.deepcopy(model)
    with clock("evaluate"):
        quality = {"before": _quality(evaluate, model, work, "before", base)} if evaluate else {}
    with clock("calibrate"):
        seen = _calibrated(model, found, calibration, forward, loss, seed, work, base, progress)
        sites, skipped = _called(found, seen)
        key = digest(base, seen is not None)
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
        plan = Plan(
            {name: candidate.structure for name, candidate in allocation.chosen.items()},
            {site.name: site.shape for site in sites},
            budget,
            seed,
        )
        if folder is not None:
            plan.write(Path(folder) / "plan.json")
    parameters_before, bytes_before = _stored(model), _bytes(model)
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
    if evaluate:
        with clock("evaluate"):
            quality["after"] = _quality(evaluate, model, work, "after", digest(key, plan.to_json(), sequential, sweeps))
    recovery = None
    if recover is not None:
        assert original is not None
        with clock("recover"):
            recovery = _recovered(model, original, calibration, recover, forward, loss, seed, folder, progress)
        if evaluate:
            with clock("evaluate"):
                quality["recovered"] = _numbers(evaluate, model)
    with clock("time"):
        timer = _Timer(calibration, forward, seen)
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
            sum(s.shape[0] * s.shape[1] for s in sites),
            sum(c.parameters for c in allocation.chosen.values()),
        ),
        model_parameters=Totals(parameters_before, _stored(model)),
        model_bytes=Totals(bytes_before, _bytes(model)),
        flops=_total_flops(sites, allocation, seen),
        quality=quality,
        timings=timings,
        layers=tuple(_layer_report(site, allocation, screening, measured, replaced, fixed, timer) for site in sites),
        skipped=tuple(dataclasses.asdict(s) for s in skipped),
        predicted_loss=allocation.loss,
        loss_bound=allocation.bound,
        exact=allocation.exact,
        calibration=None if seen is None else facts(seen),
        recovery=recovery,
        seconds=clock.seconds,
        environment=environment(),
        seed=seed,
    )
    if folder is not None:
        report.write(Path(folder) / "report.json")
        write_html(report, Path(folder) / "report.html")
    return Result(model, plan, report)


# ---------------------------------------------------------------------------------------------------------- steps


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
) -> Calibration | None:
    if loader is None:
        return None
    key = digest(base, forward is not None, loss is not None)
    kept = work.load("calibration", key)
    if kept is not None:
        return from_tensors(*kept)
    seen = calibrate(model, found.sites, loader, forward=forward, loss=loss, seed=seed, progress=progress)
    work.store("calibration", key, *to_tensors(seen))
    return seen


def _called(found: Scan, seen: Calibration | None) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """The sites that take part: those that calibration saw."""
    if seen is None:
        return found.sites, found.skipped
    sites = tuple(site for site in found.sites if site.name in seen.moments)
    idle = tuple(
        Skipped(site.name, site.kind, site.shape, site.shape[0] * site.shape[1], "never called on calibration data")
        for site in found.sites
        if site.name not in seen.moments
    )
    if not sites:
        raise ModelError(
            f"None of the {len(found.sites)} linear layers was called on the calibration data. "
            f"Pass forward=... that runs the part of the model which holds them."
        )
    return sites, found.skipped + idle


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
    key = digest(key, getattr(evaluate, "__qualname__", ""))
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


# --------------------------------------------------------------------------------------------------------- figures


class _Clock:
    """Seconds of each step; a step that comes twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
            logger.info("%s: %.1f s so far", step, self.seconds[step])


class _Timer:
    """Times of layers and of the whole model at several batch sizes."""

    def __init__(self, loader: Iterable[Any] | None, forward: Forward | None, seen: Calibration | None) -> None:
        self.batch = next(iter(loader)) if loader is not None else None
        self.forward, self.seen = forward, seen

    def layer(self, structure: Structure, site_name: str, shape: tuple[int, int], batch: int) -> float:
        rows = 1.0 if self.seen is None else self.seen.rows_per_sample(site_name)
        return Latency(0.5, batch).cost(structure, shape, rows)

    def compare(self, original: nn.Module | None, model: nn.Module, plan: Plan) -> tuple[Timing, ...]:
        """Layers alone at every batch size; both models in turns where there is data to run them on."""
        if self.batch is None or original is None:
            return (Timing(BATCHES[0], *self._layers(plan, BATCHES[0])),)
        found: list[ModelTiming] = []
        for size, batch in sized(self.batch, BATCHES).items():
            with frozen_layers(model, self._rows(plan, size)):
                found += time_models(original, model, {size: batch}, forward=self.forward, seconds=MODEL_SECONDS)
        return tuple(Timing(t.batch, *self._layers(plan, t.batch), t.before, t.after, t.ratio) for t in found)

    def _rows(self, plan: Plan, batch: int) -> int:
        """Of the input of a typical layer."""
        counts = [1.0 if self.seen is None else self.seen.rows_per_sample(name) for name in plan.shapes]
        return max(1, round(batch * statistics.median(counts))) if counts else batch

    def _layers(self, plan: Plan, batch: int) -> tuple[float, float]:
        dense = sum(self.layer(Dense(), n, s, batch) for n, s in plan.shapes.items())
        now = sum(self.layer(plan.layers[n], n, s, batch) for n, s in plan.shapes.items())
        return dense / 1e3, now / 1e3


def _layer_report(
    site: Site,
    allocation: Allocation,
    screening: Screening,
    measured: Mapping[str, tuple[Measurement, ...]],
    replaced: Sequence[Replaced],
    fixed: Mapping[str, Structure],
    timer: _Timer,
) -> LayerReport:
    layer, chosen = screening[site.name], allocation.chosen[site.name]
    final = next((r for r in replaced if r.name == site.name), None)
    dense = layer.keep
    now = timer.layer(chosen.structure, site.name, site.shape, 1)
    then = timer.layer(Dense(), site.name, site.shape, 1)
    return LayerReport(
        name=site.name,
        shape=site.shape,
        kind=site.kind,
        structure=str(chosen.structure),
        structure_json=structure_to_json(chosen.structure),
        reason="by override" if site.name in fixed else "chosen",
        parameters=chosen.parameters,
        dense_parameters=dense.parameters,
        flops=chosen.flops,
        dense_flops=dense.flops,
        error=final.error if final else 0.0,
        lower_bound=final.lower_bound if final else 0.0,
        certificate=final.certificate if final else "optimal",
        method=final.method if final else "kept",
        norm=final.norm if final else layer.norm,
        predicted_loss=chosen.loss,
        microseconds=now,
        dense_microseconds=then,
        slower=now > then,
        candidates=tuple(candidate_to_json(c) for c in layer.candidates),
        measured=tuple(
            {"structure": str(m.structure), "predicted": m.predicted, "measured": m.measured}
            for m in measured.get(site.name, ())
        ),
        refused=layer.refused,
    )


def _total_flops(sites: Sequence[Site], allocation: Allocation, seen: Calibration | None) -> Totals:
    def total(dense: bool) -> float:
        return sum(
            budgets.flops(Dense() if dense else allocation.chosen[s.name].structure, s.shape)
            * (1.0 if seen is None else seen.rows_per_sample(s.name))
            for s in sites
        )

    return Totals(total(True), total(False))


def _stored(model: nn.Module) -> int:
    """Stored numbers of a whole model: parameters, and what says where those of structured layers lie."""
    size = sum(p.numel() for p in model.parameters())
    return size + sum(spec.stored for _, spec in _fixed_tensors(model))


def _bytes(model: nn.Module) -> int:
    """Of all tensors that are saved, each once."""
    kept = {(t.data_ptr(), t.shape, t.dtype): t for t in model.state_dict().values() if isinstance(t, Tensor)}
    packed = {t.data_ptr(): math.prod(spec.file_shape) for t, spec in _fixed_tensors(model) if spec.is_packed}
    return sum(packed.get(t.data_ptr(), t.numel() * t.element_size()) for t in kept.values())


def _fixed_tensors(model: nn.Module) -> list[tuple[Tensor, ParameterSpec]]:
    """Supports and permutations of structured layers, each once."""
    layers = {id(m): m for m in model.modules() if isinstance(m, StructuredLinear)}
    return [
        (getattr(layer, name), spec)
        for layer in layers.values()
        for name, spec in specs(layer.structure, layer.matrix.shape).items()
        if not spec.learned
    ]
