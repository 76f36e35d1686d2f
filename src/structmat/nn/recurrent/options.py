"""The sizes and switches of a recurrent layer, checked, and the names of its matrices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from structmat.errors import ShapeError, StructureError
from structmat.structure import Shape


@dataclass(frozen=True)
class Options:
    """What PyTorch's recurrent layers are made with, structures apart.

    Args:
        input_size: numbers of an input at one time.
        hidden_size: numbers of a gate.
        num_layers: one on top of the other.
        bias: whether matrices add vectors.
        batch_first: whether the batch is the first axis of inputs and outputs.
        dropout: probability, between layers, in training.
        bidirectional: whether each layer reads the sequence backwards as well.
        proj_size: numbers of the output if it is projected (LSTM only), else 0.

    Raises:
        ShapeError: a size is none.
        StructureError: a switch or the probability has no legal value.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "num_layers"):
            size: object = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ShapeError(f"{name}={size!r} is no size. Use an integer of at least 1.")
        for name in ("bias", "batch_first", "bidirectional"):
            switch: object = getattr(self, name)
            if not isinstance(switch, bool):
                raise StructureError(f"{name}={switch!r} is a {type(switch).__name__}. Use True or False.")
        if isinstance(self.dropout, bool) or not 0 <= self.dropout <= 1:
            raise StructureError(f"dropout={self.dropout!r} is no probability. Use a number from 0 to 1.")
        if not 0 <= self.proj_size < self.hidden_size:
            raise ShapeError(
                f"proj_size={self.proj_size} with hidden_size={self.hidden_size}: a projection makes states smaller. "
                f"Use 1 to {self.hidden_size - 1}, or 0 for none."
            )
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(
                f"dropout={self.dropout} acts between layers, and there is one layer: it does nothing. "
                "Use more layers or dropout=0.",
                stacklevel=4,
            )

    @property
    def directions(self) -> int:
        """2 if each layer reads the sequence backwards as well, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def state_size(self) -> int:
        """Numbers that a direction puts out at a time."""
        return self.proj_size or self.hidden_size

    def inputs_of(self, layer: int) -> int:
        """Numbers that a layer reads at a time."""
        return self.input_size if layer == 0 else self.directions * self.state_size

    def runs(self) -> Iterator[tuple[int, str]]:
        """Layer and suffix of names, such as ``(0, "_l0_reverse")``, of every direction, in the order of the states."""
        for layer in range(self.num_layers):
            for ending in ("", "_reverse")[: self.directions]:
                yield layer, f"_l{layer}{ending}"

    @cached_property
    def suffixes(self) -> tuple[tuple[str, ...], ...]:
        """The suffixes of the names, by layer and direction."""
        found: list[tuple[str, ...]] = [()] * self.num_layers
        for layer, suffix in self.runs():
            found[layer] = (*found[layer], suffix)
        return tuple(found)

    def shapes(self, gates: int) -> Iterator[tuple[str, Shape, bool]]:
        """Name, shape and whether it has a bias of every matrix: ``ih_l0``, ``hh_l0``, ``hr_l0`` and so on.

        PyTorch's names are ``weight_ih_l0`` and ``bias_ih_l0`` for what is ``ih_l0`` here.
        """
        for layer, suffix in self.runs():
            yield f"ih{suffix}", (gates * self.hidden_size, self.inputs_of(layer)), self.bias
            yield f"hh{suffix}", (gates * self.hidden_size, self.state_size), self.bias
            if self.proj_size:
                yield f"hr{suffix}", (self.proj_size, self.hidden_size), False
