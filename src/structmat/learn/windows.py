"""Learning windows under a budget: three lines beside any training loop.

    learner = sm.learn.WindowLearner(model, budget=0.3, steps=1000, start="random")  # replaces the linear layers
    optimizer = torch.optim.AdamW(sm.parameter_groups(model, lr=1e-3))
    for batch in data:
        ...                     # loss.backward(), optimizer.step()
        learner.step()          # widths and locations move, the budget shrinks
    learner.harden()            # compact layers, within the budget

Widths and locations take normalised gradient steps without momentum; then a proximal step projects the widths on the
budget, exactly: one shift of all widths, clipped, is the nearest point that spends it. Budget moves between
layers too, within bounds that ``spread`` sets: by default a layer ends with half to twice its own.
Source: Lee and Kim, "Differentiable Learning of Generalized Structured Matrices for Efficient Deep Neural Networks"
(ICLR 2024), with the projection on the true number of multiply-adds in place of their steering of the mean width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat.errors import BudgetError, ModelError, StructureError
from structmat.learn.widths import fit_exactly, project_widths, raise_widths
from structmat.nn.linear import StructuredLinear
from structmat.nn.windows import WindowedLinear
from structmat.projection.masks import BlurSchedule

_SECOND_MOMENT = 0.999
"""Decay of the mean square by which structural gradients are divided."""


@dataclass(frozen=True)
class Snapshot:
    """Windows of all layers at a step, (terms, 4) by name; for pictures and for how far they moved."""

    step: int
    cost: int
    windows: Mapping[str, Tensor]


class WindowLearner:
    """Replaces linear layers by ones with learned windows, and moves the windows after each step of an optimizer.

    Args:
        model: changed in place.
        budget: what the layers' windows may hold in the end, as a share of the dense layers' numbers (which is that of
            their multiply-adds for one row too): one for all, or one for each layer by its name.
        steps: calls of :meth:`step` in all; the schedules follow it.
        layers: names of the ``nn.Linear`` to replace; all but those in ``exclude`` if None.
        exclude: names to leave dense, such as an output layer.
        terms: rank-one terms, as a share of a layer's smaller side. With half of them full windows cost as much as a
            square dense matrix, with all of them twice as much.
        start: ``"projected"`` (the best windows of ``start_budget`` for the present weights) for a trained model;
            ``"random"`` (Gaussian contents, windows of half the sides, or more where the budget asks, at random
            places; the present weights are forgotten) is best from scratch; ``"weights"`` (singular value decomposition
            of the present weights, full windows) is the published start for both, and measured worse.
        start_budget: for ``"projected"``; halfway between the budget and 1 if None.
        rate: of the normalised steps, in shares of a side; decays along a cosine.
        anneal: share of the steps over which the budget falls linearly from the initial cost to what is asked.
        settle: share of the steps at the end in which windows stand still, within the budget in whole numbers, while
            contents go on.
        floor: share of its dense numbers that every layer keeps: one price for all with normalised steps could
            otherwise drop whole layers.
        blur: of the edges in the gradient.
        frozen: windows do not move and only shrink, all by the same share: the control experiment.
        spread: by which factor a layer may end above or below its own budget, at the same numbers in all. With 1
            structure moves within layers only; with infinity it moves freely down to ``floor``. A small language model
            ended better with 2 than with 1 at every budget, a perceptron alike.
        snapshots: how many states of the windows are kept in :attr:`history`.
        seed: of all that is drawn.

    Raises:
        ModelError: there is no layer to replace, or a name is no linear layer.
        BudgetError: the budget is not between the floor and 1.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float | Mapping[str, float],
        steps: int,
        *,
        layers: Collection[str] | None = None,
        exclude: Collection[str] = (),
        terms: float = 0.5,
        start: str = "projected",
        start_budget: float | None = None,
        rate: float = 5e-3,
        anneal: float = 0.5,
        settle: float = 0.05,
        floor: float = 0.02,
        blur: BlurSchedule | None = None,
        frozen: bool = False,
        spread: float = 2.0,
        snapshots: int = 8,
        seed: int = 0,
    ) -> None:
        if not all(floor < share <= 1 for share in (budget.values() if isinstance(budget, Mapping) else [budget])):
            raise BudgetError(
                f"budget={budget!r} is a share of the dense numbers above the floor {floor} and at most 1."
            )
        if start not in ("weights", "random", "projected"):
            raise StructureError(f"start={start!r} is none of 'weights', 'random', 'projected'.")
        if not spread >= 1:
            raise BudgetError(f"spread={spread!r} is a factor between shares of layers, at least 1.")
        if steps < 1 or not 0 < anneal <= 1 - settle or settle < 0 or not 0 < terms <= 2 or rate < 0 or snapshots < 0:
            raise StructureError(
                f"WindowLearner(steps={steps}, anneal={anneal}, terms={terms}, rate={rate}, snapshots={snapshots}): "
                "steps is at least 1, anneal above 0 and at most 1 - settle, terms in (0, 2], the others not negative."
            )
        self.model, self.steps = model, steps
        self.rate, self.anneal, self.floor, self.settle = rate, anneal, floor, settle
        self.blur = blur or BlurSchedule()
        self.frozen, self.spread, self.seed = frozen, spread, seed
        self.start, self.start_budget, self.share = start, start_budget, terms
        self.step_count = 0
        self.settled = False
        self.layers = self._replace(layers, exclude, budget)
        self.dense = {name: layer.in_features * layer.out_features for name, layer in self.layers.items()}
        self.budgets = {n: budget[n] if isinstance(budget, Mapping) else budget for n in self.layers}
        self.initial = {name: float(self._costs(layer).sum()) for name, layer in self.layers.items()}
        self._squares = {name: torch.zeros(4, layer.terms) for name, layer in self.layers.items()}
        self._every = max(1, steps // snapshots) if snapshots else 0
        self.history: list[Snapshot] = []
        self._sharpen()
        self._record()

    # -------------------------------------------------------------------------------------------------- layers

    def _replace(
        self, names: Collection[str] | None, exclude: Collection[str], budget: float | Mapping[str, float]
    ) -> dict[str, WindowedLinear]:
        if isinstance(self.model, nn.Linear):
            raise ModelError("The model itself is an nn.Linear and can't be replaced in place. Wrap it: nn.Sequential.")
        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        there = {n: m for n, m in self.model.named_modules() if isinstance(m, WindowedLinear)}
        for name in (*(names or ()), *exclude):
            if name not in linears and name not in there:
                raise ModelError(
                    f"{name!r} is no nn.Linear of the model. They are {', '.join(sorted(linears)) or 'none'}."
                )
        chosen = [n for n in linears if (names is None or n in names) and n not in exclude]
        for name in chosen + [n for n in there if n not in exclude]:
            if isinstance(budget, Mapping) and name not in budget:
                raise BudgetError(
                    f"budget={dict(budget)!r} has no share for the layer {name!r}. Add it, or exclude it."
                )
        generator = torch.Generator().manual_seed(self.seed)
        made: dict[str, WindowedLinear] = {n: m for n, m in there.items() if n not in exclude}
        for name in chosen:
            share = budget[name] if isinstance(budget, Mapping) else budget
            made[name] = self._made(linears[name], share, generator).train(linears[name].training)
            self.model.set_submodule(name, made[name])
        if not made:
            raise ModelError("The model has no nn.Linear to replace.")
        return made

    def _made(self, linear: nn.Linear, share: float, generator: torch.Generator) -> WindowedLinear:
        m, n = linear.weight.shape
        terms = max(1, round(self.share * min(m, n)))
        if self.start == "random":
            width = min(1.0, max(0.5, 1.1 * share * m * n / (terms * (m + n))))  # what is allowed is there to spend
            layer = WindowedLinear(
                n, m, linear.bias is not None, terms=terms, width=width, dtype=linear.weight.dtype, generator=generator
            )
            if linear.bias is not None:
                with torch.no_grad():
                    assert layer.bias is not None
                    layer.bias.copy_(linear.bias)
            return layer.to(linear.weight.device)
        budget = None
        if self.start == "projected":
            budget = (1 + share) / 2 if self.start_budget is None else self.start_budget
        return WindowedLinear.from_linear(linear, terms=terms, budget=budget, generator=generator)

    @staticmethod
    def _costs(layer: WindowedLinear) -> Tensor:
        """Numbers of each term, real widths; none where a width rounds to nothing."""
        sizes = torch.tensor(layer.sizes, dtype=torch.float64)[:, None]
        places = layer.widths.detach().double() * sizes
        alive = (places.round() > 0).all(0)
        return places.sum(0) * alive

    # ---------------------------------------------------------------------------------------------------- steps

    @property
    def cost(self) -> int:
        """Numbers that the windows hold now, all layers together."""
        return sum(layer.cost for layer in self.layers.values())

    @property
    def allowed(self) -> float:
        """Numbers that the windows may hold now: falls from the initial cost to the budget."""
        return sum(self._limit(name) for name in self.layers)

    def _wanted(self, name: str) -> float:
        return self.budgets[name] * self.dense[name]

    def _limit(self, name: str) -> float:
        """What is allowed now of one layer, where nothing moves between layers."""
        wanted, first = self._wanted(name), self.initial[name]
        return max(wanted, first + (wanted - first) * min(1.0, self.step_count / (self.anneal * self.steps)))

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Move windows by the gradients that the last backward passes left, then shrink them to what is allowed now.

        Once for each step of the optimizer. Where the optimizer is given, contents that windows have left behind are
        dropped from time to time, from its state too, so that steps become cheaper; see
        :meth:`structmat.nn.windows.WindowedLinear.compact`.
        """
        self.step_count += 1
        rate = self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (self.step_count - 1) / self.steps)))
        settled = self.step_count >= (1 - self.settle) * self.steps
        with torch.no_grad():
            if not self.settled:
                for name, layer in self.layers.items():
                    self._move(name, layer, 0.0 if self.frozen else rate)
                self._shrink()
                if settled:
                    self._finish()
        if optimizer is not None and self.step_count % max(1, self.steps // 20) == 0:
            self._compact(optimizer)
        self._sharpen()
        if self._every and (self.step_count % self._every == 0 or self.step_count == self.steps):
            self._record()

    def leaves(self) -> list[Tensor]:
        """The widths and locations that collect gradients now: for ``torch.autograd.backward(inputs=...)``."""
        values = [t for layer in self.layers.values() for t in (layer.widths, layer.locations)]
        return [t for t in values if t.requires_grad and not self.settled]

    def _move(self, name: str, layer: WindowedLinear, rate: float) -> None:
        squares = self._squares[name]
        correction = 1 - _SECOND_MOMENT**self.step_count
        for begin, values in ((0, layer.widths), (2, layer.locations)):
            grad = values.grad
            values.grad = None
            if grad is None or rate == 0 or not bool(torch.isfinite(grad).all()):
                continue
            own = squares[begin : begin + 2].to(grad)
            own = _SECOND_MOMENT * own + (1 - _SECOND_MOMENT) * grad.square()
            squares[begin : begin + 2] = own.to(squares)
            size = (own / correction).sqrt()
            # A term that never had a gradient, such as the location of a full window, stays where it is.
            values -= rate * torch.where(size > 0, grad / size.clamp(min=1e-30), torch.zeros_like(grad))
        layer.widths.clamp_(0.0, 1.0)
        layer.locations.remainder_(1.0)

    def _shrink(self) -> None:
        if self.frozen:
            self._scale_all()
            return
        names = list(self.layers)
        groups = [self._sides(name) for name in names]
        limits = [self._limit(name) for name in names]
        if self.spread > 1:
            # Between layers a width is measured in shares of its side: what no gradient asks for shrinks alike.
            kept = [max(self.floor * self.dense[n], most / self.spread) for n, most in zip(names, limits, strict=True)]
            floors = [low * p / sum(prices) for low, (_, prices) in zip(kept, groups, strict=True) for p in prices]
            capped = [project_widths(w, p, m * self.spread) for (w, p), m in zip(groups, limits, strict=True)]
            prices = [price for _, own in groups for price in own]
            flat = project_widths([w for pair in capped for w in pair], prices, sum(limits), floors, prices)
            tops = [
                most * self.spread * p / sum(own) for most, (_, own) in zip(limits, groups, strict=True) for p in own
            ]
            flat = raise_widths(flat, prices, sum(limits), tops, prices)
            found = [flat[i : i + 2] for i in range(0, len(flat), 2)]
        else:
            found = [
                raise_widths(project_widths(w, p, most), p, most) for (w, p), most in zip(groups, limits, strict=True)
            ]
        for layer, after, (before, _) in zip(self.layers.values(), found, groups, strict=True):
            shift = torch.stack(before) - torch.stack(after)
            layer.widths -= shift.to(layer.widths)
            layer.widths.clamp_(0.0, 1.0)

    def _sides(self, name: str) -> tuple[list[Tensor], list[float]]:
        """Widths of both sides, none of terms that lack one, and the prices of a unit of each."""
        layer = self.layers[name]
        alive = (layer.widths * torch.tensor(layer.sizes)[:, None]).round().gt(0).all(0)
        return [layer.widths[side].double() * alive for side in (0, 1)], [float(size) for size in layer.sizes]

    def _scale_all(self) -> None:
        for name, layer in self.layers.items():
            limit, now = self._limit(name), float(self._costs(layer).sum())
            if now > limit:
                layer.widths *= limit / now

    def _finish(self) -> None:
        """Meet the budget in whole numbers. From here on windows stand still."""
        if self.settled:
            return
        self.settled = True
        for layer in self.layers.values():
            layer.movable = False
        self.fit()

    def fit(self) -> None:
        """Bring the windows to whole numbers within the budget, and as many as it allows."""
        if self.frozen or self.spread == 1:
            for name, layer in self.layers.items():
                fit_exactly([layer], int(self._wanted(name) + 1e-6))
        else:
            fit_exactly(list(self.layers.values()), int(sum(map(self._wanted, self.layers)) + 1e-6))

    def _compact(self, optimizer: torch.optim.Optimizer) -> None:
        for name, layer in self.layers.items():
            arcs = int(layer.arcs[:, [1, 3]].sum())
            near = layer.cost + 64 * layer.terms
            if near < 0.8 * arcs:
                windows = layer.windows()
                alive = torch.nonzero((windows[:, 1] > 0) & (windows[:, 3] > 0))[:, 0]
                alive = alive if len(alive) else torch.arange(1)
                layer.compact(16, optimizer)
                self._squares[name] = self._squares[name][:, alive].clone()

    def _sharpen(self) -> None:
        share = self.step_count / self.steps
        for layer in self.layers.values():
            rows, columns = (self.blur.sigma(share, size) for size in layer.sizes)
            layer.sigmas = (rows, columns)

    def _record(self) -> None:
        if self._every:
            windows = {name: layer.windows().to(torch.int32) for name, layer in self.layers.items()}
            self.history.append(Snapshot(self.step_count, self.cost, windows))

    # ------------------------------------------------------------------------------------------------- the end

    def harden(self) -> nn.Module:
        """Replace the layers by compact :class:`StructuredLinear` within the budget, in place; returns the model.

        At most 1 % of the budget is left unused where windows are at least a hundred places in all.
        """
        with torch.no_grad():
            self._finish()
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.harden())
        return self.model

    def moved(self) -> dict[str, float]:
        """How far windows have moved, by layer: the mean distance of their middles from the first snapshot, as a share
        of the side, over terms that are alive; the most that is possible is 0.5.

        Raises:
            StructureError: no snapshots are kept, or terms were dropped since.
        """
        if not self.history:
            raise StructureError("WindowLearner(snapshots=0) keeps no windows to compare with.")
        found = {}
        for name, layer in self.layers.items():
            first, now = self.history[0].windows[name].double(), layer.windows().double()
            if len(first) != len(now):
                raise StructureError(f"Terms of {name} were dropped since the first snapshot: distances are unknown.")
            alive = (now[:, 1] > 0) & (now[:, 3] > 0)
            distances = []
            for at, size in ((0, layer.out_features), (2, layer.in_features)):
                middle = [(w[:, at] + w[:, at + 1] / 2) / size for w in (first, now)]
                away = (middle[0] - middle[1]).remainder(1.0)
                distances.append(torch.minimum(away, 1 - away)[alive])
            found[name] = float(torch.cat(distances).mean()) if bool(alive.any()) else 0.0
        return found

    # -------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs beside the state of the model, where widths and locations are."""
        return {
            "step": self.step_count,
            "settled": self.settled,
            "steps": self.steps,
            "budgets": dict(self.budgets),
            "initial": dict(self.initial),
            "squares": {n: t.clone() for n, t in self._squares.items()},
            "arcs": {n: layer.arcs.clone() for n, layer in self.layers.items()},
            "history": [(s.step, s.cost, dict(s.windows)) for s in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, exactly. Call it before the model's and the optimizer's ``load_state_dict``: it
        gives the layers the sizes that they had.

        Raises:
            ModelError: the checkpoint is of other layers, another budget or another number of steps.
        """
        if set(state["arcs"]) != set(self.layers) or (state["steps"], state["budgets"]) != (self.steps, self.budgets):
            raise ModelError(
                f"The checkpoint is of {len(state['arcs'])} layers, {state['steps']} steps and budgets "
                f"{state['budgets']}; this learner has {len(self.layers)} layers, {self.steps} steps and budgets "
                f"{self.budgets}."
            )
        for name, layer in self.layers.items():
            layer.resize_like(state["arcs"][name])
        self.step_count, self.settled = int(state["step"]), bool(state["settled"])
        for layer in self.layers.values():
            layer.movable = not self.settled
        self.initial = dict(state["initial"])
        self._squares = {n: t.clone() for n, t in state["squares"].items()}
        self.history = [Snapshot(s, c, dict(w)) for s, c, w in state["history"]]
        self._sharpen()


def hardened(model: nn.Module) -> dict[str, StructuredLinear]:
    """The compact windowed layers of a model by name."""
    from structmat.structures.gblr import GBLR

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear) and isinstance(module.structure, GBLR)
    }


def softened(model: nn.Module, name: str) -> WindowedLinear:
    """Replace a compact layer by one whose windows can be learned, in place: the inverse of hardening.

    Contents outside of the windows begin at zero.

    Raises:
        ModelError: the layer is no GBLR layer.
    """
    from structmat.windows import terms_of

    layer = hardened(model).get(name)
    if layer is None:
        raise ModelError(f"{name!r} is no GBLR layer of the model. They are {', '.join(hardened(model)) or 'none'}.")
    made = WindowedLinear.from_terms(terms_of(layer.matrix), layer.bias).train(layer.training)
    model.set_submodule(name, made)
    return made
