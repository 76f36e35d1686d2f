"""How to recover, and what a recovery did."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from numbers import Real
from typing import Any

from structmat.compression.running import check_loader
from structmat.errors import StructureError


class Rates(StrEnum):
    """How the learning rates of a structured layer's tensors follow from that of a dense layer."""

    LAYER = "one a layer"
    """:func:`structmat.learn.groups.recovery_groups`: right for factors that were fitted."""

    STAGE = "one a stage"
    """:func:`structmat.learn.groups.parameter_groups`: right for fresh ones."""

    EQUAL = "equal"
    """That of a dense layer for every tensor."""


class Optimizer(StrEnum):
    """What makes the steps of recovery."""

    ADAM = "Adam"
    """``torch.optim.AdamW``: one rate for each number."""

    SOAP = "SOAP"
    """:class:`structmat.learn.soap.SOAP`: along the axes of each matrix in which gradients are uncorrelated."""


@dataclass(frozen=True)
class Distill:
    """How to recover: distillation from the original model, after an optional layer-wise reconstruction.

    Args:
        steps: of the optimizer, one batch each; None if only ``minutes`` limits.
        minutes: stop after this time (resumed runs add up). The schedule follows whichever limit is nearer.
        learning_rate: for a dense layer; structured tensors get multiples.
        rates: which multiples.
        optimizer: of the steps.
        temperature: of the softmax of both models (Hinton, Vinyals, Dean 2015); only for outputs that are logits. None
            for the least at which the original says something of at least half of the data, see
            :func:`structmat.compression.softening.temperature_for`.
        own_loss: weight of the task's own loss (the user's, the output's ``.loss``, or cross-entropy to the labels of a
            batch) that is added to the distance from the original.
        layerwise: steps before, in which each structured layer learns to put out what the original layer does, on
            inputs of the compressed model. No gradient passes from layer to layer.
        blockwise: steps after these, in which each block learns to put out what the original block does, on inputs of
            the compressed model. No gradient passes from block to block.
        blocks: globs of the blocks' names; without them, the innermost elements of lists and sequences of modules that
            hold several layers, and layers that are in none by themselves.
        hidden: weight of the error of the blocks' outputs (a share of their mean square, the mean over blocks) that is
            added to the distance from the original while distilling.
        closed_form: solve the last factor and the bias of each layer by least squares before all steps, see
            :func:`structmat.compression.reconstruct.reconstruct`; kept if the ``held_out`` batches say so.
        anneal: share of the distillation in which what the structures lost is added back, from all of it down to
            nothing: the model begins as the original and becomes the compressed one.
        thin: share of the distillation in which sparse layers choose their entries: each begins with the original's
            matrix and loses the entries that are missed least until it has the number that it shall have (see
            :class:`structmat.compression.thinning.Thinning`). A step costs what it would with dense layers in their
            places. Worth its time where recovery is long and sparse layers feed back, as those of recurrent nets do.
            Neither with ``closed_form`` nor with steps before distillation.
        normalise: batch normalisation uses and learns the statistics of the batches, as in training, rather than those
            that it has.
        statistics: estimate the statistics of batch normalisations again at the end, where that brings the outputs
            nearer; not with ``normalise``.
        warmup: share of the steps in which the learning rate rises; then it falls along a cosine to zero.
        clip: largest norm of the gradient.
        weight_decay: for matrices that are not structured; structured tensors never decay.
        data: batches to train on, if others than those of calibration.
        held_out: batches to be judged by: the state that is nearest to the original on them is kept (with ``own_loss``,
            that of the least sum), so that recovery never ends worse than it began; where a look finds the model 30
            times as far away as at the start, or half as far again after half or three quarters of the steps, the best
            state is taken up again with a third of the learning rate. Without them the last state is kept.
        windows: let the structure move while distilling: the windows of GBLR layers are learned, each layer at the
            numbers that it holds (see :class:`structmat.learn.windows.WindowLearner`), then made compact again. The
            state that ``held_out`` judges and keeps has its windows in whole numbers already. Needs ``steps``, and
            neither ``closed_form`` nor ``anneal``; windows stand still until distillation begins.
        patience: stop after so many looks at ``held_out`` in which nothing was nearer than before; None for never.
        check_every: steps between two looks at ``held_out``, and between two entries of the curve of losses.
        save_every: seconds between two checkpoints, where there is a folder.
    """

    steps: int | None = 300
    minutes: float | None = None
    learning_rate: float = 1e-3
    rates: Rates = Rates.LAYER
    optimizer: Optimizer = Optimizer.ADAM
    temperature: float | None = None
    own_loss: float = 0.0
    layerwise: int = 0
    blockwise: int = 0
    blocks: Sequence[str] = ()
    hidden: float = 0.0
    closed_form: bool = False
    anneal: float = 0.0
    thin: float = 0.0
    normalise: bool = False
    statistics: bool = True
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.0
    windows: bool = False
    data: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    held_out: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    patience: int | None = None
    check_every: int = 25
    save_every: float = 60.0

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value: object = getattr(self, name)
            if value is None and name in ("steps", "minutes", "patience", "temperature"):
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise StructureError(f"Distill({name}={value!r}): {name} is a number.")
        for name in ("data", "held_out"):
            if getattr(self, name) is not None:
                check_loader(getattr(self, name), f"Distill({name}=...)")
        if self.steps is None and self.minutes is None:
            raise StructureError("Distill(steps=None, minutes=None) would never end. Give one of the two.")
        if self.windows and self.steps is None:
            raise StructureError("Distill(windows=True, steps=None): windows need a number of steps. Give one.")
        if self.windows and (self.closed_form or self.anneal):
            raise StructureError(
                "Distill(windows=True) moves the windows that closed_form and anneal take for fixed. Leave these out."
            )
        if self.anneal and self.closed_form:
            raise StructureError(
                "Distill(anneal=..., closed_form=True): what annealing adds back belongs to the factors as they were "
                "fitted. Choose one."
            )
        if self.thin and (self.closed_form or self.before):
            raise StructureError(
                "Distill(thin=...) begins with the original's matrices: leave out closed_form, layerwise and "
                "blockwise, which would change sparse layers before."
            )
        if self.patience is not None and self.held_out is None:
            raise StructureError("Distill(patience=...) counts looks at held_out batches. Give held_out=....")
        if isinstance(self.blocks, str):
            raise StructureError(f"Distill(blocks={self.blocks!r}) is a sequence of patterns. Pass [{self.blocks!r}].")
        patterns: object = self.blocks
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            raise StructureError(f"Distill(blocks={self.blocks!r}) is a sequence of patterns, such as ['layers.*'].")
        positive, not_negative, share = "above 0 and finite", "at least 0 and finite", "at least 0 and below 1"
        count, some = "an integer of at least 0", "an integer of at least 1"
        rules = {
            "steps": (self.steps is None or _is_whole(self.steps, 1), f"{some}, or None with minutes"),
            "minutes": (self.minutes is None or 0 < self.minutes < math.inf, f"{positive}, or None"),
            "learning_rate": (0 < self.learning_rate < math.inf, positive),
            "temperature": (self.temperature is None or 0 < self.temperature < math.inf, f"{positive}, or None"),
            "own_loss": (0 <= self.own_loss < math.inf, not_negative),
            "layerwise": (_is_whole(self.layerwise, 0), count),
            "blockwise": (_is_whole(self.blockwise, 0), count),
            "hidden": (0 <= self.hidden < math.inf, not_negative),
            "anneal": (0 <= self.anneal < 1, share),
            "thin": (0 <= self.thin < 1, share),
            "rates": (isinstance(self.rates, Rates), f"one of {', '.join(f'Rates.{rates.name}' for rates in Rates)}"),
            "optimizer": (
                isinstance(self.optimizer, Optimizer),
                f"one of {', '.join(f'Optimizer.{optimizer.name}' for optimizer in Optimizer)}",
            ),
            "patience": (self.patience is None or _is_whole(self.patience, 1), f"{some}, or None"),
            "warmup": (0 <= self.warmup < 1, share),
            "clip": (self.clip > 0, "above 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, not_negative),
            "check_every": (_is_whole(self.check_every, 1), some),
            "save_every": (self.save_every >= 0, "at least 0"),
        }
        for name, (is_legal, words) in rules.items():
            if not is_legal:
                raise StructureError(f"Distill({name}={getattr(self, name)!r}): {name} is {words}.")

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make one recovery another than that of other settings; data are not among them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("data", "held_out", "save_every")}

    @property
    def before(self) -> int:
        """Steps before distillation."""
        return self.layerwise + self.blockwise


