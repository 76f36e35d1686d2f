"""What each candidate would do to the model: predictions of the loss, corrected by measurements of single layers."""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.calibrate import Calibration
from structmat.compression.candidates import Candidate, LayerScreen, Screening, with_losses
from structmat.compression.norms import layer_targets
from structmat.compression.progress import Progress
from structmat.compression.running import (
    Forward,
    Loss,
    call,
    can_run,
    detached,
    device_of,
    evaluating,
    first_samples,
    outcome,
    own_loss,
    samples_in,
    to_device,
)
from structmat.compression.scan import Site, adapter_of
from structmat.compression.workfolder import WorkFolder, digest
from structmat.projection.project import project_target
from structmat.structure import Structure
from structmat.structure import to_json as structure_to_json
from structmat.structures import from_json as structure_from_json
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

SHARES = (0.2, 0.35, 0.5, 0.7)
"""Shares of a layer's dense cost at which the effect of replacing it alone is measured."""

SMALL_SHARES = (0.05, 0.1)
"""Shares that are measured too where the loss at those above is nothing beside that of the smallest candidate: what a
matrix does that reads few directions (an embedding of few characters) shows only below."""

FAINT = 1e-3
"""What is nothing, as a share of the loss of the smallest candidate."""

TERMS, FEWEST_SAMPLES, MOST_SAMPLES = 6144, 24, 512
"""Measurements read calibration data up to this many terms of the loss, within these numbers of samples."""

_NOISE = 1e-7
"""Measured effects below this share of the scale of the output are rounding."""


@dataclass(frozen=True)
class Measurement:
    """One layer alone replaced by one structure: the predicted and the measured rise of the loss a term."""

    structure: Structure
    predicted: float
    measured: float


def score(
    model: nn.Module,
    sites: Sequence[Site],
    screening: Screening,
    calibration: Calibration,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    shares: Sequence[float] = SHARES,
    sweeps: int = 1,
    seed: int = 0,
    folder: WorkFolder | None = None,
    key: str = "",
    progress: bool = False,
) -> tuple[Screening, Mapping[str, tuple[Measurement, ...]]]:
    """Correct the predicted losses of all candidates by measuring a few of each layer.

    The quadratic prediction is right for small changes and falls short of large ones, by a factor that differs from
    layer to layer. So each layer alone is replaced by its best candidates at a few costs, and the effect on the output
    is measured: for logits ``T^2`` times the divergence of the predicted distribution from the original's at the
    temperature ``T`` of the calibration, half the squared error for other outputs, or the rise of a loss that was
    given. Measured over predicted is interpolated in the logarithms, monotonically, and applied to all candidates of
    the layer. Cost: ``len(shares)`` passes over a part of the calibration data for each layer.

    Args:
        model: its weights are exchanged one at a time and restored.
        sites, screening, calibration: from the steps before.
        loader: the calibration data; its beginning is read once.
        forward, loss: as in :func:`structmat.compression.calibrate.calibrate`.
        shares: at which shares of the dense cost to measure.
        sweeps, seed: of the fits, which are repeated.
        folder, key: where finished layers are kept, and the digest of what all of them depend on.
        progress: show a progress bar on stderr.

    Returns:
        The screening with corrected losses, and what was measured.
    """
    folder = folder or WorkFolder(None)
    measured: dict[str, tuple[Measurement, ...]] = {}
    probe: Probe | None = None
    with Progress(progress) as bar:
        for number, site in enumerate(bar.track(sites, "score")):
            layer = screening[site.name]
            chosen = points(layer, shares)
            piece, own = (
                f"score/{number:04d}",
                digest(key, site.name, [(structure_to_json(c.structure), c.loss) for c in chosen], sweeps, seed),
            )
            kept = folder.load(piece, own)
            if kept is not None:
                measured[site.name] = tuple(
                    Measurement(structure_from_json(m["structure"]), m["predicted"], m["measured"])
                    for m in kept[0]["measurements"]
                )
                continue
            if probe is None:
                probe = Probe(model, loader, forward, loss, calibration.temperature)
            moments = calibration.moments.get(site.name)
            module = model.get_submodule(site.name)
            held = adapter_of(module).matrices(module)
            targets = layer_targets(site, held, moments, sweeps=sweeps, seed=seed)
            outcomes = []
            for candidate in chosen:
                made = [
                    project_target(target, candidate.structure, dtype=torch.float64, device=torch.device("cpu"))
                    for target in targets
                ]
                effect = probe.effect(module, torch.stack([found.matrix.to_dense() for found in made]))
                outcomes.append(Measurement(candidate.structure, candidate.loss, effect))
            measured[site.name] = tuple(outcomes)
            folder.store(
                piece,
                own,
                {
                    "measurements": [
                        {
                            "structure": structure_to_json(m.structure),
                            "predicted": m.predicted,
                            "measured": m.measured,
                        }
                        for m in outcomes
                    ]
                },
            )
    return corrected(screening, measured), measured


