"""A model that is changed in place only by work that comes to its end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from structmat.errors import ModelError

Model = TypeVar("Model", bound=nn.Module)

_TABLES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""What a module holds in containers of its own, which change in place."""


class Kept:
    """A model as it is now: which modules, parameters and buffers it holds, their attributes and modes, and, once there
    is a copy of the model, their values. Takes no memory for values itself.

    Args:
        model: that may change from now on.

    Attributes:
        twin: a copy of the model with the values of now, if there is one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.twin: nn.Module | None = None
        self._model = model
        self._attributes = [(module, dict(vars(module))) for module in model.modules()]
        self._tables = [
            (table, table.copy())
            for _, attributes in self._attributes
            for name in _TABLES
            if (table := attributes.get(name)) is not None
        ]
        self._gradients = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def restore_(self) -> None:
        """Make the model what it was. Values are compared with those of the twin, and only what differs is written."""
        for module, attributes in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for table, content in self._tables:
            table.clear()
            table.update(content)
        for parameter, required, gradient in self._gradients:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        if self.twin is None:
            return
        with torch.no_grad():
            for own, other in zip(_tensors(self._model), _tensors(self.twin), strict=True):
                if not torch.equal(own, other.to(own.device)):
                    own.copy_(other)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def copied(model: Model) -> Model:
    """A copy of a model.

    Raises:
        ModelError: it holds something that can't be copied.
    """
    try:
        return copy.deepcopy(model)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        old = next((type(hook).__name__ for hook in hooks if isinstance(hook, WeightNorm | SpectralNorm)), None)
        if old is not None:
            words = "weight_norm" if old == "WeightNorm" else "spectral_norm"
            raise ModelError(
                f"The model can't be copied: torch.nn.utils.{words} leaves weights that are computed. Call "
                f"torch.nn.utils.remove_{words} on its layers, or use torch.nn.utils.parametrizations.{words}."
            ) from error
        raise ModelError(
            f"The model can't be copied: {error}. Take what can't be out of its attributes, or call compress_ with "
            f"original=..., the same model as another object."
        ) from error


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[Kept]:
    """Where the work inside fails or is interrupted, the model is what it was before.

    Parameters and buffers are the same objects then, with their values if ``twin`` of what is given was set before any
    of them changed.
    """
    kept = Kept(model)
    try:
        yield kept
    except BaseException:
        kept.restore_()
        raise
