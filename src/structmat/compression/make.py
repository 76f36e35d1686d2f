"""Making the model of a plan: fits, statistics of batch normalisations, and recovery."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from structmat.compression import statistics
from structmat.compression.calibrate import Calibration
from structmat.compression.plan import Plan
from structmat.compression.replace import Replaced, replace_layers
from structmat.compression.running import Forward, Loss
from structmat.compression.split import Splits, whole_again_
from structmat.compression.workfolder import WorkFolder, digest
from structmat.errors import DataError

if TYPE_CHECKING:
    from structmat.compression.recover import Distill


@dataclass(frozen=True)
class Fitted:
    """What was done to a model: the final fit of each layer that was replaced, and what estimating batch statistics
    again did (None where nothing was estimated)."""

    layers: tuple[Replaced, ...]
    statistics: Mapping[str, Any] | None


@dataclass(frozen=True)
class Maker:
    """Makes models of plans; all of a run that this depends on.

    Args:
        original: the model before compression, as another object; None where there is neither data nor recovery.
        loader, forward, loss: calibration data and how to run the model on them.
        seen: what calibration saw.
        recover: how to train; None for not at all.
        sequential: whether each layer is fitted behind the compressed layers before it.
        sweeps, seed: of the fits.
        work, key: where finished work is kept, and the digest of what all of it depends on.
        progress: show progress bars.
    """

    original: nn.Module | None
    loader: Iterable[Any] | None
    forward: Forward | None
    loss: Loss | None
    seen: Calibration | None
    recover: Distill | None
    sequential: bool
    sweeps: int
    seed: int
    work: WorkFolder
    key: str
    progress: bool

    def digest(self, *more: object) -> str:
        """What tells its models from those of other settings."""
        recover = None if self.recover is None else self.recover.identity
        return digest(self.key, self.sequential, self.sweeps, *more, recover)

    def fit_(self, model: nn.Module, plan: Plan, splits: Splits) -> Fitted:
        """Put the structures of a plan into a model, in place, and estimate batch statistics again.

        Args:
            model: dense, taken apart.
            plan: names and structures.
            splits: what was taken apart; where nothing changes it is put together again.
        """
        layers = replace_layers(
            model,
            plan,
            calibration=self.seen,
            original=self.original if self.sequential else None,
            loader=self.loader,
            forward=self.forward,
            sweeps=self.sweeps,
            seed=self.seed,
            folder=self.work,
            key=self.key,
            progress=self.progress,
        )
        whole_again_(model, splits, plan.changed)
        return Fitted(layers, self._statistics(model, plan))

    def _statistics(self, model: nn.Module, plan: Plan) -> Mapping[str, Any] | None:
        """Statistics of batch normalisations, estimated again now or when the folder was begun."""
        if self.original is None or self.loader is None:
            return None
        key = digest(self.key, plan.to_json()["layers"], self.sequential, self.sweeps)
        piece = f"statistics/{key[:12]}"
        kept = self.work.load(piece, key)
        if kept is not None:
            statistics.write_(model, kept[1])
            return kept[0]
        temperature = 1.0 if self.seen is None else self.seen.temperature
        found = statistics.reestimate(model, self.original, self.loader, forward=self.forward, temperature=temperature)
        if found is None:
            return None
        self.work.store(piece, key, dataclasses.asdict(found), statistics.tensors_of(model))
        return dataclasses.asdict(found)

    def recover_(self, model: nn.Module, plan: str) -> dict[str, Any]:
        """Train a model, in place, and report; checkpoints go to a folder of their own for each model, calibration,
        way to recover and plan, of which the key is given.

        Raises:
            DataError: there is nothing to train on.
        """
        from structmat.compression.recover import recover

        assert self.recover is not None, "nobody asked for recovery"
        assert self.original is not None, "recovery needs the original"
        if self.loader is None and self.recover.data is None:
            raise DataError("Recovery needs data. Pass calibration=..., or Distill(data=...).")
        outcome = recover(
            model,
            self.original,
            () if self.loader is None else self.loader,
            self.recover,
            forward=self.forward,
            loss=self.loss,
            seed=self.seed,
            folder=None if self.work.path is None else Path(self.work.path) / f"recovery-{self.digest(plan)[:12]}",
            show=self.progress,
        )
        return dataclasses.asdict(outcome)
