"""Semirings: how a network multiplies and adds. One algorithm runs in any of them.

A network calls nothing but :meth:`Semiring.lift`, :meth:`Semiring.linear`, :meth:`Semiring.multiply` and the readers
:meth:`Semiring.lower` and :meth:`Semiring.values`. States have the batch innermost: value (channels, locations, batch).

The score of N patches is homogeneous of degree N, so that with N = 1024 it leaves the range of float32 at once.
`Scaled` carries one power of two for each location and sample: every rescaling is exact, and what comes out is
bit-identical to `Plain` wherever that neither under- nor overflows. Source: Cohen, Sharir and Shashua, COLT 2016
(networks); the log form is that of their SimNets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from structmat.errors import DataError


class State(NamedTuple):
    """Values at all locations of a level.

    Args:
        value: (channels, locations, batch); what it means is the semiring's matter.
        scale: `Scaled`: exponents of two, integers (locations, batch). `SignedLog`: signs, of the shape of ``value``.
            ``None`` elsewhere.
    """

    value: Tensor
    scale: Tensor | None = None


class LinearMap(Protocol):
    """What a semiring needs to know of the weights of one layer."""

    def __call__(self, x: Tensor) -> Tensor:
        """(in channels, locations, batch) to (out channels, edges, batch), linear in ``x``."""

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same with weights divided by a power of two, exactly, so that the largest lies in [1, 2).

        The power is an integer (); ``None``, and the plain result, if it is not known cheaply.
        """

    def tropical(self, x: Tensor) -> Tensor:
        """The same with maximum for sum and sum for product: ``max_i (log w_gi + x_i)``."""


class Signed(NamedTuple):
    """A real number as sign (-1, 0, 1) and logarithm of the absolute value (-inf where the sign is 0)."""

    sign: Tensor
    log: Tensor


class Semiring(ABC):
    """One way to carry numbers through a network. Subclasses are frozen, hashable values."""

    allows_negative: bool = True
    """Whether weights may be negative. False: the network must be given a constraint."""

    @abstractmethod
    def lift(self, x: Tensor, *, logarithm: bool) -> State:
        """Representation values (channels, locations, batch), or their logarithms, as a state."""

    @abstractmethod
    def linear(self, weights: LinearMap, state: State, source: Tensor | None) -> State:
        """One 1 x 1 convolution; ``source`` (edges,) says which location an edge reads, ``None``: edge i reads i."""

    @abstractmethod
    def multiply(self, first: State, second: State) -> State:
        """Elementwise product."""

    @abstractmethod
    def unit(self, like: State, locations: int) -> State:
        """The value one at some locations."""

    @abstractmethod
    def lower(self, state: State) -> Signed:
        """Sign and logarithm."""

    def rescale(self, state: State) -> State:
        """The same number, stored with factors near one where the semiring can do so."""
        return state

    def values(self, state: State) -> Tensor:
        """Plain numbers; what they do not hold over- or underflows."""
        sign, log = self.lower(state)
        return sign * log.exp()

    def scores(self, state: State) -> Tensor:
        """What a network returns: plain numbers, or logarithms where these are the native form."""
        return self.values(state)


def select(state: State, places: Tensor | slice) -> State:
    """The locations ``places``."""
    scale = None if state.scale is None else state.scale[..., places, :]
    return State(state.value[:, places], scale)


def concatenate(states: list[State]) -> State:
    """Locations one after the other."""
    if len(states) == 1:
        return states[0]
    value = torch.cat([s.value for s in states], 1)
    scales = [s.scale for s in states if s.scale is not None]
    return State(value, torch.cat(scales, -2) if scales else None)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2 ** exponent``, exactly: written as bits (`torch.exp2` may be off by a bit). Normal exponents only."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32).to(dtype)


