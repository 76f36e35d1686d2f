"""SimNets: similarity layers and the MEX operator. A ConvAC in log space is one.

Source: Cohen, Sharir and Shashua, "Deep SimNets", CVPR 2016.
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError, StructureError


class Kind(enum.StrEnum):
    """What a similarity is made of, per coordinate, with weight u and template z."""

    LINEAR = "linear"
    """``u x z``"""
    L1 = "l1"
    """``-u |x - z|``"""
    L2 = "l2"
    """``-u (x - z)^2``"""


class Similarity(nn.Module):
    """Similarity of patches (batch, size, N) to M templates, (batch, M, N). NaN coordinates contribute exactly 0.

    With ``normalized`` (L2 only) it is the log density of a diagonal Gaussian of precision u, each coordinate
    ``(-u (x - z)^2 + log(u + fudge) - log 2 pi) / 2``; note the factor 1/2, which the plain form has not.

    Args:
        size: numbers of a patch.
        channels: M.
        kind: see :class:`Kind`.
        normalized: as above.
        fudge: added to the precision inside the logarithm.

    Raises:
        StructureError: ``normalized`` with another kind than L2.
    """

    def __init__(
        self, size: int, channels: int, kind: Kind | str = Kind.L2, *, normalized: bool = False, fudge: float = 1e-3
    ) -> None:
        super().__init__()
        self.channels, self.kind, self.normalized, self.fudge = channels, Kind(kind), normalized, fudge
        self.logarithm = self.kind is not Kind.LINEAR
        if normalized and self.kind is not Kind.L2:
            raise StructureError(f"Only the L2 similarity is a log density; got kind={self.kind.value!r} normalized.")
        self.templates = nn.Parameter(torch.randn(channels, size))
        self.log_weights = nn.Parameter(torch.zeros(channels, size))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.dim() != 3 or x.shape[1] != self.templates.shape[1]:
            raise ShapeError(f"Patches have shape (batch, {self.templates.shape[1]}, N) here; got {tuple(x.shape)}.")
        seen = ~x.isnan()
        x = torch.where(seen, x, 0.0)
        observed, weights, templates = seen.to(x.dtype), self.log_weights.exp(), self.templates
        if self.kind is Kind.LINEAR:
            return (weights * templates) @ x
        if self.kind is Kind.L1:
            distance = (x[:, None] - templates[:, :, None]).abs() * observed[:, None]
            return -torch.einsum("ds,bdsn->bdn", weights, distance)
        square = weights @ x.square() - 2 * (weights * templates) @ x + (weights * templates.square()) @ observed
        if not self.normalized:
            return -square
        return 0.5 * (((weights + self.fudge).log() - math.log(2 * math.pi)) @ observed - square)


SERIES = 1e-3
"""Below this range of ``beta * c`` the logarithm cancels, and two terms of the series are exact to rounding."""


def mex(values: Tensor, beta: Tensor | float, *, softmax: bool = False, dim: int = 0) -> Tensor:
    """``(1 / beta) log( mean_i exp(beta c_i) )`` over one axis.

    Maximum for ``beta`` to infinity, mean at 0, minimum to minus infinity, all of which may be given; non-decreasing in
    ``beta``. A constant added to the values is added to the result, and MEX of MEX over groups of one size is MEX over
    all.

    Args:
        values: any shape; -inf allowed for positive ``beta``.
        beta: a number, or a tensor () that may be learned.
        softmax: the sum in place of the mean; then ``beta`` = 0 has no limit.
        dim: the axis.

    Raises:
        StructureError: ``beta`` = 0 with ``softmax``.
    """
    count = values.shape[dim]
    number = float(beta.detach()) if isinstance(beta, Tensor) else float(beta)
    if math.isinf(number):
        return values.amax(dim) if number > 0 else values.amin(dim)
    if number == 0 and softmax:
        raise StructureError("beta=0 with softmax=True is log(n) / 0, which has no limit. Use softmax=False: the mean.")
    top = values.detach().amax(dim, keepdim=True) if number >= 0 else values.detach().amin(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    shifted = values - top
    spread = float((shifted.detach() * number).abs().amax()) if count else 0.0
    if spread < SERIES and not softmax:
        mean = shifted.mean(dim, keepdim=True)
        variance = (shifted - mean).square().mean(dim)
        third = (shifted - mean).pow(3).mean(dim)
        return top.squeeze(dim) + mean.squeeze(dim) + beta * variance / 2 + beta * beta * third / 6
    total = (beta * shifted).exp().sum(dim) if softmax else (beta * shifted).exp().mean(dim)
    positive = total > 0
    log = torch.where(positive, torch.where(positive, total, 1.0).log(), -torch.inf)
    return top.squeeze(dim) + log / beta


class MEX(nn.Module):
    """``out(g) = MEX_beta over i of (in(i) + b_gi)``: what a convolution is in log space.

    With ``beta = 1``, ``softmax`` and ``b`` the logarithms of the weights it is exactly that. States as in a network:
    (in, locations, batch) to (out, locations, batch).

    Args:
        shape: (out, in).
        beta: the start, any real or infinite number.
        learned_beta: whether it is a parameter.
        softmax: sum in place of mean.
        normalized: offsets are the log-softmax of free parameters: rows that are distributions.

    Raises:
        StructureError: an infinite beta can't be learned.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        beta: float = 1.0,
        *,
        learned_beta: bool = False,
        softmax: bool = False,
        normalized: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if learned_beta and not math.isfinite(beta):
            raise StructureError(f"beta={beta} is a limit and can't be learned. Start from a finite number.")
        self.softmax, self.normalized = softmax, normalized
        self.beta = nn.Parameter(torch.tensor(float(beta), dtype=dtype), requires_grad=learned_beta)
        # Uniform in -1..1: weights within a factor of e of one, near averages.
        self.offsets = nn.Parameter(torch.rand(shape, dtype=dtype) * 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.shape[0] != self.offsets.shape[1]:
            raise ShapeError(f"The layer reads {self.offsets.shape[1]} channels; got shape {tuple(x.shape)}.")
        offsets = self.offsets.log_softmax(1) if self.normalized else self.offsets
        shaped = offsets.reshape(*offsets.shape, *(1,) * (x.dim() - 1))
        return mex(x.unsqueeze(0) + shaped, self.beta, softmax=self.softmax, dim=1)
