"""What each layer could become: every family at several sizes, by cheap fits."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from structmat.compression.budget import Budget, Latency, flops, to_json
from structmat.compression.calibrate import Calibration, Moments
from structmat.compression.candidates import (
    Candidate,
    Choice,
    Kind,
    LayerScreen,
    Screening,
    Variant,
    expecting,
    family_name,
    kinds_of,
    layer_from_json,
    layer_to_json,
    variant_of,
)
from structmat.compression.layers import Load, cost_of, layer_named, splitters
from structmat.compression.norms import Assessor, layer_targets, norm_name
from structmat.compression.scan import Site, adapter_of, parent_and_child
from structmat.compression.stacks import Combination, combinations, scaled
from structmat.compression.workers import side_by_side
from structmat.compression.workfolder import WorkFolder, digest
from structmat.errors import ShapeError, StructureError
from structmat.matrix import StructuredMatrix
from structmat.projection.project import fit
from structmat.projection.target import Certificate, Target
from structmat.structure import Structure, count_stored, is_matrix, resolve
from structmat.structure import to_json as structure_to_json
from structmat.structures import families
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

SWEEPS = 1
"""Sweeps that a cheap fit may spend."""

COARSE = (0.2, 0.5)
"""Shares of the dense parameters at which every family is tried first."""

MEDIUM = (0.1, 0.3, 0.4, 0.7)
"""Shares at which the families that are any good are tried then."""

FINE = tuple(i / 24 for i in range(1, 24))
"""Shares for those of them whose fits are optimal."""

DOMINATED = 1.5
"""A family whose predicted loss at a coarse share, without sweeps, is this many times that of the best at its cost is
not improved there: unless what sweeps gained at a larger share brings it nearer. Sparse matrices gain a factor of six,
and are behind low rank at small shares without it."""

BEHIND = 1.02
"""A family that is this far behind the best even then is not tried near that share."""

SLACK = 1.05
"""Sizes lie on a grid: what costs this many times as much still counts as no dearer when families are compared."""


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

    Each family is first tried at the shares ``COARSE`` of the dense parameters, without sweeps; a family whose fits are
    optimal then at the shares ``FINE``. Of every other one the best fit at each coarse share is improved by ``sweeps``,
    if it is within reach of the best of all at its cost (or hoped to be, after what sweeps gained at a larger share),
    and the family is tried at the shares ``MEDIUM`` near those where it is then not behind: there the loss of a fit
    without sweeps is scaled by what the sweeps gained.
    Sums count as one family for each choice of their parts'. Fits of a layer share its decompositions. Candidates that
    are not cheaper than the dense layer in the budget's unit are refused and counted.

    Where the rows of a layer are split, each part is screened in the same way, and the best combinations of what the
    parts could be are candidates beside those of the whole.

    Args:
        model: read only.
        sites: the layers, from :func:`structmat.compression.scan.scan`.
        budget: only its unit matters here, not its amount.
        calibration: without it errors are those of the weights.
        structures: families or single structures to try; None for all usual families.
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
    unit = {k: v for k, v in to_json(budget).items() if k != "amount"}
    menu = [
        structure_to_json(c) if isinstance(c, Structure) else family_name(c) for c in structures or sorted(families())
    ]

    def work(item: tuple[int, Site]) -> LayerScreen:
        number, site = item
        fixed = (overrides or {}).get(site.name)
        whole = digest(key, site.name, unit, menu, sweeps, seed, None)
        own = digest(key, site.name, unit, menu, sweeps, seed, fixed and structure_to_json(fixed))
        # Pieces of several menus lie side by side: a plan, or another budget's unit, does not undo the others.
        piece = f"screen/{number:04d}-{own[:8]}"
        kept = folder.load(piece, own)
        if kept is not None:
            return layer_from_json(kept[0])
        kept = folder.load(f"screen/{number:04d}-{whole[:8]}", whole) if fixed is not None else None
        if kept is not None and (known := only(layer_from_json(kept[0]), fixed)) is not None:
            return known
        worker = layer_worker(model, site, budget, calibration, sweeps=sweeps, seed=seed)
        if fixed is not None:
            worker.run((fixed,), forced=True)
        else:
            worker.run(structures)
        found = worker.result()
        folder.store(piece, own, layer_to_json(found))
        return found

    for site in sites[:1]:
        kinds_of(structures, site)  # a wrong name is an error before the work begins
    alone = isinstance(budget, Latency)
    screens = side_by_side(work, list(enumerate(sites)), "screen", progress=progress, alone=alone)
    return {screen.name: screen for screen in screens}


def only(layer: LayerScreen, structure: Structure | None) -> LayerScreen | None:
    """The screen of a layer that becomes one structure, from a screen that tried it; None if it did not."""
    found = tuple(c for c in layer.candidates if c.structure in (structure, Dense()))
    return replace(layer, candidates=found, refused={}) if any(c.structure == structure for c in found) else None


def layer_worker(
    model: nn.Module, site: Site, budget: Budget, calibration: Calibration | None, *, sweeps: int, seed: int
) -> LayerWorker:
    """What fits candidates to one layer."""
    moments = calibration.moments.get(site.name) if calibration is not None else None
    module = model.get_submodule(site.name)
    weights = adapter_of(module).matrices(module)
    targets = layer_targets(site, weights, moments, sweeps=sweeps, seed=seed)
    load = calibration.load(site.name) if calibration is not None else Load()
    terms = load.rows * calibration.samples / calibration.terms if calibration is not None else 1.0
    return LayerWorker(site, targets, moments, terms, budget, load, weights.dtype, stays_linear(model, site))


def stays_linear(model: nn.Module, site: Site) -> str | None:
    """Why a layer can't become one that is not linear, or None."""
    if not layer_named(site.kind).nonlinear():
        return f"a {site.kind} stays linear"
    parent, _ = parent_and_child(model, site.name)
    if any(splitter.is_split(parent) for splitter in splitters()):
        return "a part of a recurrent net, of attention or of experts stays linear"
    return None


