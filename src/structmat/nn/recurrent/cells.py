"""What happens at one time: how the gates of an LSTM, a GRU and a plain recurrent net make the next state.

Each cell has two forms of the same equations: ``step``, made of operations that can be differentiated, and ``loop``,
which writes into memory that is used again at each time. Gates come in PyTorch's order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.kernels import Product
from structmat.kernels.recurrence import NativeCell

State = tuple[Tensor, ...]
"""Of one direction: (hidden,) or, for an LSTM, (hidden, memory)."""


class Cell(ABC):
    """The equations of one kind of recurrent net. Subclasses are frozen dataclasses and final."""

    gates: tuple[str, ...]
    """Names in the order of the outputs of the matrices."""

    has_memory: bool = False
    """Whether the state has a second part, that no matrix reads."""

    adds_biases: bool = True
    """Whether the two biases are only ever used as their sum."""

    @property
    @abstractmethod
    def native(self) -> NativeCell:
        """The same equations in the native backend."""

    @abstractmethod
    def step(self, x: Tensor, s: Tensor, state: State) -> State:
        """The next state (before a projection).

        Args:
            x, s: what the input's and the state's matrix put out, (rows, gates * hidden).
            state: before.
        """

    @abstractmethod
    def loop(self, x: Tensor, product: Product, projection: Product | None, state: State, y: Sequence[Tensor]) -> State:
        """All times in turn, without gradients.

        Args:
            x: what the input's matrix puts out, (times, rows, gates * hidden), in the order of reading.
            product: by the state's matrix.
            projection: of the output, or None.
            state: before; not changed.
            y: where the outputs are written, (rows, state size) for each time.

        Returns:
            The last state; its hidden part is the last of ``y``.
        """


@dataclass(frozen=True)
class LSTMCell(Cell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997), with forget gates and optionally a projection."""

    gates = ("i", "f", "g", "o")
    has_memory = True
    native = NativeCell.LSTM

    def step(self, x: Tensor, s: Tensor, state: State) -> State:
        before = x + s
        size = before.shape[-1] // 4
        # Few operations: for one sequence each takes as long to call as to do.
        i, f, _, o = torch.sigmoid(before).chunk(4, -1)
        memory = torch.addcmul(i * torch.tanh(before.narrow(-1, 2 * size, size)), f, state[1])
        return o * torch.tanh(memory), memory

    def loop(self, x: Tensor, product: Product, projection: Product | None, state: State, y: Sequence[Tensor]) -> State:
        hidden, memory = state[0], state[1].clone()
        size = memory.shape[-1]
        gates = x.new_empty(x.shape[1:])
        read, (i, f, g, o) = gates.narrow(-1, 0, 2 * size), gates.chunk(4, -1)
        squashed = torch.empty_like(memory)
        for now, out in zip(x.unbind(0), y, strict=True):
            torch.add(now, product(hidden), out=gates)
            read.sigmoid_()
            g.tanh_()
            o.sigmoid_()
            memory.mul_(f).addcmul_(i, g)
            torch.tanh(memory, out=squashed)
            hidden = torch.mul(o, squashed, out=out) if projection is None else out.copy_(projection(squashed.mul_(o)))
        return hidden, memory


@dataclass(frozen=True)
class GRUCell(Cell):
    """Gated recurrent unit (Cho et al. 2014), the reset gate applied after the product as in PyTorch."""

    gates = ("r", "z", "n")
    adds_biases = False
    native = NativeCell.GRU

    def step(self, x: Tensor, s: Tensor, state: State) -> State:
        hidden = state[0]
        size = hidden.shape[-1]
        gated, now = x.split_with_sizes((2 * size, size), -1)
        read, own = s.split_with_sizes((2 * size, size), -1)
        reset, update = torch.sigmoid(gated + read).chunk(2, -1)
        fresh = torch.tanh(torch.addcmul(now, reset, own))
        return (torch.lerp(fresh.to(hidden.dtype), hidden, update.to(hidden.dtype)),)

    def loop(self, x: Tensor, product: Product, projection: Product | None, state: State, y: Sequence[Tensor]) -> State:
        hidden = state[0]
        size = hidden.shape[-1]
        gates, fresh = x.new_empty(*x.shape[1:-1], 2 * size), x.new_empty(*x.shape[1:-1], size)
        reset, update = gates.chunk(2, -1)
        parts = (part.unbind(0) for part in x.split_with_sizes((2 * size, size), -1))
        for gated, now, out in zip(*parts, y, strict=True):
            read, own = product(hidden).split_with_sizes((2 * size, size), -1)
            torch.add(gated, read, out=gates).sigmoid_()
            torch.addcmul(now, reset, own, out=fresh).tanh_()
            hidden = torch.lerp(fresh, hidden, update, out=out)
        return (hidden,)


@dataclass(frozen=True)
class ElmanCell(Cell):
    """The plain recurrent net (Elman 1990).

    Args:
        is_rectified: whether negative numbers become zero, instead of the hyperbolic tangent of all.
    """

    is_rectified: bool = False

    gates = ("h",)

    @property
    def native(self) -> NativeCell:
        return NativeCell.RELU if self.is_rectified else NativeCell.TANH

    def step(self, x: Tensor, s: Tensor, state: State) -> State:
        return (torch.relu(x + s) if self.is_rectified else torch.tanh(x + s),)

    def loop(self, x: Tensor, product: Product, projection: Product | None, state: State, y: Sequence[Tensor]) -> State:
        hidden = state[0]
        for now, out in zip(x.unbind(0), y, strict=True):
            hidden = torch.add(now, product(hidden), out=out)
            if self.is_rectified:
                hidden.relu_()
            else:
                hidden.tanh_()
        return (hidden,)
