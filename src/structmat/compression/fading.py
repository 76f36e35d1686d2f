"""Annealing from dense: what the structures lost is added back, and fades while the factors learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.layers import layer_of, structured_layer_of
from structmat.compression.objectives import structured_names


class Fading:
    """The dense remainders of a compressed model's layers: the original's matrices minus the structured ones, as they
    are when this is made. With all of them added the model is the original.

    Args:
        model: compressed.
        original: with its modules taken apart as the model's are.
    """

    def __init__(self, model: nn.Module, original: nn.Module) -> None:
        self._model = model
        self._rests: dict[str, nn.Module] = {}
        present = dict(original.named_modules())
        for name in structured_names(model):
            layer = model.get_submodule(name)
            adapter = structured_layer_of(layer)
            source = layer_of(present[name]) if name in present else None
            if adapter is None or source is None:
                continue
            rest = adapter.to_dense(layer)
            own = layer_of(rest)
            assert own is not None, f"{type(rest).__name__} is dense"
            own.assign(rest, source.matrices(present[name]).detach() - own.matrices(rest).detach())
            rest.register_parameter("bias", None)
            self._rests[name] = rest.requires_grad_(False).eval()

    @contextmanager
    def added(self, share: float) -> Iterator[None]:
        """The model with this share of the remainders in its layers."""
        handles = []
        if share > 0:
            for name, rest in self._rests.items():

                def add(_: nn.Module, given: Any, named: Any, output: Tensor, rest: nn.Module = rest) -> Tensor:
                    return torch.add(output, rest(*given, **named), alpha=share)

                handles.append(self._model.get_submodule(name).register_forward_hook(add, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
