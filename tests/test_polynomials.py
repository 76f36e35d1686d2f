"""Orthogonal polynomials and recurrences, against scipy.special, cosine transforms and Clenshaw's algorithm."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.special
import torch
from torch import Tensor

import structmat as sm
from structmat.errors import DataError, ShapeError, StructureError
from structmat.polynomials import (
    KINDS,
    Recurrence,
    analysis,
    clenshaw,
    cosine_coefficients,
    cosine_values,
    gauss_nodes,
    recurrence,
    synthesis,
)
from structmat.structures.orthogonal_polynomial import GaussNodes

F64 = torch.float64
VALUES = {
    "chebyshev": lambda j, x: scipy.special.eval_chebyt(j, x),
    "legendre": lambda j, x: scipy.special.eval_legendre(j, x),
    "hermite": lambda j, x: scipy.special.eval_hermite(j, x),
    "laguerre": lambda j, x: scipy.special.eval_genlaguerre(j, 0.5, x),
    "jacobi": lambda j, x: scipy.special.eval_jacobi(j, 0.5, -0.3, x),
}
PARAMETERS = {"laguerre": {"alpha": 0.5}, "jacobi": {"alpha": 0.5, "beta": -0.3}}


def gaussian(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("kind", KINDS)
def test_recurrences(kind: str) -> None:
    given = recurrence(kind, 12, **PARAMETERS.get(kind, {}))
    x = torch.linspace(-0.95, 0.95, 9, dtype=F64)
    values = clenshaw(given, torch.eye(12, dtype=F64), x)
    for j in range(12):
        np.testing.assert_allclose(values[j].numpy(), VALUES[kind](j, x.numpy()), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 5, 12, 101])
def test_gauss_nodes_are_zeros(kind: str, size: int) -> None:
    roots = {
        "chebyshev": lambda: scipy.special.roots_chebyt(size),
        "legendre": lambda: scipy.special.roots_legendre(size),
        "hermite": lambda: scipy.special.roots_hermite(size),
        "laguerre": lambda: scipy.special.roots_genlaguerre(size, 0.5),
        "jacobi": lambda: scipy.special.roots_jacobi(size, 0.5, -0.3),
    }
    expected = roots[kind]()[0]
    found = gauss_nodes(kind, size, **PARAMETERS.get(kind, {}))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12 * max(1.0, np.abs(expected).max()))


def transform(kind: str, shape: tuple[int, int], dtype: torch.dtype = F64) -> sm.StructuredMatrix:
    """With ones in both diagonals."""
    given = {"alpha": 0.0, "beta": 0.0, **PARAMETERS.get(kind, {})}
    nodes = GaussNodes(kind, max(shape), given["alpha"], given["beta"]).values(shape[0])
    tensors = {"left": torch.ones(shape[0], dtype=dtype), "right": torch.ones(shape[1], dtype=dtype), "nodes": nodes}
    return sm.StructuredMatrix(sm.OrthogonalPolynomial(kind, (given["alpha"], given["beta"])), shape, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 7, 60, 300])
def test_transforms_are_orthogonal(kind: str, size: int) -> None:
    """Also where values of the polynomials themselves leave the range of numbers."""
    dense = transform(kind, (size, size)).to_dense()
    tolerance = 1e-14 * size**2 + 1e-12
    torch.testing.assert_close(dense @ dense.T, torch.eye(size, dtype=F64), rtol=0, atol=tolerance)
    single = transform(kind, (size, size), torch.float32).to_dense().double()
    torch.testing.assert_close(single, dense, rtol=0, atol=2e-7)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_circuits_P2_chebyshev_is_a_cosine_transform(size: int) -> None:
    dense = transform("chebyshev", (size, size)).to_dense().flip(0)  # nodes from 1 to -1
    cosine = scipy.fft.dct(np.eye(size), type=2, axis=0, norm="ortho").T
    np.testing.assert_allclose(dense.numpy(), cosine, atol=1e-12)
    weights = gaussian(size)
    values = cosine_values(weights, size)
    twice = scipy.fft.dct(np.concatenate([2 * weights[:1].numpy(), weights[1:].numpy()]), type=3) / 2
    np.testing.assert_allclose(values.numpy(), twice, atol=1e-12)
    torch.testing.assert_close(cosine_coefficients(values), weights)
    given = recurrence("chebyshev", size)
    torch.testing.assert_close(synthesis(given, weights), weights)


ERRORS = {16: 3e-14, 64: 2e-13, 256: 2e-12, 1024: 1e-10, 4096: 3e-8}


@pytest.mark.parametrize("size", list(ERRORS))
def test_circuits_P1_synthesis_in_the_chebyshev_basis(size: int) -> None:
    """The published errors against Clenshaw's algorithm, with a factor of ten."""
    given, weights = recurrence("legendre", size), gaussian(size)
    x = torch.cos(torch.pi * (torch.arange(size, dtype=F64) + 0.5) / size)
    expected = clenshaw(given, weights, x)
    found = cosine_values(synthesis(given, weights), size)
    assert float((found - expected).abs().max() / expected.abs().max()) < 10 * ERRORS[size]


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 100])
@pytest.mark.parametrize("kind", ["legendre", "chebyshev", "jacobi"])
def test_circuits_P1_analysis_is_the_adjoint(kind: str, size: int) -> None:
    given = recurrence(kind, size, **PARAMETERS.get(kind, {}))
    weights, y = gaussian(3, size), gaussian(3, size, seed=1)
    left, right = (synthesis(given, weights) * y).sum(), (weights * analysis(given, y)).sum()
    assert float((left - right).abs()) <= 1e-11 * float(torch.linalg.norm(weights) * torch.linalg.norm(y))
    matrix = synthesis(given, torch.eye(size, dtype=F64)).T  # connection coefficients
    torch.testing.assert_close(analysis(given, torch.eye(size, dtype=F64)), matrix, rtol=1e-11, atol=1e-11)


