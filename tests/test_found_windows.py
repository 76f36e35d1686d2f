"""Windows found: sums of windowed rank-one terms in general position are given back, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structmat as sm
from structmat.compression.identify import identify
from structmat.projection.found_spans import disentangled, numbers, spanned_terms
from structmat.projection.found_windows import refitted, windowed_terms
from structmat.projection.project import make_target
from structmat.projection.windows import Terms
from structmat.structure import count_stored

F64, C128 = torch.float64, torch.complex128


def made(windows: Tensor, shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = F64) -> Terms:
    """Terms of random contents on windows (terms, 4)."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(len(windows), shape[0], generator=generator, dtype=dtype)
    right = torch.randn(len(windows), shape[1], generator=generator, dtype=dtype)
    return Terms(left, right, windows).cropped()


def drawn(count: int, shape: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], seed: int) -> Terms:
    """Terms on random windows, of widths within two bounds, anywhere on the circle."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for size, (least, most) in zip(shape, (rows, columns), strict=True):
        width = torch.randint(least, most + 1, (count,), generator=generator)
        sides += [torch.randint(0, size, (count,), generator=generator), width]
    return made(torch.stack(sides, 1), shape, seed)


def distance(found: Terms, wanted: Terms) -> float:
    return float(torch.linalg.norm(found.dense() - wanted.dense()) / torch.linalg.norm(wanted.dense()))


def listed(terms: Terms) -> set[tuple[int, ...]]:
    return {tuple(window) for window in terms.windows.tolist()}


# ------------------------------------------------------------------------------------------------ windows given back


def test_windows_of_both_kinds_are_found_as_they_are() -> None:
    """Few terms by their spaces, as many as rows by peeling; some pass the end."""
    few = drawn(6, (40, 30), (5, 20), (4, 16), seed=1)
    found = windowed_terms(few.dense())
    assert found is not None
    assert listed(found) == listed(few)
    places = torch.arange(32)
    many = made(torch.stack([places, torch.full((32,), 4), places * 21 % 48, torch.full((32,), 7)], 1), (32, 48))
    assert torch.linalg.matrix_rank(many.dense()) == 32
    assert spanned_terms(many.dense(), 1e-9) is None, "of full rank"
    found = windowed_terms(many.dense())
    assert found is not None
    assert listed(found) == listed(many)
    assert distance(found, many) < 1e-13


@settings(max_examples=25, deadline=None)
@given(st.integers(24, 48), st.integers(24, 48), st.integers(2, 8), st.sampled_from((4, 8, 12)), st.integers(0, 10**6))
def test_few_terms_are_found_whatever_they_overlap(rows: int, columns: int, count: int, least: int, seed: int) -> None:
    """Windows up to half of the sides, wrapping around or not; the same number of terms and about as many numbers."""
    terms = drawn(count, (rows, columns), (least, rows // 2), (least, columns // 2), seed)
    found = windowed_terms(terms.dense())
    assert found is not None
    assert distance(found, terms) < 1e-9
    assert found.count <= count
    assert numbers(found) <= 1.15 * numbers(terms)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_many_small_terms_are_peeled_off(shape: tuple[int, int], seed: int) -> None:
    terms = drawn(shape[0] * 3 // 4, shape, (4, 7), (4, 9), seed)
    found = windowed_terms(terms.dense())
    assert found is not None
    assert distance(found, terms) < 1e-9
    assert numbers(found) < int((terms.dense() != 0).sum())


@pytest.mark.parametrize("dtype", [F64, C128])
def test_what_hides_what(dtype: torch.dtype) -> None:
    """One window within another; a cross, of which nothing shows the middle; two terms that share a window."""
    nested = torch.tensor([[2, 20, 3, 22], [8, 5, 10, 6]])
    crossed = torch.tensor([[10, 6, 1, 22], [2, 24, 9, 5]])
    shared = torch.tensor([[5, 12, 7, 11], [5, 12, 7, 11]])
    # Beside each a diagonal band of small terms, so that the rank is full and only peeling remains.
    ends = torch.arange(28, 60, 2)
    band = torch.stack([ends, torch.full_like(ends, 4), ends, torch.full_like(ends, 4)], 1)
    for windows in (nested, crossed, shared):
        few = made(windows, (60, 60), seed=3, dtype=dtype)
        found = windowed_terms(few.dense())
        assert found is not None
        assert found.count == 2
        assert numbers(found) <= numbers(few)
        whole = made(torch.cat([windows, band]), (60, 60), seed=4, dtype=dtype)
        block = whole.dense() + 0.5 * torch.diag(torch.arange(60) >= 28).to(dtype)
        assert torch.linalg.matrix_rank(block) > 30
        found = windowed_terms(whole.dense())
        assert found is not None
        assert distance(found, whole) < 1e-12
        assert numbers(found) <= numbers(whole)


def test_single_precision_is_enough() -> None:
    terms = drawn(6, (32, 32), (4, 16), (4, 16), seed=2)
    rounded = terms.dense().to(torch.float32).to(F64)
    found = windowed_terms(rounded, 3e-6)
    assert found is not None
    assert distance(found, terms) < 1e-6
    assert found.count == 6
    assert windowed_terms(terms.dense().to(torch.bfloat16).to(F64), 4e-3) is None


# --------------------------------------------------------------------------------------------------- what is no member


@pytest.mark.parametrize("shape", [(32, 32), (24, 41), (2, 2), (1, 9), (64, 3)])
def test_noise_has_no_windows(shape: tuple[int, int]) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(shape, generator=generator, dtype=F64)
        assert windowed_terms(noise) is None
        assert windowed_terms(noise * (torch.rand(shape, generator=generator) < 0.2)) is None, "sparse"
        if min(shape) > 20:
            assert windowed_terms(noise[:, :5] @ noise[:5]) is None, "low rank"
    assert windowed_terms(torch.zeros(shape, dtype=F64)) is None


def test_members_with_noise_are_no_members() -> None:
    terms = drawn(6, (32, 32), (4, 16), (4, 16), seed=2)
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert windowed_terms(terms.dense() + 1e-6 * noise) is None


# ---------------------------------------------------------------------------------------------------------- the parts


def test_sums_are_taken_back() -> None:
    """Of two terms with windows apart; what is left has their windows again, and is the same matrix."""
    terms = made(torch.tensor([[0, 8, 0, 10], [12, 8, 14, 10]]), (24, 28))
    right = terms.right + torch.tensor([[0.0, 0.7], [0.0, 0.0]], dtype=F64) @ terms.right
    left = terms.left - torch.tensor([[0.0, 0.0], [0.7, 0.0]], dtype=F64) @ terms.left
    torch.testing.assert_close(left.mT @ right, terms.dense(), rtol=1e-13, atol=1e-13)
    found = disentangled(left, right, 1e-9)
    assert listed(found) == listed(terms)
    assert distance(found, terms) < 1e-14


def test_refitting_finds_contents_of_known_windows() -> None:
    terms = drawn(5, (20, 30), (4, 10), (4, 10), seed=5)
    near = Terms(terms.left, terms.right * (1 + 1e-4 * torch.sin(torch.arange(30.0, dtype=F64))), terms.windows)
    before = distance(near, terms)
    for _ in range(30):
        near = refitted(terms.dense(), near)
    assert distance(near, terms) < 1e-2 * before
    assert torch.equal(near.cropped().dense(), near.dense()), "nothing outside of the windows"


# ------------------------------------------------------------------------------------------- inspection and projection


@pytest.mark.parametrize("seed", range(3))
def test_a_member_is_named_by_its_windows(seed: int) -> None:
    structure = sm.GBLR(terms=16, rows=64, columns=128)
    generator = torch.Generator().manual_seed(seed)
    member = sm.StructuredMatrix.random(structure, (32, 32), generator=generator, dtype=F64)
    first = identify(make_target(member.to_dense()), 1e-12)[1][0]
    assert (first.family, first.numbers) == ("GBLR", count_stored(structure, (32, 32)))
    assert first.name == "a sum of 16 rank-one terms on windows"
    assert first.error < 1e-13


def test_what_takes_fewer_numbers_otherwise_is_not_named_by_windows() -> None:
    diagonal = torch.diag(torch.linspace(1, 2, 32, dtype=F64))
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    for matrix in (diagonal, noise, torch.eye(32, dtype=F64)):
        traits = identify(make_target(matrix), 1e-12)[1]
        assert "GBLR" not in [trait.family for trait in traits]


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_members_are_projected_exactly(shape: tuple[int, int]) -> None:
    """With their own sizes, with more, with or without sweeps; not with less."""
    terms = drawn(7, shape, (4, 12), (4, 12), seed=6)
    found = windowed_terms(terms.dense())
    assert found is not None
    rows, columns = found.totals
    for own in (sm.GBLR(7, rows, columns), sm.GBLR(9, rows + 20, columns + 31)):
        for sweeps in (0, 5):
            projected = sm.project(terms.dense(), own, sweeps=sweeps)
            assert projected.error < 1e-13
            assert projected.method == "windows found"
    assert sm.project(terms.dense(), sm.GBLR(6, rows, columns), sweeps=5).error > 1e-3
    weights = torch.diag(torch.linspace(0.5, 2, shape[1], dtype=F64))
    assert sm.project(terms.dense(), sm.GBLR(7, rows, columns), second_moment=weights, sweeps=5).error < 1e-13
