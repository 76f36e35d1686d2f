"""Models of plans, built as copies, and what ``evaluate`` said of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from structmat.compression.evaluate import Evaluate, name_of, quality_of
from structmat.compression.make import Maker
from structmat.compression.plan import Plan
from structmat.compression.split import Splits
from structmat.compression.untouched import copied
from structmat.compression.workfolder import digest


@dataclass(frozen=True)
class Built:
    """A model that was built and evaluated: its plan's key, itself, and what recovery reported."""

    key: str
    model: nn.Module
    recovery: Mapping[str, Any] | None


class Builder:
    """Builds models from one dense one. What was evaluated is kept in the work folder, and not built again.

    Args:
        model: with its layers as they were; copied for each plan.
        splits: what of it was taken apart.
        maker: fits and trains.
        evaluate: the quality of a model; None where nothing is to be evaluated.

    Attributes:
        last: what :meth:`quality` built last; None if it only read.
    """

    def __init__(self, model: nn.Module, splits: Splits, maker: Maker, evaluate: Evaluate | None) -> None:
        self.maker = maker
        self.last: Built | None = None
        self._model, self._splits, self._evaluate = model, splits, evaluate
        self._key = maker.digest(name_of(evaluate))

    def key(self, plan: Plan) -> str:
        """What tells equal plans."""
        return digest(plan.to_json()["layers"])

    def model(self, plan: Plan) -> nn.Module:
        """The model of a plan, without recovery."""
        found = copied(self._model)
        self.maker.fit_(found, plan, copy.deepcopy(self._splits))
        return found

    def quality(self, plan: Plan, *, recovered: bool) -> Mapping[str, float]:
        """What ``evaluate`` says of the model of a plan, after recovery if there is any and it is asked for."""
        assert self._evaluate is not None, "nothing is evaluated"
        self.last = None
        own, recovered = self.key(plan), recovered and self.maker.recover is not None
        name, key = f"tried/{own[:12]}", digest(self._key, own, recovered)
        kept = self.maker.work.load(name, key)
        if kept is not None:
            return {str(n): float(v) for n, v in kept[0].items()}
        model, report = self.model(plan), None
        if recovered:
            report = self.maker.recover_(model, own)
        quality = quality_of(self._evaluate, model)
        self.maker.work.store(name, key, quality)
        self.last = Built(own, model, report)
        return quality
