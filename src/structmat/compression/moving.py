"""Windows that move while a compressed model is recovered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structmat.errors import StructureError
from structmat.learn.windows import Snapshot, WindowLearner, hardened, softened

_RATE = 2e-3
"""Of the windows, in shares of a side a step: what the fit found is near already."""

_PLACES = ("widths", "locations")

_SNAPSHOTS = 6
"""Of the windows, evenly over recovery."""

_SHOWN = 3
"""Layers whose windows are part of the report: those that moved farthest."""


class MovingWindows:
    """The GBLR layers of a model with windows that are learned, each at the numbers that it holds now.

    The layers are replaced in place by ones with soft windows; :meth:`harden` makes them compact again.

    Args:
        model: changed in place.
        steps: of recovery, which the schedules of the windows follow.
        seed: of all that is drawn.

    Raises:
        StructureError: the model has no GBLR layer.
    """

    def __init__(self, model: nn.Module, steps: int, seed: int) -> None:
        compact = {n: layer for n, layer in hardened(model).items() if layer.matrix.num_parameters}
        if not compact:
            raise StructureError(
                "Distill(windows=True) needs GBLR layers, and the model has none. Plan some, or leave it."
            )
        budgets = {
            name: min(1.0, layer.matrix.num_parameters / (layer.in_features * layer.out_features))
            for name, layer in compact.items()
        }
        for name in compact:
            softened(model, name)
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        self.learner = WindowLearner(
            model,
            budgets,
            steps,
            exclude=linears,
            floor=0.0,
            spread=1.0,
            rate=_RATE,
            snapshots=_SNAPSHOTS,
            seed=seed,
        )

    def leaves(self) -> list[Tensor]:
        """What collects gradients beside the parameters."""
        return self.learner.leaves()

    def step(self) -> None:
        """After each step of the optimizer."""
        self.learner.step()

    def slow_down(self, caution: float) -> None:
        """From here on windows move at this share of their rate."""
        self.learner.rate = _RATE * caution

    @contextlib.contextmanager
    def as_deployed(self) -> Iterator[None]:
        """Meanwhile the windows are those that :meth:`harden` would leave: within the budget in whole numbers."""
        before = self.places()
        with torch.no_grad():
            self.learner.fit()
        try:
            yield
        finally:
            self.place(before)

    def places(self) -> dict[str, Tensor]:
        """Widths and locations of all layers, as ``layer.widths`` and ``layer.locations``."""
        return {
            f"{name}.{kind}": getattr(layer, kind).detach().clone()
            for name, layer in self.learner.layers.items()
            for kind in _PLACES
        }

    def place(self, places: Mapping[str, Tensor]) -> None:
        """Put the windows where :meth:`places` found them."""
        with torch.no_grad():
            for name, layer in self.learner.layers.items():
                for kind in _PLACES:
                    getattr(layer, kind).copy_(places[f"{name}.{kind}"])

    def harden(self) -> None:
        """Make the layers compact again, with no more numbers than they had."""
        self.learner.harden()

    def films(self) -> tuple[dict[str, Any], ...]:
        """Windows over recovery as JSON values, of the layers whose windows moved farthest: ``layer``, its ``shape``,
        how far they ``moved`` as a share of the side, and ``frames`` of a ``step`` and its ``windows``."""
        layers = self.learner.layers
        end = Snapshot(self.learner.step_count, self.learner.cost, {n: x.windows() for n, x in layers.items()})
        moved = self.learner.moved()
        return tuple(
            {
                "layer": name,
                "shape": list(layers[name].sizes),
                "moved": moved[name],
                "frames": [{"step": s.step, "windows": s.windows[name].tolist()} for s in self._frames(end)],
            }
            for name in sorted(moved, key=lambda n: -moved[n])[:_SHOWN]
        )

    def _frames(self, end: Snapshot) -> list[Snapshot]:
        """The snapshots, and in place of one at the last step the windows that were kept."""
        return [*(s for s in self.learner.history if s.step != end.step), end]

    # -------------------------------------------------------------------------------------------- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, beside :meth:`facts`."""
        state = self.learner.state_dict()
        return self.places() | {f"{name}.squares": squares for name, squares in state["squares"].items()}

    def facts(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        history = [[s.step, s.cost, {n: w.tolist() for n, w in s.windows.items()}] for s in self.learner.history]
        return {"step": self.learner.step_count, "settled": self.learner.settled, "history": history}

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint of the same model, exactly."""
        state = self.learner.state_dict()
        squares = {name: tensors[f"{name}.squares"] for name in state["squares"]}
        contents = [p.detach().clone() for layer in self.learner.layers.values() for p in layer.parameters()]
        history = [
            (step, cost, {name: torch.tensor(table, dtype=torch.int32) for name, table in windows.items()})
            for step, cost, windows in facts["history"]
        ]
        self.learner.load_state_dict(state | dict(facts) | {"squares": squares, "history": history})
        with torch.no_grad():
            held = (p for layer in self.learner.layers.values() for p in layer.parameters())
            for parameter, content in zip(held, contents, strict=True):
                parameter.copy_(content)
        self.place(tensors)
