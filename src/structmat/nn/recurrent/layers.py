"""The structured counterparts of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self, cast, final

import torch
from torch import Tensor, nn

from structmat.errors import StructureError
from structmat.nn.recurrent.base import Recurrent
from structmat.nn.recurrent.cells import ElmanCell, GRUCell, LSTMCell
from structmat.nn.recurrent.options import Options
from structmat.projection.project import DEFAULT_SWEEPS
from structmat.structure import Structure


@final
class StructuredLSTM(Recurrent):
    """``nn.LSTM`` with structured matrices: the same arguments, inputs, outputs and states.

    The inputs of all times are multiplied in one product, the state in one call a time; a step costs the operations of
    the two structures and about 10 a gate.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size: as of ``nn.LSTM``.
        structure: of the matrices of the state. Stacked (the default), the gates are one matrix (4 hidden, state), as
            PyTorch stores them: they share what the structure shares, such as the row space of low rank. Per gate,
            each has a member (hidden, state) of its own: right for structures whose rows read certain columns only,
            such as :class:`~structmat.BlockDiagonal`, where a stacked member would show each gate another part of the
            state. Either is one product.
        input_structure: of the matrices of the input, (4 hidden, inputs); that of the state if None. Fractions are
            resolved for each matrix, so that they have sizes of their own.
        projection_structure: of the projection, (proj_size, hidden); that of the state if None.
        per_gate: whether each gate has matrices of its own.
        device, dtype: of the parameters; ``meta`` is allowed.
        generator: source of randomness of the initialisation, which has the variance of PyTorch's.

    Raises:
        ShapeError: a size is none, or a structure refuses a shape.
        StructureError: an option has no legal value, or the dtype is complex.
    """

    torch_class = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        structure: Structure,
        input_structure: Structure | None = None,
        projection_structure: Structure | None = None,
        per_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            LSTMCell(),
            Options(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size),
            structure=structure,
            input_structure=input_structure,
            projection_structure=projection_structure,
            per_gate=per_gate,
            device=device,
            dtype=dtype,
            generator=generator,
        )

    @classmethod
    def from_lstm(
        cls,
        lstm: nn.LSTM,
        structure: Structure,
        *,
        input_structure: Structure | None = None,
        projection_structure: Structure | None = None,
        per_gate: bool = False,
        second_moments: Mapping[str, Tensor] | None = None,
        sweeps: int = DEFAULT_SWEEPS,
        seed: int = 0,
    ) -> Self:
        """The layer whose matrices are the projections of an LSTM's; see :meth:`Recurrent.load_torch_state_dict`."""
        return cls._from_torch(
            lstm,
            structure,
            input_structure=input_structure,
            per_gate=per_gate,
            second_moments=second_moments,
            sweeps=sweeps,
            seed=seed,
            projection_structure=projection_structure,
            proj_size=getattr(lstm, "proj_size", 0),
        )

    def to_lstm(self) -> nn.LSTM:
        """The dense layer with the same outputs."""
        return cast(nn.LSTM, self._to_torch(proj_size=self.options.proj_size))


@final
class StructuredGRU(Recurrent):
    """``nn.GRU`` with structured matrices: the same arguments, inputs, outputs and states.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as of ``nn.GRU``.
        structure, input_structure, per_gate: as of :class:`StructuredLSTM`, with three gates.
        device, dtype, generator: as of :class:`StructuredLSTM`.

    Raises:
        ShapeError: a size is none, or a structure refuses a shape.
        StructureError: an option has no legal value, or the dtype is complex.
    """

    torch_class = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        structure: Structure,
        input_structure: Structure | None = None,
        per_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            GRUCell(),
            Options(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            structure=structure,
            input_structure=input_structure,
            projection_structure=None,
            per_gate=per_gate,
            device=device,
            dtype=dtype,
            generator=generator,
        )

    @classmethod
    def from_gru(
        cls,
        gru: nn.GRU,
        structure: Structure,
        *,
        input_structure: Structure | None = None,
        per_gate: bool = False,
        second_moments: Mapping[str, Tensor] | None = None,
        sweeps: int = DEFAULT_SWEEPS,
        seed: int = 0,
    ) -> Self:
        """The layer whose matrices are the projections of a GRU's; see :meth:`Recurrent.load_torch_state_dict`."""
        return cls._from_torch(
            gru,
            structure,
            input_structure=input_structure,
            per_gate=per_gate,
            second_moments=second_moments,
            sweeps=sweeps,
            seed=seed,
        )

    def to_gru(self) -> nn.GRU:
        """The dense layer with the same outputs."""
        return cast(nn.GRU, self._to_torch())


@final
class StructuredRNN(Recurrent):
    """``nn.RNN`` with structured matrices: the same arguments, inputs, outputs and states.

    Args:
        input_size, hidden_size, num_layers: as of ``nn.RNN``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias, batch_first, dropout, bidirectional: as of ``nn.RNN``.
        structure, input_structure: as of :class:`StructuredLSTM`; there is one gate.
        device, dtype, generator: as of :class:`StructuredLSTM`.

    Raises:
        ShapeError: a size is none, or a structure refuses a shape.
        StructureError: an option has no legal value, or the dtype is complex.
    """

    torch_class = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        structure: Structure,
        input_structure: Structure | None = None,
        per_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise StructureError(f"nonlinearity={nonlinearity!r} is unknown. Use 'tanh' or 'relu'.")
        super().__init__(
            ElmanCell(nonlinearity == "relu"),
            Options(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            structure=structure,
            input_structure=input_structure,
            projection_structure=None,
            per_gate=per_gate,
            device=device,
            dtype=dtype,
            generator=generator,
        )

    @classmethod
    def from_rnn(
        cls,
        rnn: nn.RNN,
        structure: Structure,
        *,
        input_structure: Structure | None = None,
        second_moments: Mapping[str, Tensor] | None = None,
        sweeps: int = DEFAULT_SWEEPS,
        seed: int = 0,
    ) -> Self:
        """The layer whose matrices are the projections of an RNN's; see :meth:`Recurrent.load_torch_state_dict`."""
        return cls._from_torch(
            rnn,
            structure,
            input_structure=input_structure,
            per_gate=False,
            second_moments=second_moments,
            sweeps=sweeps,
            seed=seed,
            nonlinearity=getattr(rnn, "nonlinearity", "tanh"),
        )

    def to_rnn(self) -> nn.RNN:
        """The dense layer with the same outputs."""
        return cast(nn.RNN, self._to_torch(nonlinearity=self.nonlinearity))
