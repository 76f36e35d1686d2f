"""The figures of a report: seconds of the steps, times of layers and models, stored numbers and bytes."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from structmat.compression import budget as budgets
from structmat.compression.allocate import Allocation
from structmat.compression.budget import Budget, Latency
from structmat.compression.calibrate import Calibration, load_of
from structmat.compression.candidates import Screening, candidate_to_json
from structmat.compression.layers import cost_of, layer_named, structured_layer_of
from structmat.compression.plan import Plan
from structmat.compression.replace import Replaced, frozen_layers
from structmat.compression.report import LayerReport, Timing, Totals
from structmat.compression.running import Forward, can_run, has_values, samples_in
from structmat.compression.scan import Site
from structmat.compression.score import Measurement
from structmat.compression.timing import ModelTiming, sized, time_models
from structmat.structure import ParameterSpec, Structure, count_stored, specs
from structmat.structure import to_json as structure_to_json
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

BATCHES = (1, 8, 32)
"""Numbers of samples at which the report states times."""

MODEL_SECONDS = 0.3
"""To spend on timing both models at each of them."""


class Clock:
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


class Timer:
    """Times of layers and of the whole model at several batch sizes."""

    def __init__(
        self, sites: Sequence[Site], loader: Iterable[Any] | None, forward: Forward | None, seen: Calibration | None
    ) -> None:
        self.sites = sites
        self.batch = next(iter(loader)) if loader is not None else None
        self.forward, self.seen = forward, seen

    def layer(self, structure: Structure, site: Site, batch: int) -> float:
        """Microseconds of one layer's structure for so many samples, each of as many rows as calibration saw."""
        return cost_of(Latency(0.5, batch), site, structure, load_of(site, self.seen))

    def compare(self, original: nn.Module | None, model: nn.Module, plan: Plan) -> tuple[Timing, ...]:
        """Layers alone at every batch size; both models in turns where there is data to run them on."""
        if self.batch is None or original is None:
            return (Timing(BATCHES[0], *self._layers(plan, BATCHES[0])),)
        found: list[ModelTiming] = []
        for size, batch in self._sized(original).items():
            with frozen_layers(model, self._rows(size)):
                found += time_models(original, model, {size: batch}, forward=self.forward, seconds=MODEL_SECONDS)
        return tuple(Timing(t.batch, *self._layers(plan, t.batch), t.before, t.after, t.ratio) for t in found)

    def _sized(self, original: nn.Module) -> dict[int, Any]:
        """The batch at every size, or as it is where the original does not take a part of it."""
        found = sized(self.batch, BATCHES)
        if all(can_run(original, batch, self.forward) for batch in found.values()):
            return found
        return {samples_in(self.batch): self.batch}

    def _rows(self, batch: int) -> int:
        """Of the input of a typical layer."""
        counts = [load_of(site, self.seen).rows for site in self.sites]
        return max(1, round(batch * statistics.median(counts))) if counts else batch

    def _layers(self, plan: Plan, batch: int) -> tuple[float, float]:
        dense = sum(self.layer(Dense(), site, batch) for site in self.sites)
        now = sum(self.layer(plan.layers[site.name], site, batch) for site in self.sites)
        return dense / 1e3, now / 1e3


def layer_report(
    site: Site,
    allocation: Allocation,
    screening: Screening,
    measured: Mapping[str, tuple[Measurement, ...]],
    replaced: Sequence[Replaced],
    fixed: Mapping[str, Structure],
    timer: Timer,
) -> LayerReport:
    """All that is said about one layer, from what each step found out about it."""
    layer, chosen = screening[site.name], allocation.chosen[site.name]
    final = next((r for r in replaced if r.name == site.name), None)
    dense = layer.keep
    now = timer.layer(chosen.structure, site, 1)
    then = timer.layer(Dense(), site, 1)
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


def as_they_are(
    allocation: Allocation, model: nn.Module, sites: Sequence[Site], budget: Budget, seen: Calibration | None
) -> Allocation:
    """The allocation with the structures that the layers have now: moving windows change them during recovery."""
    chosen = dict(allocation.chosen)
    for site in sites:
        module, before = model.get_submodule(site.name), chosen[site.name]
        adapter = structured_layer_of(module)
        structure = before.structure if adapter is None else adapter.content(module).structure
        if structure == before.structure:
            continue
        chosen[site.name] = dataclasses.replace(
            before,
            structure=structure,
            parameters=site.copies * count_stored(structure, site.shape),
            flops=site.copies * budgets.flops(structure, site.shape),
            cost=cost_of(budget, site, structure, load_of(site, seen)),
        )
    spent = tuple(
        dataclasses.replace(
            one,
            cost=one.cost
            + sum(one.limit.spend(n, c) - one.limit.spend(n, allocation.chosen[n]) for n, c in chosen.items()),
        )
        for one in allocation.spent
    )
    return dataclasses.replace(allocation, chosen=chosen, spent=spent)


def total_flops(sites: Sequence[Site], allocation: Allocation, seen: Calibration | None) -> Totals:
    """Operations of all sites for one sample, before and after."""

    def total(dense: bool) -> float:
        return sum(
            layer_named(site.kind).flops(
                site, Dense() if dense else allocation.chosen[site.name].structure, load_of(site, seen)
            )
            for site in sites
        )

    return Totals(total(True), total(False))


def stored_numbers(model: nn.Module) -> int:
    """Stored numbers of a whole model: parameters, and what says where those of structured layers lie."""
    size = sum(p.numel() for p in model.parameters() if has_values(p))
    return size + sum(copies * spec.stored for _, spec, copies in _fixed_tensors(model))


def bytes_of(model: nn.Module) -> int:
    """Of all tensors that are saved, each once."""
    kept = {
        (t.data_ptr(), t.shape, t.dtype): t
        for t in model.state_dict().values()
        if isinstance(t, Tensor) and has_values(t)
    }
    packed = {
        t.data_ptr(): copies * math.prod(spec.file_shape) for t, spec, copies in _fixed_tensors(model) if spec.is_packed
    }
    return sum(packed.get(t.data_ptr(), t.numel() * t.element_size()) for t in kept.values())


def _fixed_tensors(model: nn.Module) -> list[tuple[Tensor, ParameterSpec, int]]:
    """Supports and permutations of structured layers, each once."""
    found: dict[int, tuple[Tensor, ParameterSpec, int]] = {}
    for layer in {id(m): m for m in model.modules()}.values():
        adapter = structured_layer_of(layer)
        if adapter is None:
            continue
        held = adapter.content(layer)
        for name, spec in specs(held.structure, held.shape).items():
            if not spec.learned:
                tensor = getattr(layer, name)
                found[id(tensor)] = tensor, spec, held.copies
    return list(found.values())
