"""Recurrent form: a general tensor-train as a network that reads one input at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError
from structmat.nn.convac.formats import TensorTrain
from structmat.nn.convac.semiring import Plain, Scaled, Semiring, Signed, State, select


class RecurrentConvAC(nn.Module):
    """``h_t[b] = sum G_t[a, d, b] h_{t-1}[a] rep(t, d)``, the score a linear function of the last state.

    With shared cores it takes sequences of any length; generic tensor-trains of rank r have CP rank at least
    ``min(M, r)^(N/2)`` (Khrulkov, Novikov and Oseledets, ICLR 2018). The restricted form with one matrix for the state
    and one for the input is a :class:`ConvAC` on ``ModeTree.chain(N)`` with ``sharing="recurrent"``.

    Args:
        representation: as for :class:`ConvAC`; ``None``: the input is (batch, M, N).
        width: r.
        outputs: Y.
        channels: M, if there is no representation.
        modes: ``None`` for cores that are shared by all steps, or the number N of steps with cores of their own.
        semiring: `Plain` or `Scaled`.
        generator: of the start: near the identity, plus deviations of 1 / sqrt(M r), so that long products neither
            vanish nor forget.

    Raises:
        ShapeError: no channels are given, or a semiring that these weights do not fit.
    """

    def __init__(
        self,
        representation: nn.Module | None,
        width: int,
        outputs: int = 1,
        *,
        channels: int | None = None,
        modes: int | None = None,
        semiring: Semiring = Scaled(),  # noqa: B008 - a frozen value
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        found = getattr(representation, "channels", channels)
        if not isinstance(found, int) or found < 1 or width < 1 or outputs < 1:
            raise ShapeError(
                f"A recurrent network needs channels, width and outputs of at least 1; got {found}, {width}, {outputs}."
            )
        if not isinstance(semiring, Plain | Scaled):
            raise ShapeError(
                f"A recurrent network has signed cores; it runs in Plain() or Scaled(), not in {semiring}."
            )
        self.representation, self.channels, self.width, self.modes = representation, found, width, modes
        self.semiring = semiring
        noise = torch.randn(modes or 1, width, found, width, generator=generator, dtype=dtype)
        start = torch.eye(width, dtype=noise.dtype).unsqueeze(1) / found
        self.cores = nn.Parameter(start + noise * (found * width) ** -0.5 / found)
        self.first = nn.Parameter(torch.ones(width, dtype=noise.dtype))
        self.last = nn.Parameter(torch.randn(outputs, width, generator=generator, dtype=noise.dtype) * width**-0.5)

    def root(self, x: Tensor) -> State:
        """The outputs as a state, value (Y, 1, batch)."""
        values = x if self.representation is None else self.representation(x)
        if values.dim() != 3 or values.shape[1] != self.channels or self.modes not in (None, values.shape[2]):
            steps = "any length" if self.modes is None else f"length {self.modes}"
            raise ShapeError(
                f"The network reads (batch, {self.channels}, {steps}); the representation has shape "
                f"{tuple(values.shape)}."
            )
        logarithm = bool(getattr(self.representation, "logarithm", False))
        leaves = self.semiring.lift(values.permute(1, 2, 0), logarithm=logarithm)
        ones = self.first[:, None, None].expand(-1, 1, values.shape[0])
        state = self.semiring.lift(ones, logarithm=False)
        for step in range(values.shape[2]):
            leaf = select(leaves, slice(step, step + 1))
            core = self.cores[step if self.modes else 0]
            moved = torch.einsum("adb,anx,dnx->bnx", core, state.value, leaf.value)
            scale = None if state.scale is None or leaf.scale is None else state.scale + leaf.scale
            state = self.semiring.rescale(State(moved, scale))
        return State(torch.einsum("yb,bnx->ynx", self.last, state.value), state.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (batch, Y)."""
        return self.semiring.values(self.root(x)).squeeze(1).T

    def signed_log(self, x: Tensor) -> Signed:
        """Sign and logarithm of the scores, (batch, Y) each."""
        sign, log = self.semiring.lower(self.root(x))
        return Signed(sign.squeeze(1).T, log.squeeze(1).T)

    def to_tensor_train(self, modes: int | None = None, output: int = 0) -> TensorTrain:
        """The coefficient tensor of N inputs.

        Raises:
            ShapeError: shared cores, and ``modes`` is not given; or cores for another number.
        """
        count = self.modes if modes is None else modes
        if count is None or self.modes not in (None, count):
            raise ShapeError(f"The cores are for {self.modes or 'any number of'} modes; got modes={modes}.")
        cores = [self.cores[i if self.modes else 0] for i in range(count)]
        cores[0] = torch.einsum("a,adb->db", self.first, cores[0]).unsqueeze(0)
        cores[-1] = cores[-1] @ self.last[output].unsqueeze(-1)
        return TensorTrain(tuple(cores))