def corrected(screening: Screening, measured: Mapping[str, Sequence[Measurement]]) -> Screening:
    """The screening with the losses of each layer's candidates corrected by what was measured of it."""
    found = {}
    for name, layer in screening.items():
        curve = Correction([(m.predicted, m.measured) for m in measured.get(name, ())])
        found[name] = with_losses(layer, [curve(c.loss) for c in layer.candidates])
    return found


def points(layer: LayerScreen, shares: Sequence[float] = SHARES) -> list[Candidate]:
    """The candidates to measure: of those that nothing cheaper beats, the nearest to each share of the dense cost."""
    frontier: list[Candidate] = []
    for candidate in layer.candidates:  # by rising cost
        better = not frontier or candidate.loss < frontier[-1].loss
        if better and candidate.loss > 0 and not isinstance(candidate.structure, Dense):
            frontier.append(candidate)
    dense = layer.keep.cost
    chosen: list[Candidate] = []
    if frontier:
        at_smallest = min(frontier, key=lambda c: abs(c.cost - min(shares) * dense))
        if at_smallest.loss < FAINT * frontier[0].loss:
            shares = (*SMALL_SHARES, *shares)
    for share in shares if frontier else ():
        nearest = min(frontier, key=lambda c: abs(c.cost - share * dense))
        if nearest not in chosen:
            chosen.append(nearest)
    return chosen


class Correction:
    """A monotone map from predicted to measured losses through a few points, linear in the logarithms.

    Below the smallest point the factor between the two stays what it is there; beyond the largest the slope of the last
    piece goes on, at least 1 and at most 3. Without points it is the identity. ``c(0) == 0``; ``c`` never decreases.
    """

    def __init__(self, pairs: Sequence[tuple[float, float]]) -> None:
        known = sorted((p, m) for p, m in pairs if p > 0 and m > 0 and math.isfinite(m))
        self._x: list[float] = []
        self._y: list[float] = []
        for p, m in known:
            x, y = math.log(p), math.log(m)
            if self._x and x - self._x[-1] < 1e-3:
                self._y[-1] = max(self._y[-1], y)
                continue
            self._x.append(x)
            self._y.append(max(y, self._y[-1]) if self._y else y)

    def __call__(self, predicted: float) -> float:
        if predicted <= 0 or not self._x:
            return predicted
        x = math.log(predicted)
        if x <= self._x[0]:
            return math.exp(x + self._y[0] - self._x[0])
        if x >= self._x[-1]:
            slope = 1.0
            if len(self._x) > 1:
                slope = (self._y[-1] - self._y[-2]) / (self._x[-1] - self._x[-2])
            return math.exp(min(self._y[-1] + min(max(slope, 1.0), 3.0) * (x - self._x[-1]), 700.0))
        i = bisect.bisect_right(self._x, x)
        share = (x - self._x[i - 1]) / (self._x[i] - self._x[i - 1])
        return math.exp(self._y[i - 1] + share * (self._y[i] - self._y[i - 1]))


