"""What a recovery makes small: how far a model is from the original on a batch, in each phase of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat.compression.distill import Distill
from structmat.compression.fading import Fading
from structmat.compression.objectives import (
    DIVERGENCE,
    SQUARES,
    Parts,
    block_names,
    distance,
    padding,
    structured_names,
)
from structmat.compression.running import Forward, Loss, call, device_of, outcome, own_loss, to_device
from structmat.compression.statistics import by_batches, normalisations
from structmat.errors import DataError


class Teaching:
    """The original as the teacher of a compressed model.

    Args:
        model: which learns.
        original: with its modules taken apart as the model's are, where parts are compared.
        settings: of the recovery.
        forward, loss: the user's, see :func:`structmat.compression.recover.recover`.
        temperature: of the softmax of both, where the settings name none.

    Attributes:
        normalisations: the model's batch normalisations by name.
        objective: the name of the distance; empty before the first batch.
        temperature: of the softmax.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        settings: Distill,
        forward: Forward | None,
        loss: Loss | None,
        temperature: float = 1.0,
    ) -> None:
        self._model, self._original, self._settings = model, original, settings
        self._forward, self._loss = forward, loss
        self.temperature = temperature if settings.temperature is None else settings.temperature
        self._fading: Fading | None = None
        self.normalisations = normalisations(model)
        self.objective = ""

    def fade(self) -> None:
        """From now on what the model lacks of the original is added back, less and less."""
        self._fading = Fading(self._model, self._original)

    def rest(self, share: float) -> float:
        """How much of that is added at this share of the distillation."""
        anneal = self._settings.anneal
        return max(0.0, 1.0 - share / anneal) if anneal else 0.0

    def error(self, batch: Any, step: int, share: float) -> Tensor:
        """What a step makes small, a differentiable scalar.

        Args:
            batch: on the device of the model.
            step: counted from the first one of all phases.
            share: of its phase that is over.

        Raises:
            DataError: the task's loss is asked for and there is none.
        """
        with by_batches(self.normalisations.values() if self._settings.normalise else ()):
            if step < self._settings.layerwise:
                return self._layers.error(batch, self._forward)
            if step < self._settings.before:
                return self._blocks.error(batch, self._forward)
            with contextlib.nullcontext() if self._fading is None else self._fading.added(self.rest(share)):
                return self._lesson(batch)

    def held_out(self) -> float:
        """The mean over the held-out batches of what distillation makes small, but for the errors of hidden states.

        Raises:
            DataError: there are none, or the task's loss is asked for and there is none.
        """
        assert self._settings.held_out is not None
        device, total, count = device_of(self._model), 0.0, 0
        with torch.no_grad():
            for batch in self._settings.held_out:
                batch = to_device(batch, device)
                value, output = self._distance(batch, None)
                total += float(self._with_own_loss(value, output, batch))
                count += 1
        if not count:
            raise DataError("held_out has no batches. Leave it out, or give some.")
        if math.isnan(total):
            raise DataError(
                "The distance from the original on the held-out batches is NaN. Look at held_out, or lower "
                "learning_rate."
            )
        return total / count

    def sensitivities(self, batch: Any, weights: Sequence[Tensor], seed: int) -> list[Tensor]:
        """How much each number of some weights matters to the outputs: the squared gradient of these along a direction
        that is drawn.

        For logits the direction is that of classes drawn by the model itself: the mean over draws is, but for a factor,
        the diagonal of the Fisher information, half of which times the square of a small change is the distance that it
        causes (Martens 2020, New insights and perspectives on the natural gradient method, sections 5 and 9). For other
        outputs it is normal, which gives the same for squared errors. One forward and one backward pass.

        Args:
            batch: on the device of the model.
            weights: parameters of the model.
            seed: of the draw.
        """
        found = outcome(call(self._model, batch, self._forward), batch)
        values = found.values.float()
        random = torch.Generator(values.device).manual_seed(seed)
        if found.classes:
            log_p = F.log_softmax(values / self.temperature, -1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=random)
            terms = log_p.gather(-1, drawn)[:, 0]
            mask = padding(batch, found)
            direction = (terms if mask is None else terms * mask).mean()
        else:
            normal = torch.randn(values.shape, generator=random, device=values.device)
            direction = (values * normal).mean()
        return [gradient.float().square() for gradient in torch.autograd.grad(direction, list(weights))]

    @cached_property
    def _layers(self) -> Parts:
        return Parts(self._model, self._original, structured_names(self._model), apart=True)

    @cached_property
    def _blocks(self) -> Parts:
        return Parts(self._model, self._original, block_names(self._model, self._settings.blocks), apart=True)

    @cached_property
    def _hidden(self) -> Parts:
        """Blocks whose outputs are hidden states."""
        return Parts(self._model, self._original, block_names(self._model, self._settings.blocks), apart=False)

    def _lesson(self, batch: Any) -> Tensor:
        """The distance, with the errors of hidden states and the task's loss where these are asked for."""
        settings, errors = self._settings, list[Tensor]()
        value, output = self._distance(batch, errors if settings.hidden > 0 else None)
        if errors:
            value = value + settings.hidden * torch.stack(errors).mean()
        return self._with_own_loss(value, output, batch)

    def _with_own_loss(self, value: Tensor, output: Any, batch: Any) -> Tensor:
        weight = self._settings.own_loss
        if weight == 0:
            return value
        task = own_loss(output, batch, self._loss)
        if task is None:
            raise DataError(
                f"Distill(own_loss={weight}) needs a loss, and the batches have no labels of the model's classes. "
                f"Pass loss=lambda output, batch: ..."
            )
        return value + weight * task

    def _distance(self, batch: Any, errors: list[Tensor] | None) -> tuple[Tensor, Any]:
        """The distance of the outputs, and the model's output.

        Args:
            batch: on the device of the model.
            errors: takes the errors of hidden states; None leaves these alone.
        """
        hidden = None if errors is None else self._hidden
        with torch.no_grad(), contextlib.nullcontext() if hidden is None else hidden.teaching():
            teacher = outcome(call(self._original, batch, self._forward), batch)
        comparing = contextlib.nullcontext() if hidden is None or errors is None else hidden.comparing(errors)
        with comparing:
            output = call(self._model, batch, self._forward)
        self.objective = DIVERGENCE if teacher.classes else SQUARES
        weights = padding(batch, teacher)
        return distance(outcome(output, batch), teacher, self.temperature, weights), output
