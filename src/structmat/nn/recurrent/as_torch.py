"""What the code around a recurrent layer of PyTorch reads of it and calls beside ``forward``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from structmat.nn.recurrent.cells import ElmanCell
from structmat.nn.recurrent.options import Options

OPTIONS = tuple(field.name for field in fields(Options))
"""PyTorch's names of what a layer is made with, in its order."""


class AsTorch(nn.Module):
    """A module with the options of a recurrent layer as attributes; not made by itself."""

    cell: Any
    options: Options

    def __getattr__(self, name: str) -> Any:
        if name in OPTIONS and "options" in self.__dict__:
            return getattr(self.options, name)
        if name == "nonlinearity" and isinstance(self.__dict__.get("cell"), ElmanCell):
            return "relu" if self.cell.is_rectified else "tanh"
        return super().__getattr__(name)

    def flatten_parameters(self) -> None:
        """Does nothing: matrices that are layers of their own are in no memory together."""
