"""The form of recurrent layers for deployment."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from structmat.nn.linear import FrozenLinear
from structmat.nn.recurrent.as_torch import AsTorch
from structmat.nn.recurrent.cells import Cell, State
from structmat.nn.recurrent.options import Options
from structmat.nn.recurrent.run import run_layers
from structmat.nn.recurrent.sequences import Given


class FrozenRecurrent(AsTorch):
    """A recurrent layer with fixed tensors: what ``freeze`` of a structured one returns. Called like that one.

    Args:
        cell: the equations.
        options: the sizes.
        matrices: by the names of the layer that was frozen.
    """

    def __init__(self, cell: Cell, options: Options, matrices: Mapping[str, FrozenLinear]) -> None:
        super().__init__()
        self.cell, self.options = cell, options
        for name, layer in matrices.items():
            self.add_module(name, layer)
        self.eval()

    def forward(
        self, input: Tensor | PackedSequence, hx: Given = None
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        """Outputs and last states, as PyTorch's layer returns them."""
        y, state = run_layers(self, self.cell, self.options, input, hx)
        return y, as_returned(state)

    def extra_repr(self) -> str:
        return f"{type(self.cell).__name__}, {self.options}"


def as_returned(state: State) -> Tensor | tuple[Tensor, Tensor]:
    """One tensor, or a pair for an LSTM."""
    return state[0] if len(state) == 1 else (state[0], state[1])