def test_synthesis_refuses() -> None:
    with pytest.raises(ShapeError, match="weights"):
        synthesis(recurrence("legendre", 4), torch.ones(3))
    for product in (synthesis, analysis):
        with pytest.raises(DataError, match="real"):
            product(recurrence("legendre", 4), torch.ones(4, dtype=torch.complex128))
    with pytest.raises(StructureError, match="Known are"):
        recurrence("bessel", 4)
    with pytest.raises(StructureError, match="pair"):
        sm.OrthogonalPolynomial("jacobi", 0.5)  # type: ignore[arg-type]
    with pytest.raises(StructureError, match="above -1"):
        sm.OrthogonalPolynomial("jacobi", (-1.0, 0.0))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_recurrence_width(width: int) -> None:
    """Every entry from the definition; the columns satisfy their recurrence."""
    shape = (6, 9)
    matrix = sm.StructuredMatrix.random(sm.RecurrenceWidth(width), shape, dtype=F64)
    tensors = {name: t + 0.1 * gaussian(*t.shape) for name, t in matrix.tensors.items()}
    dense = sm.StructuredMatrix(matrix.structure, shape, tensors).to_dense() / tensors["scale"][:, None]
    for j in range(8):
        steps = sum(tensors["steps"][k, j] * dense[:, j - k] for k in range(min(width, j + 1)))
        torch.testing.assert_close(dense[:, j + 1], tensors["slopes"][j] * tensors["nodes"] * dense[:, j] + steps)


def test_a_learned_recurrence_finds_legendre() -> None:
    """From Chebyshev polynomials, at nodes that are learned too."""
    x = torch.linspace(-0.9, 0.9, 7, dtype=F64)
    weight = clenshaw(recurrence("legendre", 6), torch.eye(6, dtype=F64), x).T
    start = sm.project(weight, sm.RecurrenceWidth(2), sweeps=0).error
    found = sm.project(weight, sm.RecurrenceWidth(2), sweeps=100).error
    assert found < 1e-5 < start


def test_recurrences_are_values() -> None:
    given = recurrence("legendre", 5)
    assert isinstance(given, Recurrence)
    assert given.count == 5