_NUMBERS = (
    "steps",
    "minutes",
    "learning_rate",
    "temperature",
    "own_loss",
    "layerwise",
    "blockwise",
    "hidden",
    "anneal",
    "thin",
    "warmup",
    "clip",
    "weight_decay",
    "patience",
    "check_every",
    "save_every",
)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Recovery:
    """What recovery did.

    Args:
        objective: the distance from the original that was made small.
        steps: of distillation, and before it ``layerwise_steps`` and ``blockwise_steps``.
        seconds: of all runs together.
        losses: (step, mean training loss since the entry before).
        held_out: (step, distance from the original on the held-out batches, with the task's loss where that is asked
            for); empty without them.
        kept_step: whose state the model has now.
        closed_form: what solving last factors again did, if it was asked for: layers that changed, whether they were
            kept, and the distances on the held-out batches where there are such.
        statistics: what estimating batch statistics again did, if anything was to estimate.
        windows: windows that moved, over recovery, of the layers where they moved farthest: JSON values with ``layer``,
            ``shape``, ``moved`` (a share of the side, on average) and ``frames``.
        temperature: that logits were divided by in both models.
    """

    objective: str
    steps: int
    layerwise_steps: int
    seconds: float
    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    kept_step: int
    blockwise_steps: int = 0
    closed_form: Mapping[str, Any] | None = None
    statistics: Mapping[str, Any] | None = None
    windows: tuple[Mapping[str, Any], ...] = ()
    temperature: float = 1.0
