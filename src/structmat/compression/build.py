"""Models of plans, built as copies, and what ``evaluate`` said of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from structmat.compression.plan import Plan
from structmat.compression.workfolder import WorkFolder, digest


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
        fit: puts the structures of a plan into a model.
        recover: trains a model of a plan with this key, and reports; None for not at all.
        evaluate: the quality of a model; None where nothing is to be evaluated.
        work, key: where evaluations are kept, and the digest of what they depend on.

    Attributes:
        last: what :meth:`quality` built last; None if it only read.
    """

    def __init__(
        self,
        model: nn.Module,
        fit: Callable[[nn.Module, Plan], object],
        recover: Callable[[nn.Module, str], Mapping[str, Any]] | None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
        work: WorkFolder,
        key: str,
    ) -> None:
        self._model, self._fit, self._recover, self._evaluate = model, fit, recover, evaluate
        self._work, self._key = work, key
        self.last: Built | None = None

    def key(self, plan: Plan) -> str:
        """What tells equal plans."""
        return digest(plan.to_json()["layers"])

    def model(self, plan: Plan) -> nn.Module:
        """The model of a plan, without recovery."""
        found = copy.deepcopy(self._model)
        self._fit(found, plan)
        return found

    def quality(self, plan: Plan, *, recovered: bool) -> Mapping[str, float]:
        """What ``evaluate`` says of the model of a plan, after recovery if there is any and it is asked for."""
        assert self._evaluate is not None, "nothing is evaluated"
        self.last = None
        own, recovered = self.key(plan), recovered and self._recover is not None
        name, key = f"tried/{own[:12]}", digest(self._key, own, recovered)
        kept = self._work.load(name, key)
        if kept is not None:
            return {str(n): float(v) for n, v in kept[0].items()}
        model, report = self.model(plan), None
        if recovered and self._recover is not None:
            report = self._recover(model, own[:12])
        quality = dict(self._evaluate(model))
        self._work.store(name, key, quality)
        self.last = Built(own, model, report)
        return quality
