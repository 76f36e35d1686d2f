"""Second moments of what the matrices of a recurrent layer multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from structmat.errors import DataError
from structmat.nn.recurrent.base import Recurrent
from structmat.nn.recurrent.layers import StructuredGRU, StructuredLSTM, StructuredRNN
from structmat.structures.dense import Dense


def second_moments(
    layer: nn.LSTM | nn.GRU | nn.RNN | Recurrent, batches: Iterable[Tensor | PackedSequence | tuple[Any, ...]]
) -> dict[str, Tensor]:
    """``E[x x^T]`` of the inputs and states that each matrix multiplies, over all times and sequences, in float64.

    Args:
        layer: of PyTorch or structured; it is run in evaluation mode, one call a time.
        batches: what it is called with: an input, or a tuple of an input and initial states.

    Returns:
        By the names of the matrices (``"ih_l0"``, ``"hh_l0"``, ...), (in, in) each: what ``from_lstm`` and its kin
        take as ``second_moments``.

    Raises:
        DataError: there is no batch.
    """
    twin = _twin(layer)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def counting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].detach().flatten(0, -2).to(torch.float64)
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    names = dict.fromkeys(twin.torch_names().values())
    hooks = [twin.get_submodule(name).register_forward_pre_hook(counting(name)) for name in names]
    was_training = twin.training
    try:
        with torch.no_grad():
            twin.eval()
            for batch in batches:
                twin(*batch) if type(batch) is tuple else twin(batch)
    finally:
        twin.train(was_training)
        for hook in hooks:
            hook.remove()
    if not counts:
        raise DataError("No batch was given: second moments of 0 inputs are unknown. Give at least one.")
    return {name: total / counts[name] for name, total in sums.items()}


def _twin(layer: nn.Module) -> Recurrent:
    """A layer with the same outputs whose matrices are modules, so that what they are given can be seen."""
    if isinstance(layer, Recurrent):
        return layer
    if isinstance(layer, nn.LSTM):
        return StructuredLSTM.from_lstm(layer, Dense())
    if isinstance(layer, nn.GRU):
        return StructuredGRU.from_gru(layer, Dense())
    assert isinstance(layer, nn.RNN), f"no recurrent layer: {type(layer).__name__}"
    return StructuredRNN.from_rnn(layer, Dense())
