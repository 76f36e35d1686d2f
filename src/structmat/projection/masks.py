"""Masks of windows: boxcars on a circle, their smooth forms, and exact derivatives by width and location.

A window of ``width`` samples that begins at ``location`` covers the places ``j`` of ``range(size)`` with
``(j - location) mod size < width``. All widths and locations here are in samples and have one entry a term; masks are
(terms, size), never (out, in). ``sigma`` is a width in frequency: infinity gives the boxcar itself (the Dirichlet
kernel), and a finite one blurs it by a Gaussian whose standard deviation is ``size / (2 pi sigma)`` samples.

Source: Lee and Kim, "Differentiable Learning of Generalized Structured Matrices for Efficient Deep Neural Networks"
(ICLR 2024), whose mask is the inverse transform of the Gaussian-Dirichlet spectrum. The derivative as one bump at each
edge (:func:`edge_kernel`) is the same derivative without a transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from structmat.errors import StructureError

INFINITE = math.inf
"""The ``sigma`` of a boxcar without blur."""


def boxcar(width: Tensor, location: Tensor, size: int) -> Tensor:
    """Which places the windows cover, as booleans (terms, size); widths and locations (terms,) are integers.

    Windows that pass the end go on at the start. Widths of 0 or less cover nothing, widths from ``size`` on everything.
    """
    places = torch.arange(size, device=width.device)
    covered: Tensor = (places - location[:, None]) % size < width[:, None]
    return covered


def _spectrum_factor(size: int, sigma: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies ``0 .. size // 2`` and ``exp(i pi k / size) g_k / sinc(k / size)`` for them."""
    k = torch.arange(size // 2 + 1, device=like.device, dtype=like.dtype)
    weight = 1.0 / torch.sinc(k / size)
    if math.isfinite(sigma):
        weight = weight * torch.exp(-0.5 * (k / sigma) ** 2)
    return k, torch.polar(weight, math.pi * k / size)


def _turn(angle: Tensor) -> Tensor:
    """``exp(-2 pi i angle)``."""
    return torch.polar(torch.ones_like(angle), -2 * math.pi * angle)


def _mask_values(width: Tensor, location: Tensor, size: int, sigma: float) -> Tensor:
    dtype = width.dtype
    width, location = width.double(), location.double()  # angles of many turns lose digits in single precision
    k, factor = _spectrum_factor(size, sigma, width)
    w = (width / size)[:, None]
    turns = _turn(k * (location / size)[:, None] + 0.5 * k * w)
    spectrum = factor * (w * torch.sinc(k * w)) * turns
    values: Tensor = torch.fft.irfft(spectrum, size, norm="forward")
    return values.to(dtype)


def _edge(place: Tensor, size: int, sigma: float) -> Tensor:
    """The derivative of a mask by the position of an edge at ``place`` (terms,), as (terms, size)."""
    dtype, place = place.dtype, place.double()
    k, factor = _spectrum_factor(size, sigma, place)
    values: Tensor = torch.fft.irfft(factor * _turn(k * (place / size)[:, None]), size, norm="forward")
    return (values / size).to(dtype)


class _GaudiMask(torch.autograd.Function):
    """The soft mask, with the derivative of its formula."""

    @staticmethod
    def forward(ctx: Any, width: Tensor, location: Tensor, size: int, sigma: float) -> Tensor:
        ctx.save_for_backward(width, location)
        ctx.size, ctx.sigma = size, sigma
        return _mask_values(width, location, size, sigma)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        width, location = ctx.saved_tensors
        right = (grads[0] * _edge(location + width, ctx.size, ctx.sigma)).sum(1)
        left = (grads[0] * _edge(location, ctx.size, ctx.sigma)).sum(1)
        return right, right - left, None, None


def gaudi_mask(width: Tensor, location: Tensor, size: int, sigma: float = INFINITE) -> Tensor:
    """The Gaussian-Dirichlet mask (terms, size) of real widths and locations (terms,), and differentiable by both.

    ``size log size`` operations a term, forwards and backwards. At integer widths and locations and infinite ``sigma``
    it is the boxcar up to rounding; elsewhere an infinite ``sigma`` overshoots (Gibbs), by 13 % at worst. The sum over
    places is the width, for every ``sigma``. Its derivative by the width never vanishes, not at width 0 either.

    Raises:
        StructureError: ``sigma`` is not positive.
    """
    _check_sigma(sigma)
    values: Tensor = _GaudiMask.apply(width, location, size, sigma)  # type: ignore[no-untyped-call]
    return values


def _check_sigma(sigma: float) -> None:
    if not sigma > 0:
        raise StructureError(f"sigma={sigma!r} must be positive; infinity gives windows without blur.")


@lru_cache(maxsize=1024)
def _kernel(size: int, sigma: float) -> Tensor:
    start = torch.zeros(1, dtype=torch.float64)
    return _edge(start, size, sigma)[0]


def edge_kernel(size: int, sigma: float = INFINITE) -> Tensor:
    """``kappa`` (size,) in float64: the mask's derivative by the width is ``kappa[(j - location - width) mod size]``,
    and by the location the same minus ``kappa[(j - location) mod size]``, at integer widths and locations.

    It sums to 1 and is symmetric about ``-1/2``. Computed once for each size and sigma.
    """
    _check_sigma(sigma)
    return _kernel(size, float(sigma)).clone()


@lru_cache(maxsize=1024)
def edge_reach(size: int, sigma: float = INFINITE, tolerance: float = 1e-2) -> int:
    """The smallest ``r`` such that entries of the edge kernel outside ``-r .. r - 1`` are below ``tolerance`` of the
    largest: how far from an edge a gradient listens. At most ``ceil(size / 2)``."""
    kernel = _kernel(size, float(sigma)).abs()
    ahead = kernel >= tolerance * float(kernel.max())
    half = (size + 1) // 2
    far = torch.nonzero(ahead[:half])
    return max(1, int(far.max()) + 1 if len(far) else 1)


class _HardMask(torch.autograd.Function):
    """The boxcar at rounded widths and locations; backwards the derivative of the soft mask at that point."""

    @staticmethod
    def forward(ctx: Any, width: Tensor, location: Tensor, size: int, sigma: float) -> Tensor:
        w, start = width.round(), location.round()
        ctx.save_for_backward(w, start)
        ctx.size, ctx.sigma = size, sigma
        return boxcar(w, start, size).to(width.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        w, start = ctx.saved_tensors
        kernel = _kernel(ctx.size, ctx.sigma).to(w)
        places = torch.arange(ctx.size, device=w.device)
        right = (grads[0] * kernel[(places - (start + w)[:, None]).long() % ctx.size]).sum(1)
        left = (grads[0] * kernel[(places - start[:, None]).long() % ctx.size]).sum(1)
        return right, right - left, None, None


def quantized_mask(width: Tensor, location: Tensor, size: int, sigma: float = INFINITE) -> Tensor:
    """The boxcar (terms, size) of rounded widths and locations; the gradient is that of the soft mask, taken there.

    So what trains is what is deployed. Forwards it takes comparisons only, backwards two products with a shifted edge
    kernel. A finite ``sigma`` keeps the gradient near the edges: without one it listens, alternating in sign, to
    entries half a circle away.
    """
    _check_sigma(sigma)
    values: Tensor = _HardMask.apply(width, location, size, float(sigma))  # type: ignore[no-untyped-call]
    return values


@dataclass(frozen=True)
class BlurSchedule:
    """The blur of the edges over training, in samples, falling geometrically from ``first`` to ``last``.

    Args:
        first: standard deviation at the start, as a share of the side's size.
        last: in samples, at the end; 0 for none.
        until: the share of training after which it stays at ``last``.

    The published schedule raises sigma linearly from 1 to 100 over training, that is a blur from ``size / 6`` down to
    ``size / 600`` samples.
    """

    first: float = 1 / 8
    last: float = 1.0
    until: float = 0.8

    def __post_init__(self) -> None:
        if not (0 < self.first <= 0.5 and self.last >= 0 and 0 < self.until <= 1):
            raise StructureError(
                f"{self}: first is a share of at most 0.5, last at least 0 samples, until a share of at most 1."
            )

    def blur(self, share: float, size: int) -> float:
        """Standard deviation in samples when ``share`` of training is over."""
        begin = max(self.first * size, self.last)
        floor = max(self.last, 1e-2)
        passed = min(1.0, max(0.0, share) / self.until)
        if passed >= 1.0:
            return self.last
        # Steps of an eighth of an octave: so few kernels are computed in all.
        steps = round(8 * math.log2(begin / floor) * passed)
        return max(floor, begin * 2 ** (-steps / 8))

    def sigma(self, share: float, size: int) -> float:
        """The same as a width in frequency."""
        blur = self.blur(share, size)
        return size / (2 * math.pi * blur) if blur > 0 else INFINITE