def shift(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2 ** exponent`` in two exact halves, so that subnormal numbers can be lifted too."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return x * power_of_two(half, x.dtype) * power_of_two(exponent - half, x.dtype)


def _as_values(x: Tensor, logarithm: bool) -> Tensor:
    return x.exp() if logarithm else x


def _signed(x: Tensor) -> Signed:
    magnitude = x.abs()
    positive = magnitude > 0
    log = torch.where(positive, torch.where(positive, magnitude, 1.0).log(), -torch.inf)
    return Signed(x.sign().detach(), log)


def _gather(x: Tensor, source: Tensor | None) -> Tensor:
    return x if source is None else x[..., source, :]


@dataclass(frozen=True)
class _Values(Semiring):
    """Numbers held as they are; what becomes of their size is left open."""

    def linear(self, weights: LinearMap, state: State, source: Tensor | None) -> State:
        return State(weights(state.value))

    def multiply(self, first: State, second: State) -> State:
        return State(first.value * second.value)

    def unit(self, like: State, locations: int) -> State:
        return State(like.value.new_ones(like.value.shape[0], locations, like.value.shape[2]))

    def lower(self, state: State) -> Signed:
        return _signed(state.value)

    def values(self, state: State) -> Tensor:
        return state.value


@final
@dataclass(frozen=True)
class Plain(_Values):
    """Ordinary arithmetic. For small networks and tests: over- and underflows beyond some tens of patches."""

    def lift(self, x: Tensor, *, logarithm: bool) -> State:
        return State(_as_values(x, logarithm))


@final
@dataclass(frozen=True)
class Scaled(Semiring):
    """``x = value * 2 ** scale`` with one integer for each location and sample. The default.

    Rescaling constants are treated as constants by autograd: the number does not depend on them, so that the gradient
    is exact, at zeros too.
    """

    def lift(self, x: Tensor, *, logarithm: bool) -> State:
        if logarithm:
            # Bring the largest channel to [1, 2) before the exponential, by a whole number of powers of two.
            top = x.detach().amax(0)
            steps = torch.where(top.isfinite(), top / torch.log(torch.tensor(2.0, dtype=x.dtype)), 0.0).floor()
            x = (x - (steps * torch.log(torch.tensor(2.0, dtype=x.dtype)))).exp()
            return self.rescale(State(x, steps.to(torch.int64)))
        return self.rescale(State(x, torch.zeros(x.shape[1:], dtype=torch.int64, device=x.device)))

    def linear(self, weights: LinearMap, state: State, source: Tensor | None) -> State:
        assert state.scale is not None
        # Weights far from one would take the products that follow out of range: their power of two goes into the scale.
        value, exponent = weights.scaled(state.value)
        if exponent is None:
            return self.rescale(State(value, _gather(state.scale, source)))
        return State(value, _gather(state.scale, source) + exponent)

    def multiply(self, first: State, second: State) -> State:
        assert first.scale is not None
        assert second.scale is not None
        return State(first.value * second.value, first.scale + second.scale)

    def unit(self, like: State, locations: int) -> State:
        value = like.value.new_ones(like.value.shape[0], locations, like.value.shape[2])
        return State(value, torch.zeros(locations, like.value.shape[2], dtype=torch.int64, device=value.device))

    def rescale(self, state: State) -> State:
        value, scale = state
        assert scale is not None
        with torch.no_grad():
            # Not torch.linalg.vector_norm(.., inf, 0): over the first axis it is thirty times slower than this.
            top = value.detach().abs().amax(0)
            exponent = torch.frexp(top if top.dtype == torch.float64 else top.float())[1] - 1
            # One exact factor: a subnormal number comes near one in two steps, which any later rescaling takes.
            limit = 1022 if top.dtype == torch.float64 else 126
            exponent = torch.where((top > 0) & top.isfinite(), exponent.clamp(-limit, limit), 0)
            factor = power_of_two(-exponent, value.dtype)
        return State(value * factor, scale + exponent)

    def lower(self, state: State) -> Signed:
        assert state.scale is not None
        sign, log = _signed(state.value)
        # In double precision: a float32 logarithm of size 1000 would spend its bits on the magnitude.
        return Signed(sign, log.double() + state.scale.double() * torch.log(torch.tensor(2.0, dtype=torch.float64)))

    def values(self, state: State) -> Tensor:
        assert state.scale is not None
        value = self.rescale(state)
        assert value.scale is not None
        bound = 2100 if value.value.dtype == torch.float64 else 290
        steps = value.scale.clamp(-bound, bound)
        # Several exact factors: one power of two of that size is not a number of the dtype.
        result, quarter = value.value, torch.div(steps, 4, rounding_mode="floor")
        for part in (quarter, quarter, quarter, steps - 3 * quarter):
            result = result * power_of_two(part, result.dtype)
        return result


@final
@dataclass(frozen=True)
class RootMeanSquare(_Values):
    """Values divided by their root mean square over channels after each product, and differentiated through it.

    All outputs of a sample are multiplied by one positive number, so that the class with the largest score stays the
    same, and the scores stay near one. This is what trains signed classifiers: the scale of a zero-mean product
    network is unstable, the deviation of its logarithm multiplies by the window at each level. Where all channels are 0
    they stay so.
    """

    def lift(self, x: Tensor, *, logarithm: bool) -> State:
        if logarithm:
            x = x - x.detach().amax(0, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
        return self.rescale(State(_as_values(x, logarithm)))

    def rescale(self, state: State) -> State:
        # A detached power-of-two first: the square of a float32 underflows long before the number does.
        top = state.value.detach().abs().amax(0, keepdim=True)
        value = state.value / torch.where(top > 0, top, 1.0)
        mean = value.square().mean(0, keepdim=True)
        return State(value * torch.where(mean > 0, mean, 1.0).rsqrt())


@dataclass(frozen=True)
class _Logarithms(Semiring):
    """Non-negative numbers held as logarithms; how they are summed is left open."""

    allows_negative = False

    def lift(self, x: Tensor, *, logarithm: bool) -> State:
        return State(x if logarithm else _log_of(x))

    def multiply(self, first: State, second: State) -> State:
        return State(first.value + second.value)

    def unit(self, like: State, locations: int) -> State:
        return State(like.value.new_zeros(like.value.shape[0], locations, like.value.shape[2]))

    def lower(self, state: State) -> Signed:
        return Signed(torch.where(state.value > -torch.inf, 1.0, 0.0).to(state.value.dtype), state.value)

    def scores(self, state: State) -> Tensor:
        return state.value


@final
@dataclass(frozen=True)
class Log(_Logarithms):
    """Logarithms of non-negative numbers, one for each channel. For generative networks and SimNets.

    A zero is ``-inf`` and takes the gradient zero, which is right in logarithmic coordinates.
    """

    def linear(self, weights: LinearMap, state: State, source: Tensor | None) -> State:
        top = _finite_top(state.value)
        total = weights((state.value - top).exp())
        top = _gather(top, source)
        positive = total > 0
        log = torch.where(positive, torch.where(positive, total, 1.0).log() + top, -torch.inf)
        return State(log)


@final
@dataclass(frozen=True)
class SignedLog(Semiring):
    """Sign and logarithm for each channel: signed weights with any spread between channels.

    The gradient through an exact zero is lost (it is finite in plain coordinates): it is set to zero.
    """

    def lift(self, x: Tensor, *, logarithm: bool) -> State:
        if logarithm:
            return State(x, (x > -torch.inf).to(x.dtype))
        sign, log = _signed(x)
        return State(log, sign)

    def linear(self, weights: LinearMap, state: State, source: Tensor | None) -> State:
        assert state.scale is not None
        top = _finite_top(state.value)
        total = weights(state.scale * (state.value - top).exp())
        sign, log = _signed(total)
        return State(log + _gather(top, source), sign)

    def multiply(self, first: State, second: State) -> State:
        assert first.scale is not None
        assert second.scale is not None
        return State(first.value + second.value, first.scale * second.scale)

    def unit(self, like: State, locations: int) -> State:
        value = like.value.new_zeros(like.value.shape[0], locations, like.value.shape[2])
        return State(value, torch.ones_like(value))

    def lower(self, state: State) -> Signed:
        assert state.scale is not None
        return Signed(state.scale, state.value)


@final
@dataclass(frozen=True)
class MaxProduct(_Logarithms):
    """Logarithms with maximum for sum: the value of the most probable explanation."""

    def linear(self, weights: LinearMap, state: State, source: Tensor | None) -> State:
        return State(weights.tropical(state.value))


def _finite_top(x: Tensor) -> Tensor:
    """The largest channel, (1, locations, batch), a constant; 0 where all are -inf."""
    top = x.detach().amax(0, keepdim=True)
    return torch.where(top.isfinite(), top, 0.0)


def refuse_negative(x: Tensor) -> None:
    """
    Raises:
        DataError: some value is below 0.
    """
    # The smallest takes one pass and no memory; it is NaN where anything is.
    if not bool(x.detach().amin() >= 0) and bool((x < 0).any()):
        raise DataError(
            "The logarithmic semirings hold numbers of at least 0, and the representation has negative ones. Use a "
            "non-negative representation, or the semiring Scaled() or SignedLog()."
        )


def _log_of(x: Tensor) -> Tensor:
    if x.numel():
        refuse_negative(x)
    return _signed(x).log
