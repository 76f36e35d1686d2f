"""What reaches the layers that are timed when a model is run: images of convolutions, sequences of recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from structmat.compression.running import Forward, call, device_of, evaluating, input_of, to_device
from structmat.nn.convolution import FrozenConvolution
from structmat.nn.recurrent import FrozenRecurrent, Recurrent
from structmat.nn.recurrent.cells import Cell

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Called before a module, with its arguments."""


@dataclass(frozen=True)
class State:
    """Of a recurrent layer.

    Args:
        cell: whose it is, if all times are made in one native call; else None.
        sequences: how many are read at a time.
    """

    cell: Cell | None
    sequences: int


@dataclass(frozen=True)
class Reached:
    """What reaches layers when the model is run.

    Args:
        inputs: of convolutions, by name.
        states: of recurrent layers, by the names of the matrices that multiply them.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)


def reached(
    model: nn.Module, convolutions: Mapping[str, FrozenConvolution], example: Any, forward: Forward | None
) -> Reached:
    """Run the model on an example and look."""
    found = Reached()

    def watch(name: str) -> Hook:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.inputs[name] = input_of(given, named)

        return hook

    def count(name: str, layer: Recurrent | FrozenRecurrent) -> Hook:
        states = [".".join(filter(None, (name, own))) for own, _ in layer.named_children() if not own.startswith("ih")]

        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = input_of(given, named)
            cell = None if layer.options.proj_size or isinstance(x, PackedSequence) else layer.cell
            state = State(cell, _sequences(x, layer.options.batch_first))
            found.states.update(dict.fromkeys(states, state))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in convolutions.items()]
    handles += [
        module.register_forward_pre_hook(count(name, module), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, Recurrent | FrozenRecurrent)
    ]
    try:
        with evaluating(model), torch.inference_mode():
            call(model, to_device(example, device_of(model)), forward)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _sequences(x: Tensor | PackedSequence, batch_first: bool) -> int:
    """How many sequences the input of a recurrent layer holds."""
    if isinstance(x, PackedSequence):
        return int(x.batch_sizes[0])
    return 1 if x.dim() < 3 else x.shape[0 if batch_first else 1]
