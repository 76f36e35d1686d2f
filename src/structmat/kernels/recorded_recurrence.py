"""All times of a recurrent net in one native call, and the way back in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.kernels.choice import possible_text
from structmat.kernels.gradient import gradients
from structmat.kernels.operator import arguments, kept_recurrence, recurrence_back
from structmat.kernels.plainly import plainly
from structmat.kernels.recurrence import BACKWARDS, NativeCell, makes_states
from structmat.kernels.text import Text, transposed_text
from structmat.program import Program

_KEPT = {NativeCell.LSTM: 5, NativeCell.GRU: 4}
"""Numbers that are kept for each of a state's, for the way back (``kept_of`` in the library)."""


@dataclass(frozen=True)
class Recorded:
    """How all times of a direction are made so that there is a way back, see :func:`recordable`.

    Args:
        cell, backwards: as of :func:`structmat.kernels.recurrence.recur`.
        program, text, biased: what multiplies the state, as the native backend reads it, and whether a bias is added.
    """

    cell: NativeCell
    backwards: bool
    program: Program
    text: Text
    biased: bool

    def forward(
        self, gates: Tensor, state: tuple[Tensor, ...], given: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The outputs, the last memory of an LSTM, and for the way back all states (times + 1, rows, size) and what the
        library keeps. Outputs share no memory with the states: they may be written over.

        Args:
            gates, state: as of :func:`structmat.kernels.recurrence.recur`.
            given: the tensors of the text, contiguous, and the bias.
        """
        gates = gates.contiguous()
        times, rows, size = *gates.shape[:2], state[0].shape[-1]
        y, kept = gates.new_empty(times, rows, size), gates.new_empty(times, rows, _KEPT.get(self.cell, 0) * size)
        start = state[0].contiguous()
        memory = state[1].clone(memory_format=torch.contiguous_format) if self.has_memory else gates.new_empty(0)
        call = kept_recurrence()
        assert call is not None, "asked by `recordable`"
        words = self.text.biased if self.biased else self.text.plain
        call(gates, start, memory, y, kept, given, words, self._kind)
        parts = (y, start.unsqueeze(0)) if self.backwards else (start.unsqueeze(0), y)
        return y, memory if self.has_memory else None, torch.cat(parts), kept

    def backward(
        self,
        states: Tensor,
        kept: Tensor,
        memory: Tensor | None,
        given: list[Tensor],
        grads: tuple[Tensor, ...],
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the gates, of each part of the state before, and of the tensors.

        Args:
            states, kept: what :meth:`forward` returned.
            memory: before, of an LSTM.
            given: as of :meth:`forward`.
            grads: of the states after each time and, for an LSTM, of the last memory.
            wanted: of which tensors.
        """
        times, rows, size = kept.shape[0], kept.shape[1], states.shape[-1]
        before, after = (states[1:], states[:-1]) if self.backwards else (states[:-1], states[1:])
        none = states.new_empty(0)
        of_states = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        of_memory = none if memory is None else grads[1].clone(memory_format=torch.contiguous_format)
        of_gates = states.new_empty(times, rows, self.program.out_features)
        of_products = torch.empty_like(of_gates) if self.cell is NativeCell.GRU else none
        of_start = states.new_empty(rows, size)
        text = transposed_text(self.program)
        assert isinstance(text, Text), "asked by `recordable`"
        recurrence_back()(
            kept, states[-1 if self.backwards else 0], none if memory is None else memory.contiguous(), after,
            of_states, of_memory, of_gates, of_products, of_start,
            arguments(text, dict(zip(self.text.names, given, strict=False)), None), text.plain, self._kind,
        )  # fmt: skip
        products = of_products if self.cell is NativeCell.GRU else of_gates
        of_tensors = gradients(self.text, self.biased, before.flatten(0, 1), given, products.flatten(0, 1), wanted)
        return of_gates, of_start, *(() if memory is None else (of_memory,)), *of_tensors

    @property
    def has_memory(self) -> bool:
        """Whether the state has a second part."""
        return self.cell is NativeCell.LSTM

    @property
    def _kind(self) -> int:
        return self.cell + BACKWARDS * self.backwards


def recordable(
    cell: NativeCell,
    program: Program,
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
    gates: Tensor,
    state: tuple[Tensor, ...],
    *,
    backwards: bool,
) -> tuple[Recorded, list[Tensor]] | None:
    """How the native backend makes all times of a direction with gradients, in one call each way, and the tensors that
    it reads; None where it has no kernel for it.

    Args: as of :func:`structmat.kernels.recurrence.recur`.

    Raises:
        StructureError: the native backend is forced, and can't multiply by the program.
    """
    hidden = state[0]
    if not makes_states(*state, gates):
        return None
    program, tensors = plainly(program, tensors, hidden, bias)
    text = possible_text(program, tensors, hidden, bias)
    if text is None or isinstance(transposed_text(program), str) or kept_recurrence() is None:
        return None
    return Recorded(cell, backwards, program, text, bias is not None), arguments(text, tensors, bias)
