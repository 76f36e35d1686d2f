"""What each candidate would do to the model: predictions of the loss, corrected by measurements of single layers."""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from structmat.compression.calibrate import Calibration
from structmat.compression.candidates import Candidate, LayerScreen, Screening, with_losses
from structmat.compression.effects import Effects
from structmat.compression.progress import Progress
from structmat.compression.running import Forward, Loss
from structmat.compression.scan import Site
from structmat.compression.workfolder import WorkFolder, digest
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
    effects = Effects(model, calibration, loader, forward, loss, sweeps=sweeps, seed=seed)
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
            found = effects.of(site, [candidate.structure for candidate in chosen])
            outcomes = [Measurement(c.structure, c.loss, effect) for c, effect in zip(chosen, found, strict=True)]
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