class Probe:
    """The outputs of a model on the beginning of its calibration data, to compare changed models with.

    Args:
        model: the original.
        loader: calibration data.
        forward, loss: as in :func:`structmat.compression.calibrate.calibrate`.
        temperature: at which distributions are compared.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        forward: Forward | None,
        loss: Loss | None,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.forward, self.loss, self.temperature = model, forward, loss, temperature
        self.batches: list[Any] = []
        self.references: list[Tensor] = []
        self.scale = 0.0
        for batch, reference in self._read(loader):
            self.batches.append(batch)
            self.references.append(reference)
            size = 1.0 if reference.dim() == 0 else float(reference.square().sum(-1).mean())
            self.scale = max(self.scale, abs(float(reference)) if reference.dim() == 0 else size)

    def _read(self, loader: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        samples = terms = 0
        device = device_of(self.model)
        for batch in loader:
            batch, most = to_device(batch, device), MOST_SAMPLES - samples
            if terms and samples_in(batch):
                each = terms / samples
                needed = max(FEWEST_SAMPLES - samples, math.ceil((TERMS - terms) / each))
                most = min(most, max(needed, 1))
            batch, reference = self._run_part(batch, most)
            count = reference.shape[0] if reference.dim() else samples_in(batch)
            if not samples and count > TERMS and samples_in(batch) > FEWEST_SAMPLES:
                keep = max(FEWEST_SAMPLES, math.ceil(TERMS * samples_in(batch) / count))
                batch, reference = self._run_part(batch, keep)
                count = reference.shape[0] if reference.dim() else samples_in(batch)
            samples, terms = samples + samples_in(batch), terms + count
            yield batch, reference
            if samples >= MOST_SAMPLES or (terms >= TERMS and samples >= FEWEST_SAMPLES):
                return

    def _run_part(self, batch: Any, most: int) -> tuple[Any, Tensor]:
        """The first samples of a batch and what the model says of them; of the whole if it takes no part of it."""
        part = first_samples(batch, most)
        if part is not batch and can_run(self.model, part, self.forward):
            batch = part
        return batch, self._run(batch)

    @torch.no_grad()
    def _run(self, batch: Any, model: nn.Module | None = None) -> Tensor:
        """Log-probabilities or values (terms, features); or the loss, if the user gave one."""
        model = self.model if model is None else model
        with evaluating(model):
            output = call(model, batch, self.forward)
        if self.loss is not None:
            return torch.tensor(detached(own_loss(output, batch, self.loss)), dtype=torch.float64)
        result = outcome(output, batch).softened(self.temperature)
        self.classes = result.classes
        values = result.values.float()
        return torch.log_softmax(values, -1) if result.classes else values

    @torch.no_grad()
    def effect(self, module: nn.Module, weights: Tensor) -> float:
        """The mean rise a term when a module's matrices are replaced by others (copies, out, in)."""
        adapter = adapter_of(module)
        original = adapter.matrices(module).clone()
        try:
            adapter.assign(module, weights)
            return self.distance(self.model)
        finally:
            adapter.assign(module, original)

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """The mean rise a term in another model, which is called in the same way."""
        total, terms = 0.0, 0
        for batch, reference in zip(self.batches, self.references, strict=True):
            changed = self._run(batch, model)
            if reference.dim() == 0:
                count = samples_in(batch)
                total += float(changed - reference) * count
            elif self.classes:
                count = reference.shape[0]
                total += float((reference.exp() * (reference - changed)).sum(dtype=torch.float64)) * self.temperature**2
            else:
                count = reference.shape[0]
                total += 0.5 * float((reference - changed).square().sum(dtype=torch.float64))
            terms += count
        effect = total / max(terms, 1)
        floor = _NOISE * (1.0 if self.loss is None and self.classes else self.scale)
        return max(effect, floor)