class LayerWorker:
    """The screening of one layer."""

    def __init__(
        self,
        site: Site,
        targets: Sequence[Target],
        moments: Moments | None,
        terms: float,
        budget: Budget,
        load: Load,
        dtype: torch.dtype,
        linear: str | None = None,
    ) -> None:
        self.site, self.targets, self.linear = site, targets, linear
        self.moments, self.terms, self.dtype = moments, terms, dtype
        self.quick_targets = [target.replace_sweeps(0) for target in targets]
        self.assessors = [
            Assessor(target, None if moments is None else moments.gradients(copy), terms, dtype)
            for copy, target in enumerate(targets)
        ]
        self.norm = math.hypot(*(assessor.norm for assessor in self.assessors))
        self.budget, self.load = budget, load
        self.dense_cost = cost_of(budget, site, Dense(), load)
        self.refused: Counter[str] = Counter()
        self.seen: set[Structure] = {Dense()}
        operations = site.copies * flops(Dense(), site.shape)
        self.found = [Candidate(Dense(), site.numbers, operations, 0.0, 0.0, "optimal", "kept", 0.0, self.dense_cost)]
        self.parts: tuple[LayerScreen, ...] = ()
        self.gains: dict[Variant, float] = {}  # what is left of the loss after sweeps, the best so far

    def run(self, structures: Sequence[Choice] | None, *, forced: bool = False) -> None:
        """Screen the layer.

        Args:
            structures: families or single structures to try; None for all usual families.
            forced: single structures are taken at any cost, and one that the layer can't become is an error.

        Raises:
            StructureError: a forced structure is none for the layer.
        """
        for structure in (s for s in structures or () if isinstance(s, Structure)):
            try:
                self.try_one(resolve(structure, self.site.shape), forced=forced, swept=True)
            except ShapeError as error:
                self.refused[f"refuses the shape: {type(structure).__name__}"] += 1
                logger.info("%s: %s", self.site.name, error)
        kinds = kinds_of(structures, self.site)
        coarse = {share: [c for kind in kinds for c in self.try_share(kind, share)] for share in COARSE}
        # Optimal fits are cheap: they come first, so that the others are held against all of them.
        for optimal in (True, False):
            shares = FINE if optimal else MEDIUM
            near = {share: self.contenders(share, coarse[share], optimal) for share in sorted(COARSE, reverse=True)}
            for share in shares:
                gains = near[_nearest(share)]
                for candidate in [c for kind in kinds for c in self.try_share(kind, share, gains)]:
                    if not optimal:
                        gain = gains[candidate.variant]
                        self.found[self.found.index(candidate)] = expecting(candidate, gain)
        if self.site.parts is not None and not forced:
            self.parts = tuple(self.screened(number, structures) for number in range(len(self.site.parts.rows)))
            for combination in combinations(self.parts):
                self.try_stack(combination)

    def screened(self, number: int, structures: Sequence[Choice] | None) -> LayerScreen:
        """What a part of the rows could be, with its losses as shares of the whole's."""
        parts = self.site.parts
        assert parts is not None, f"{self.site.name} is not split"
        shape = parts.shapes(self.site.shape[1])[number]
        index = parts.stacked([Dense()] * len(parts.rows)).places()[number]
        moments = self.moments
        if moments is not None and moments.gradient_moment is not None and moments.gradient_moment.dim():
            moments = replace(moments, gradient_moment=moments.gradient_moment[index[:, None], index])
        worker = LayerWorker(
            replace(self.site, name=f"{self.site.name}[{number}]", shape=shape, parts=None),
            [target.of_rows(index) for target in self.targets],
            moments,
            self.terms,
            self.budget,
            self.load,
            self.dtype,
            f"a part of a {self.site.kind} stays linear",
        )
        worker.run(structures)
        if any(assessor.weighs for assessor in worker.assessors):
            return worker.result()
        return scaled(worker.result(), (worker.norm / self.norm) ** 2 if self.norm > 0 else 0.0)

    def try_stack(self, combination: Combination) -> Candidate | None:
        """Try a candidate for each part; nothing twice, and not what keeps or changes nothing."""
        assert self.site.parts is not None, f"{self.site.name} is not split"
        parts = [candidate.structure for candidate in combination]
        if all(isinstance(part, Dense) for part in parts):
            return None
        swept = any(candidate.certificate != Certificate.OPTIMAL.value for candidate in combination)
        return self.try_one(resolve(self.site.parts.stacked(parts), self.site.shape), swept=swept)

    def contenders(self, share: float, tried: Sequence[Candidate], optimal: bool) -> dict[Variant, float]:
        """The variants with optimal fits, or those without, that are not behind the best at a coarse share, and the
        factor by which sweeps changed the loss of the best fit of each (if these could bring it there)."""
        nearest = {
            variant: min(candidates, key=self.ratio)
            for variant, candidates in _by_variant(tried).items()
            if optimal == all(c.certificate == Certificate.OPTIMAL.value for c in candidates)
        }
        # The most promising first: what is far behind it when it has been improved needs no sweeps.
        improved = {}
        for variant, before in sorted(nearest.items(), key=lambda pair: self.ratio(pair[1])):
            after, hoped = before, self.ratio(before) * self.gains.get(variant, 1.0)
            if not optimal and hoped <= DOMINATED:
                after = self.improve(before)
                if before.loss > 0:
                    self.gains[variant] = min(self.gains.get(variant, 1.0), after.loss / before.loss)
            improved[variant] = after
        found = {}
        for variant, after in improved.items():
            if self.ratio(after) > BEHIND:
                self.refused[f"behind the best at {share:.0%} of the parameters: {' + '.join(variant)}"] += 1
            else:
                found[variant] = after.loss / nearest[variant].loss if nearest[variant].loss > 0 else 1.0
        return found

    def ratio(self, candidate: Candidate) -> float:
        """A candidate's loss by the best of others at its cost, or hardly more. Optimal fits are held against optimal
        ones only: they are cheap, and what others will reach is not known yet."""
        optimal = candidate.certificate == Certificate.OPTIMAL.value
        best = min(
            c.loss
            for c in self.found
            if c.cost <= SLACK * candidate.cost and (not optimal or c.certificate == Certificate.OPTIMAL.value)
        )
        return candidate.loss / best if best > 0 else math.inf if candidate.loss > 0 else 1.0

    def try_share(self, kind: Kind, share: float, wanted: Container[Variant] | None = None) -> list[Candidate]:
        """Try what a family would do with a share of the dense parameters, without sweeps; nothing twice."""
        shape, found = self.site.shape, []
        for structure in kind.members(int(share * shape[0] * shape[1])):
            if wanted is not None and variant_of(structure, kind.form) not in wanted:
                continue
            try:
                candidate = self.try_one(resolve(structure, shape), form=kind.form)
            except (ShapeError, StructureError) as error:
                self.refused[f"refuses the shape: {kind.name}"] += 1
                logger.info("%s: %s", self.site.name, error)
                continue
            if candidate is not None:
                found.append(candidate)
        return found

    def improve(self, candidate: Candidate) -> Candidate:
        """Fit again, with sweeps, and keep what is better."""
        better = self.fitted(candidate, swept=True)
        if better.loss >= candidate.loss:
            return candidate
        self.found[self.found.index(candidate)] = better
        return better

    def try_one(
        self, structure: Structure, *, form: str = "", forced: bool = False, swept: bool = False
    ) -> Candidate | None:
        """Fit a resolved structure, with sweeps or without; None if it was tried before or is refused, see :meth:`run`.

        ``form`` is the name that the layer's adapter has for it, if it is one of its own.
        """
        if structure in self.seen:
            return None
        self.seen.add(structure)
        site = self.site
        if self.linear is not None and not is_matrix(structure):
            if forced:
                raise StructureError(f"{site.name} can't become {structure}: {self.linear}. Give it a family.")
            self.refused[f"{self.linear}: {type(structure).__name__}"] += 1
            return None
        declined = layer_named(site.kind).declines(site, structure)
        if declined is not None:
            if forced:
                raise StructureError(f"{structure} is none for {site.name}, a layer of kind {site.kind}: {declined}.")
            self.refused[declined] += 1
            return None
        cost = cost_of(self.budget, site, structure, self.load)
        if cost >= self.dense_cost and not forced:
            self.refused[f"not cheaper than the dense layer in {self.budget.unit}"] += 1
            return None
        numbers = site.copies * count_stored(structure, site.shape)
        operations = site.copies * flops(structure, site.shape)
        empty = Candidate(structure, numbers, operations, 0.0, 0.0, "none", "", 0.0, cost, form)
        candidate = self.fitted(empty, swept=swept)
        if not (math.isfinite(candidate.loss) and math.isfinite(candidate.error)):
            self.refused["the fit is not finite"] += 1
            return None
        self.found.append(candidate)
        return candidate

    def fitted(self, candidate: Candidate, *, swept: bool) -> Candidate:
        """A candidate with what a fit of its structure reaches, with sweeps or without."""
        structure, shape = candidate.structure, self.site.shape
        targets = self.targets if swept else self.quick_targets
        fits = [fit(structure, target) for target in targets]
        judged = [
            assessor(StructuredMatrix(structure, shape, found.tensors).to_dense())
            for assessor, found in zip(self.assessors, fits, strict=True)
        ]
        error = math.hypot(*(own * assessor.norm for (own, _), assessor in zip(judged, self.assessors, strict=True)))
        error = error / self.norm if self.norm > 0 else 0.0
        weighed = any(assessor.weighs for assessor in self.assessors)
        is_exact = all(loss == 0.0 for _, loss in judged)
        bound = math.hypot(*(found.lower_bound for found in fits))
        return replace(
            candidate,
            error=error,
            lower_bound=min(bound / self.norm, error) if self.norm > 0 else 0.0,
            certificate=weakest([found.certificate for found in fits]).value,
            method=fits[0].method,
            loss=sum(loss for _, loss in judged) if weighed else 0.0 if is_exact else error**2,
        )

    def result(self) -> LayerScreen:
        """What was found, by rising cost."""
        ordered = tuple(sorted(self.found, key=lambda c: (c.cost, c.loss)))
        norm = norm_name(self.targets[0])
        return LayerScreen(self.site.name, self.site.shape, norm, ordered, dict(+self.refused), self.parts)


def _by_variant(candidates: Sequence[Candidate]) -> dict[Variant, list[Candidate]]:
    found: dict[Variant, list[Candidate]] = {}
    for candidate in candidates:
        found.setdefault(candidate.variant, []).append(candidate)
    return found


def weakest(certificates: Sequence[Certificate]) -> Certificate:
    """What is known of several fits together."""
    return min(certificates, key=(Certificate.NONE, Certificate.BOUND, Certificate.OPTIMAL).index)


def _nearest(share: float) -> float:
    return min(COARSE, key=lambda coarse: abs(math.log(coarse / share)))
