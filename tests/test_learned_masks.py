"""Masks of windows against the numbers, identities and derivatives of the notes on learned structure (C1-C7, C11)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from structmat.errors import StructureError
from structmat.projection.masks import (
    BlurSchedule,
    boxcar,
    edge_kernel,
    edge_reach,
    gaudi_mask,
    quantized_mask,
)

SIZES = (1, 2, 3, 7, 8, 16, 33)
SIGMAS = (1.0, 5.0, 100.0, math.inf)


def all_windows(size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Every integer width 0..size and location 0..size - 1."""
    width, location = torch.meshgrid(torch.arange(size + 1), torch.arange(size), indexing="ij")
    return width.reshape(-1).to(dtype), location.reshape(-1).to(dtype)


def by_hand(width: int, location: int, size: int) -> list[float]:
    covered = {(location + i) % size for i in range(width)}
    return [float(j in covered) for j in range(size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_learned_C1_integer_windows_are_boxcars(size: int, dtype: torch.dtype, allowed: float) -> None:
    width, location = all_windows(size, dtype)
    truth = torch.tensor(
        [by_hand(int(w), int(s), size) for w, s in zip(width, location, strict=True)], dtype=torch.float64
    )
    assert torch.equal(boxcar(width, location, size).double(), truth)
    assert float((gaudi_mask(width, location, size).double() - truth).abs().max()) <= allowed
    assert torch.equal(quantized_mask(width, location, size).double(), truth)


GOLDEN = {1.0: 0.567774, 2.0: 0.883752, 5.0: 0.999914, 10.0: 1.000000, 100.0: 1.000789}


def one(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([v], dtype=torch.float64) for v in values)


@pytest.mark.parametrize(("sigma", "largest"), GOLDEN.items())
def test_learned_C2_golden_values(sigma: float, largest: float) -> None:
    mask = gaudi_mask(*one(128, 192), 512, sigma)
    assert float(mask.max()) == pytest.approx(largest, abs=1.5e-6)
    assert float(mask.sum()) == pytest.approx(128, abs=1e-9)
    if sigma == 1.0:
        assert float(mask.min()) == pytest.approx(0.018379, abs=1e-6)


def test_learned_C2_windows_between_the_samples_overshoot() -> None:
    sharp, blurred = (gaudi_mask(*one(128.5, 191.8), 512, sigma) for sigma in (math.inf, 100.0))
    assert (float(sharp.max()), float(sharp.min())) == pytest.approx((1.1302, -0.0960), abs=1e-4)
    assert (float(blurred.max()), float(blurred.min())) == pytest.approx((1.0006, -0.0016), abs=1e-4)


def test_learned_C2_edge_kernel() -> None:
    kernel = edge_kernel(4096)
    for j in range(5):
        limit = math.log(2) - sum((-1) ** (i + 1) / i for i in range(1, j + 1))
        assert float(kernel[j]) == pytest.approx(limit, abs=1e-3)
        assert float(kernel[-1 - j]) == pytest.approx(float(kernel[j]), abs=1e-12)
    assert edge_kernel(512, 100.0)[:4].tolist() == pytest.approx([0.42443, 0.07046, 0.00742, -0.00429], abs=1e-5)


@pytest.mark.parametrize("size", [7, 8, 33])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_learned_C3_derivatives_against_differences(size: int, sigma: float) -> None:
    """Central differences at real widths and locations, which include both ends of the range of widths."""
    generator = torch.Generator().manual_seed(size)
    width = torch.cat([torch.rand(6, generator=generator, dtype=torch.float64) * size, torch.tensor([0.0, size])])
    location = torch.rand(8, generator=generator, dtype=torch.float64) * size
    probe = torch.randn(8, size, generator=generator, dtype=torch.float64)
    width.requires_grad_()
    location.requires_grad_()
    analytic = torch.autograd.grad((gaudi_mask(width, location, size, sigma) * probe).sum(), (width, location))
    h = 1e-4
    with torch.no_grad():

        def value(w: Tensor, s: Tensor) -> Tensor:
            return (gaudi_mask(w, s, size, sigma) * probe).sum(1)

        by_width = (value(width + h, location) - value(width - h, location)) / (2 * h)
        by_location = (value(width, location + h) - value(width, location - h)) / (2 * h)
    torch.testing.assert_close(analytic[0], by_width, rtol=0, atol=1e-6)
    torch.testing.assert_close(analytic[1], by_location, rtol=0, atol=1e-6)


def slopes(make: Callable[..., Tensor], size: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Jacobians of all integer windows' masks by width and location, (windows, size) each."""
    width, location = all_windows(size)
    by_width, by_location = [], []
    for j in range(size):
        w, s = width.clone().requires_grad_(), location.clone().requires_grad_()
        one_w, one_s = torch.autograd.grad(make(w, s, size, sigma)[:, j].sum(), (w, s))
        by_width.append(one_w)
        by_location.append(one_s)
    return torch.stack(by_width, 1), torch.stack(by_location, 1)


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_learned_C3_edge_kernel_is_the_derivative(size: int, sigma: float) -> None:
    width, location = all_windows(size)
    by_width, by_location = slopes(gaudi_mask, size, sigma)
    kernel, j = edge_kernel(size, sigma), torch.arange(size)
    right = kernel[(j - (location + width)[:, None]).long() % size]
    left = kernel[(j - location[:, None]).long() % size]
    torch.testing.assert_close(by_width, right, rtol=0, atol=1e-9)
    torch.testing.assert_close(by_location, right - left, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [7, 15, 33])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_learned_C4_the_width_derivative_never_vanishes(size: int, sigma: float) -> None:
    """Its norm is the same for all windows, that of width 0 included, and equals the closed sum (odd sizes)."""
    norms = torch.linalg.norm(slopes(gaudi_mask, size, sigma)[0], dim=1)
    k = torch.arange(-(size // 2), size // 2 + 1, dtype=torch.float64)
    closed = (torch.exp(-((k / sigma) ** 2)) / torch.sinc(k / size) ** 2).sum().div(size).sqrt()
    torch.testing.assert_close(norms, closed.expand_as(norms), rtol=1e-10, atol=0)
    assert size**-0.5 - 1e-12 <= float(closed) < math.pi / 2


def test_learned_C4_measured_norms() -> None:
    for sigma, norm in ((100.0, 0.6087), (5.0, 0.1316), (1.0, 0.0588)):
        assert float(torch.linalg.norm(edge_kernel(512, sigma))) == pytest.approx(norm, abs=1e-4)
    # Odd sizes tend to sqrt(2 ln 2); at even ones a real transform drops the imaginary Nyquist coefficient.
    assert float(torch.linalg.norm(edge_kernel(513))) == pytest.approx(math.sqrt(2 * math.log(2)), abs=1e-5)
    assert float(torch.linalg.norm(edge_kernel(512))) == pytest.approx(1.1769, abs=2e-3)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_learned_C5_windows_without_edges_do_not_move(size: int, sigma: float) -> None:
    width, _ = all_windows(size)
    _, by_location = slopes(gaudi_mask, size, sigma)
    norms = torch.linalg.norm(by_location, dim=1)
    closed = (width == 0) | (width == size)
    assert float(norms[closed].max()) <= 1e-12
    assert float(norms[~closed].min()) > 1e-3
    assert float(norms.max()) <= 2.355


@pytest.mark.parametrize("size", [16, 33])
def test_learned_C6_sharpening_converges_and_keeps_the_mass(size: int) -> None:
    width, location = all_windows(size)
    truth = boxcar(width, location, size).double()
    before = torch.full_like(width, math.inf)
    for sigma in (0.01, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 1e6):
        mask = gaudi_mask(width, location, size, sigma)
        torch.testing.assert_close(mask.sum(1), width, rtol=0, atol=1e-10)
        distance = torch.linalg.norm(mask - truth, dim=1)
        assert bool((distance <= before + 1e-12).all())
        before = distance
    assert float(before.max()) <= 1e-9
    flat = gaudi_mask(width, location, size, 0.01)
    torch.testing.assert_close(flat, (width / size)[:, None].expand_as(flat), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", [gaudi_mask, quantized_mask])
def test_learned_C7_dead_terms(mask: Callable[..., Tensor]) -> None:
    """Without both widths nothing of a term gets a gradient; with one of them only the other width does."""
    generator = torch.Generator().manual_seed(7)
    m, n = 6, 9
    upstream = torch.randn(m, n, generator=generator, dtype=torch.float64)
    for rows, columns in ((0.0, 0.0), (0.0, 4.0), (3.0, 0.0)):
        leaves = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (rows, 2.0, columns, 5.0)]
        u = torch.randn(1, m, generator=generator, dtype=torch.float64, requires_grad=True)
        v = torch.randn(1, n, generator=generator, dtype=torch.float64, requires_grad=True)
        left, right = mask(leaves[0], leaves[1], m) * u, mask(leaves[2], leaves[3], n) * v
        loss = ((left.T @ right) * upstream).sum()
        grads = torch.autograd.grad(loss, [*leaves, u, v])
        alive = [bool(g.abs().max() > 1e-12) for g in grads]
        assert alive == [rows == 0 and columns > 0, False, columns == 0 and rows > 0, False, False, False]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_learned_C11_hard_forwards_soft_backwards(sigma: float) -> None:
    generator = torch.Generator().manual_seed(11)
    size = 24
    width = torch.rand(40, generator=generator, dtype=torch.float64) * (size + 1) - 0.5
    location = torch.rand(40, generator=generator, dtype=torch.float64) * size
    probe = torch.randn(40, size, generator=generator, dtype=torch.float64)
    outcomes = []
    for make, w, s in ((quantized_mask, width, location), (gaudi_mask, width.round(), location.round())):
        w, s = w.clone().requires_grad_(), s.clone().requires_grad_()
        mask = make(w, s, size, sigma)
        outcomes.append((mask, *torch.autograd.grad((mask * probe).sum(), (w, s))))
    hard, soft = outcomes
    assert torch.equal(hard[0], boxcar(width.round(), location.round(), size).double())
    torch.testing.assert_close(hard[1], soft[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(hard[2], soft[2], rtol=0, atol=1e-10)
    for sign in (0.0, 1.0):  # at the ends of the range as well
        w = torch.tensor([sign * size], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(
            (quantized_mask(w, torch.tensor([3.0]).double(), size, sigma) * probe[:1]).sum(), w
        )
        assert bool(torch.isfinite(slope).all())
        assert float(slope.abs()) > 0


@given(size=st.integers(1, 40), width=st.floats(0, 1), location=st.floats(-2, 2), shift=st.integers(-50, 50))
def test_masks_move_with_their_location(size: int, width: float, location: float, shift: int) -> None:
    """A whole shift rolls the mask; a whole turn leaves it (odd sizes at any location, even ones at whole places)."""
    start = location * size if size % 2 else float(round(location * size))
    reach = width * size if size % 2 else float(round(width * size))
    w, s, moved = one(reach, start, start + shift)
    mask = gaudi_mask(w, s, size)
    torch.testing.assert_close(gaudi_mask(w, moved, size), mask.roll(shift, 1), rtol=0, atol=1e-9)


def test_the_reach_of_an_edge_covers_the_kernel() -> None:
    for size, sigma in ((512, 100.0), (64, 4.0), (512, math.inf), (1, 1.0)):
        reach = edge_reach(size, sigma)
        kernel = edge_kernel(size, sigma).abs()
        assert reach <= (size + 1) // 2
        inside = set(range(reach)) | {size - 1 - j for j in range(reach)}
        outside = [float(kernel[j]) for j in range(size) if j not in inside]
        assert max(outside, default=0.0) < 1e-2 * float(kernel.max())
    assert edge_reach(512, 100.0) <= 12


def test_blur_schedule() -> None:
    schedule = BlurSchedule(first=1 / 8, last=0.5, until=0.5)
    blurs = [schedule.blur(i / 100, 256) for i in range(101)]
    assert blurs[0] == 32.0
    assert blurs == sorted(blurs, reverse=True)
    assert set(blurs[50:]) == {0.5}
    assert schedule.sigma(0.0, 256) == pytest.approx(256 / (2 * math.pi * 32))
    assert BlurSchedule(last=0.0).sigma(1.0, 256) == math.inf
    with pytest.raises(StructureError, match="first is a share"):
        BlurSchedule(first=0.0)
    with pytest.raises(StructureError, match="must be positive"):
        gaudi_mask(*one(1.0, 0.0), 4, 0.0)
