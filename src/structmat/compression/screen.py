"""What each layer could become: every family at several sizes, by cheap fits."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.budget import Budget, flops, to_json
from structmat.compression.calibrate import Calibration, Moments
from structmat.compression.progress import Progress
from structmat.compression.scan import Site, dense_weight
from structmat.compression.workfolder import WorkFolder, digest
from structmat.errors import DataError, FormatError, ShapeError, StructureError
from structmat.projection.project import make_target, project_target
from structmat.projection.target import Target
from structmat.structure import Shape, Structure, count_stored, resolve
from structmat.structure import to_json as structure_to_json
from structmat.structures import families
from structmat.structures import from_json as structure_from_json
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

Choice = str | type[Structure] | Structure
"""A family by name or class (tried at several sizes), or one structure with its sizes."""

SWEEPS = 1
"""Sweeps that a cheap fit may spend."""

COARSE = (0.15, 0.35, 0.6)
"""Shares of the dense parameters at which every family is tried first."""

FINE = tuple(i / 24 for i in range(1, 24))
"""Shares at which the families that are any good are tried then."""

DOMINATED = 2.0
"""A family whose predicted loss is, at every coarse size, this many times that of the best at its cost is given up."""

OUTPUT_DAMPING = 0.1
"""Share of the mean gradient energy that is added to every output: the quadratic model is not to be trusted where it
says that an output does not matter at all."""


@dataclass(frozen=True)
class Candidate:
    """One structure that a layer could have.

    Args:
        structure: resolved for the layer's shape; ``Dense()`` means that the layer is kept as it is.
        parameters: stored numbers: learned ones, and one for every index.
        flops: operations of one product with a vector.
        error: relative, in the norm that was used for the layer (see :attr:`LayerScreen.norm`).
        lower_bound: no member of the structure has a smaller relative error; 0 if nothing is known.
        certificate: ``"optimal"``, ``"bound"`` or ``"none"``.
        method: how it was fitted.
        loss: predicted rise of the model's loss; see :mod:`structmat.compression.score`.
        cost: in the unit of the budget.
    """

    structure: Structure
    parameters: int
    flops: int
    error: float
    lower_bound: float
    certificate: str
    method: str
    loss: float
    cost: float


@dataclass(frozen=True)
class LayerScreen:
    """All candidates of one layer, "keep" among them, by rising cost.

    Args:
        name: of the site.
        shape: ``(out_features, in_features)``.
        norm: in which errors are measured: ``"weights"``, ``"inputs"`` or ``"inputs and outputs"``.
        candidates: by rising cost.
        refused: how many were refused, by reason.
    """

    name: str
    shape: Shape
    norm: str
    candidates: tuple[Candidate, ...]
    refused: Mapping[str, int]

    @property
    def keep(self) -> Candidate:
        """The candidate that keeps the layer as it is."""
        return next(c for c in self.candidates if isinstance(c.structure, Dense))


Screening = Mapping[str, LayerScreen]


def screen(
    model: nn.Module,
    sites: Sequence[Site],
    budget: Budget,
    *,
    calibration: Calibration | None = None,
    structures: Sequence[Choice] | None = None,
    overrides: Mapping[str, Structure] | None = None,
    sweeps: int = SWEEPS,
    seed: int = 0,
    folder: WorkFolder | None = None,
    key: str = "",
    progress: bool = False,
) -> Screening:
    """Fit every family at several sizes to every layer, cheaply.

    Each family is first tried at the shares ``COARSE`` of the dense parameters; those that are far behind the best
    everywhere are given up, the others are tried at the shares ``FINE``. Fits of a layer share its decompositions.
    Candidates that are not cheaper than the dense layer in the budget's unit are refused and counted.

    Args:
        model: read only.
        sites: the layers, from :func:`structmat.compression.scan.scan`.
        budget: only its unit matters here, not its amount.
        calibration: without it errors are those of the weights.
        structures: families or single structures to try; None for all families.
        overrides: layers (by the sites' names) whose structure is fixed: "keep" and this are all their candidates.
        sweeps: of iterative fits.
        seed: of fits with random starts.
        folder, key: where finished layers are kept, and the digest of what all of them depend on.
        progress: show a progress bar on stderr.

    Returns:
        A screen of every site. Losses are the quadratic prediction.

    Raises:
        DataError: a weight is NaN or infinite.
    """
    folder = folder or WorkFolder(None)
    found: dict[str, LayerScreen] = {}
    unit = {k: v for k, v in to_json(budget).items() if k != "amount"}
    menu = [structure_to_json(c) if isinstance(c, Structure) else _name(c) for c in structures or sorted(families())]
    shared = _SharedRoots()
    with Progress(progress) as bar:
        for number, site in enumerate(bar.track(sites, "screen")):
            fixed = (overrides or {}).get(site.name)
            piece = f"screen/{number:04d}"
            own = digest(key, site.name, unit, menu, sweeps, seed, fixed and structure_to_json(fixed))
            kept = folder.load(piece, own)
            if kept is not None:
                found[site.name] = layer_from_json(kept[0])
                continue
            moments = calibration.moments.get(site.name) if calibration is not None else None
            target = shared.target(site, dense_weight(model.get_submodule(site.name)), moments, sweeps, seed)
            rows = calibration.rows_per_sample(site.name) if calibration is not None else 1.0
            terms = rows * calibration.samples / calibration.terms if calibration is not None else 1.0
            worker = _Layer(site, target, moments, terms, budget, rows)
            worker.run((fixed,) if fixed is not None else structures)
            found[site.name] = worker.result()
            folder.store(piece, own, layer_to_json(found[site.name]))
    return found


def layer_target(
    site: Site, weight: Tensor, moments: Moments | None, *, sweeps: int, seed: int, damping: float = OUTPUT_DAMPING
) -> Target:
    """What a layer's structure is fitted to: its weight, in the best norm that the moments allow.

    Raises:
        DataError: the weight is NaN or infinite; the message names the layer.
    """
    second = outputs = None
    if moments is not None:
        second = moments.second_moment
        if moments.gradient_moment is not None:
            energy = float(moments.gradient_moment.diagonal().mean())
            if energy > 0:
                outputs = moments.gradient_moment + damping * energy * torch.eye(site.shape[0], dtype=torch.float64)
    try:
        return make_target(weight, second, output_moment=outputs, sweeps=sweeps, seed=seed)
    except DataError as error:
        raise DataError(f"The weight of {site.name} can't be fitted. {error}") from error


def norm_name(target: Target) -> str:
    if target.second_moment is None:
        return "weights"
    return "inputs" if target.output_moment is None else "inputs and outputs"


def predicted_loss(difference: Tensor, target: Target, moments: Moments | None, terms: float) -> float:
    """The rise of the loss a term of it, to second order, if a layer's weight changes by ``difference``.

    ``1/2 tr(G D C D^T)`` with the second moments ``C`` of the inputs and ``G`` of the gradients of the summed loss in
    the outputs, times the layer's rows a term: the Kronecker-factored quadratic model (Martens and Grosse 2015).
    Without gradients the squared relative error, in the norm of the target.
    """
    if moments is None or target.output_moment is None or moments.gradient_moment is None:
        size = target.norm()
        return (target.error(target.weight - difference) / size) ** 2 if size > 0 else 0.0
    form = (moments.gradient_moment @ difference) * (difference @ moments.second_moment)
    return max(0.0, 0.5 * terms * float(form.sum()))


class _SharedRoots:
    """Targets of layers that read the same input share the decomposition of its second moment."""

    def __init__(self) -> None:
        self._last: Target | None = None
        self._moment: Tensor | None = None

    def target(self, site: Site, weight: Tensor, moments: Moments | None, sweeps: int, seed: int) -> Target:
        target = layer_target(site, weight, moments, sweeps=sweeps, seed=seed)
        if moments is None:
            return target
        if self._last is not None and self._moment is moments.second_moment:
            for name in ("_eigen", "root", "inverse_root"):
                if name in self._last.__dict__:
                    target.__dict__[name] = self._last.__dict__[name]
        self._last, self._moment = target, moments.second_moment
        return target


class _Layer:
    """The screening of one layer."""

    def __init__(
        self, site: Site, target: Target, moments: Moments | None, terms: float, budget: Budget, rows: float
    ) -> None:
        self.site, self.target, self.moments, self.terms = site, target, moments, terms
        self.budget, self.rows = budget, rows
        self.dense_cost = budget.cost(Dense(), site.shape, rows)
        self.refused: Counter[str] = Counter()
        self.seen: set[Structure] = {Dense()}
        size = site.shape[0] * site.shape[1]
        self.found = [
            Candidate(Dense(), size, flops(Dense(), site.shape), 0.0, 0.0, "optimal", "kept", 0.0, self.dense_cost)
        ]

    def run(self, structures: Sequence[Choice] | None) -> None:
        for structure in (s for s in structures or () if isinstance(s, Structure)):
            try:
                self.try_one(resolve(structure, self.site.shape), forced=True)
            except ShapeError as error:
                self.refused[f"refuses the shape: {type(structure).__name__}"] += 1
                logger.info("%s: %s", self.site.name, error)
        kinds = families_of(structures)
        coarse = {kind: [c for c in map(self.try_one, self.sizes(kind, COARSE)) if c] for kind in kinds}
        best = _Envelope([c for tried in coarse.values() for c in tried])
        for kind, tried in coarse.items():
            if tried and all(c.loss > DOMINATED * best(c.cost) for c in tried):
                self.refused[f"dominated at every coarse size: {kind.__name__}"] += 1
                continue
            for structure in self.sizes(kind, FINE):
                self.try_one(structure)

    def sizes(self, kind: type[Structure], shares: Iterable[float]) -> Iterator[Structure]:
        shape = self.site.shape
        size = shape[0] * shape[1]
        if kind is Dense:
            return
        for share in shares:
            for structure in kind.configurations(shape, int(share * size)):
                try:
                    yield resolve(structure, shape)
                except (ShapeError, StructureError) as error:
                    self.refused[f"refuses the shape: {kind.__name__}"] += 1
                    logger.info("%s: %s", self.site.name, error)
                    return

    def try_one(self, structure: Structure, *, forced: bool = False) -> Candidate | None:
        if structure in self.seen:
            return None
        self.seen.add(structure)
        shape = self.site.shape
        cost = self.budget.cost(structure, shape, self.rows)
        if cost >= self.dense_cost and not forced:
            self.refused[f"not cheaper than the dense layer in {self.budget.unit}"] += 1
            return None
        found = project_target(self.target, structure, dtype=torch.float64, device=torch.device("cpu"))
        difference = self.target.weight - found.matrix.to_dense()
        candidate = Candidate(
            structure=structure,
            parameters=count_stored(structure, shape),
            flops=found.matrix.flops,
            error=found.error,
            lower_bound=found.lower_bound,
            certificate=found.certificate.value,
            method=found.method,
            loss=predicted_loss(difference, self.target, self.moments, self.terms),
            cost=cost,
        )
        if not (math.isfinite(candidate.loss) and math.isfinite(candidate.error)):
            self.refused["the fit is not finite"] += 1
            return None
        self.found.append(candidate)
        return candidate

    def result(self) -> LayerScreen:
        ordered = tuple(sorted(self.found, key=lambda c: (c.cost, c.loss)))
        return LayerScreen(self.site.name, self.site.shape, norm_name(self.target), ordered, dict(self.refused))


class _Envelope:
    """The smallest loss that some candidate reaches at most at a cost."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = candidates

    def __call__(self, cost: float) -> float:
        return min((c.loss for c in self.candidates if c.cost <= cost), default=math.inf)


def families_of(structures: Sequence[Choice] | None) -> list[type[Structure]]:
    """The families that a choice names; all for None.

    Raises:
        StructureError: a name is no family.
    """
    known = families()
    if structures is None:
        return [known[name] for name in sorted(known)]
    found = []
    for choice in structures:
        if isinstance(choice, Structure):
            continue
        name = _name(choice)
        if name not in known:
            raise StructureError(f"Unknown family {name!r}. Known are {', '.join(sorted(known))}.")
        found.append(known[name])
    return found


def _name(choice: Choice) -> str:
    return choice if isinstance(choice, str) else choice.__name__ if isinstance(choice, type) else type(choice).__name__


# ---------------------------------------------------------------------------------------------------------- JSON


def candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    return {**candidate.__dict__, "structure": structure_to_json(candidate.structure)}


def layer_to_json(layer: LayerScreen) -> dict[str, Any]:
    """Plain values; :func:`layer_from_json` reads them."""
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "norm": layer.norm,
        "candidates": [candidate_to_json(c) for c in layer.candidates],
        "refused": dict(layer.refused),
    }


def layer_from_json(data: Mapping[str, Any]) -> LayerScreen:
    """Read what :func:`layer_to_json` wrote. Raises :class:`~structmat.errors.FormatError`."""
    try:
        candidates = tuple(
            Candidate(**{**c, "structure": structure_from_json(c["structure"])}) for c in data["candidates"]
        )
        shape = (int(data["shape"][0]), int(data["shape"][1]))
        return LayerScreen(data["name"], shape, data["norm"], candidates, dict(data["refused"]))
    except (KeyError, TypeError, IndexError) as error:
        raise FormatError(f"The screen of a layer is damaged: {error!r} is missing or wrong.") from error


def with_losses(layer: LayerScreen, losses: Sequence[float]) -> LayerScreen:
    """The same candidates with other losses, in the order of :attr:`LayerScreen.candidates`."""
    pairs = zip(layer.candidates, losses, strict=True)
    return replace(layer, candidates=tuple(replace(c, loss=loss) for c, loss in pairs))
