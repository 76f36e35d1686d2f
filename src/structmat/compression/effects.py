"""What a changed model puts out, beside the original: of single layers that are replaced, and of whole models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.calibrate import Calibration
from structmat.compression.norms import layer_targets
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
from structmat.projection.project import project_target
from structmat.structure import Structure

TERMS, FEWEST_SAMPLES, MOST_SAMPLES = 6144, 24, 512
"""Measurements read calibration data up to this many terms of the loss, within these numbers of samples."""

_NOISE = 1e-7
"""Measured effects below this share of the scale of the output are rounding."""


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
        return max(total / max(terms, 1), self.noise)

    @property
    def noise(self) -> float:
        """What rounding alone can do; no distance is less."""
        return _NOISE * (1.0 if self.loss is None and self.classes else self.scale)


class Effects:
    """What replacing one layer alone does to the output.

    Args:
        model: its weights are exchanged one at a time and restored.
        calibration: whose moments the fits go by, and at whose temperature outputs are compared.
        loader: the calibration data; its beginning is read when first something is measured.
        forward, loss: as in :func:`structmat.compression.calibrate.calibrate`.
        sweeps, seed: of the fits.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        loader: Iterable[Any],
        forward: Forward | None,
        loss: Loss | None,
        *,
        sweeps: int,
        seed: int,
    ) -> None:
        self._model, self._calibration, self._loader = model, calibration, loader
        self._forward, self._loss, self._sweeps, self._seed = forward, loss, sweeps, seed

    @cached_property
    def _probe(self) -> Probe:
        temperature = self._calibration.temperature
        return Probe(self._model, self._loader, self._forward, self._loss, temperature)

    @property
    def noise(self) -> float:
        """What rounding alone can do; no effect is less."""
        return self._probe.noise

    def of(self, site: Site, structures: Sequence[Structure]) -> list[float]:
        """The mean rise a term for each of some structures in the place of a layer. Cost: a fit and a pass each."""
        module = self._model.get_submodule(site.name)
        held, moments = adapter_of(module).matrices(module), self._calibration.moments.get(site.name)
        targets = layer_targets(site, held, moments, sweeps=self._sweeps, seed=self._seed)
        found = []
        for structure in structures:
            made = [
                project_target(target, structure, dtype=torch.float64, device=torch.device("cpu")) for target in targets
            ]
            found.append(self._probe.effect(module, torch.stack([one.matrix.to_dense() for one in made])))
        return found
