"""Inputs and states as a recurrent layer is given them, checked and brought to one form, and outputs brought back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from structmat.errors import ShapeError
from structmat.nn.recurrent.cells import State
from structmat.nn.recurrent.options import Options

Given = Tensor | tuple[Tensor, ...] | None
"""States as the caller gives them: one tensor, or hidden and memory."""


@dataclass(frozen=True)
class Sequences:
    """What a layer is given, time first.

    Args:
        x: (times, rows, inputs), or (all rows, inputs) if packed.
        sizes: rows at each time if packed and not equally long.
        rows: how many sequences there are.
        packed: the given sequences if they were packed.
        is_single: whether a single sequence was given, without a batch axis.
        is_batch_first: whether outputs have the batch first.
    """

    x: Tensor
    sizes: list[int] | None
    rows: int
    packed: PackedSequence | None
    is_single: bool
    is_batch_first: bool

    def states(self, options: Options, given: Given, has_memory: bool) -> State:
        """Checked initial states (layers * directions, rows, size), in the order of the rows; zero if not given."""
        count = options.num_layers * options.directions
        widths = (options.state_size, options.hidden_size) if has_memory else (options.state_size,)
        shapes = [(count, self.rows, width) for width in widths]
        if given is None:
            return tuple(self.x.new_zeros(shape) for shape in shapes)
        parts = (given,) if isinstance(given, Tensor) else tuple(given)
        if len(parts) != len(widths):
            raise ShapeError(
                f"The state of this layer has {len(widths)} parts; got {len(parts)}. "
                f"Give {'a pair (h, c)' if has_memory else 'one tensor'}."
            )
        wanted = [(count, width) for count, _, width in shapes] if self.is_single else shapes
        for name, part, shape in zip("hc", parts, wanted, strict=False):
            if tuple(part.shape) != shape:
                raise ShapeError(
                    f"The initial state {name} has shape {tuple(part.shape)}; it must have {shape}: layers times "
                    f"directions, {'' if self.is_single else 'batch, '}size."
                )
        if self.is_single:
            return tuple(part.unsqueeze(1).contiguous() for part in parts)
        if self.packed is not None and self.packed.sorted_indices is not None:
            return tuple(part.index_select(1, self.packed.sorted_indices) for part in parts)
        return tuple(part.contiguous() for part in parts)

    def outputs(self, y: Tensor) -> Tensor | PackedSequence:
        """The outputs in the form of what was given."""
        if self.packed is not None:
            y = y.flatten(0, 1) if self.sizes is None else y
            return PackedSequence(y, self.packed.batch_sizes, self.packed.sorted_indices, self.packed.unsorted_indices)
        if self.is_single:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.is_batch_first else y

    def last_states(self, state: State) -> State:
        """The last states (layers * directions, rows, size) in the form and order of what was given."""
        if self.is_single:
            return tuple(part.squeeze(1) for part in state)
        if self.packed is not None and self.packed.unsorted_indices is not None:
            return tuple(part.index_select(1, self.packed.unsorted_indices) for part in state)
        return state


def sequences(x: Tensor | PackedSequence, options: Options) -> Sequences:
    """Bring an input to one form.

    Raises:
        ShapeError: it has another number of axes or of inputs, or no time at all.
    """
    if isinstance(x, PackedSequence):
        sizes = x.batch_sizes.tolist()
        _check_width(x.data, options)
        if sizes[-1] == sizes[0]:  # as long as each other
            return Sequences(x.data.unflatten(0, (len(sizes), sizes[0])), None, sizes[0], x, False, False)
        return Sequences(x.data, sizes, sizes[0], x, False, False)
    axes = x.dim()
    if axes not in (2, 3):
        raise ShapeError(
            f"The input has {axes} axes, shape {tuple(x.shape)}. Give (time, {options.input_size}), or three axes with "
            f"the batch {'first' if options.batch_first else 'second'}."
        )
    _check_width(x, options)
    is_first = options.batch_first and axes == 3
    x = x.unsqueeze(1) if axes == 2 else x.transpose(0, 1) if is_first else x
    if x.shape[0] == 0:
        raise ShapeError("The input has no time: its sequences have length 0. Give at least 1.")
    # The outcome for a time is read as a whole: then its rows shall lie together.
    return Sequences(x.contiguous(), None, x.shape[1], None, axes == 2, is_first)


def _check_width(x: Tensor, options: Options) -> None:
    if x.shape[-1] != options.input_size:
        raise ShapeError(
            f"The input has shape {tuple(x.shape)}; its last axis must hold input_size={options.input_size} numbers."
        )


def stack_states(states: list[State]) -> State:
    """The states of all directions, one tensor a part, that shares no memory with outputs."""
    return tuple(torch.stack(parts) for parts in zip(*states, strict=True))
