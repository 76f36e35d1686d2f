"""Exact members: values of SciPy at every size, the catalogue of circuits, gradients, classes."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import given

import structmat as sm
from structmat import transforms
from structmat.circuit import catalogue
from structmat.errors import DataError, ShapeError
from structmat.program import Fourier, stages

SIZES = [1, 2, 3, 4, 5, 7, 8, 12, 16, 30, 64, 97, 128]


def assert_is(member: sm.StructuredMatrix, wanted: np.ndarray) -> None:
    """To rounding: errors grow with the logarithm of the size, and with the size of the entries."""
    got = member.to_dense().numpy()
    np.testing.assert_allclose(
        got, wanted, rtol=0, atol=2e-14 * max(1.0, np.abs(wanted).max()) * (1 + len(wanted) ** 0.5)
    )
    x = torch.randn(3, member.shape[1], dtype=torch.float64).to(member.dtype)
    np.testing.assert_allclose(
        (member @ x.T).numpy(), wanted @ x.numpy().T, atol=1e-11 * max(1.0, np.abs(wanted).max())
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("orthonormal", [False, True])
def test_dft_is_that_of_scipy(size: int, orthonormal: bool) -> None:
    norm = "ortho" if orthonormal else "backward"
    assert_is(transforms.dft(size, orthonormal=orthonormal), scipy.fft.fft(np.eye(size), axis=0, norm=norm))
    inverse = transforms.dft(size, inverse=True, orthonormal=orthonormal)
    assert_is(inverse, scipy.fft.ifft(np.eye(size), axis=0, norm=norm))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize("orthonormal", [False, True])
def test_cosine_and_sine_transforms_are_those_of_scipy(size: int, kind: int, orthonormal: bool) -> None:
    norm = "ortho" if orthonormal else None
    if (kind, size) != (1, 1):
        wanted = scipy.fft.dct(np.eye(size), kind, axis=0, norm=norm)
        assert_is(transforms.dct(size, kind, orthonormal=orthonormal), wanted)
    assert_is(transforms.dst(size, kind, orthonormal=orthonormal), scipy.fft.dst(np.eye(size), kind, axis=0, norm=norm))


@pytest.mark.parametrize("size", SIZES)
def test_hartley(size: int) -> None:
    spectrum = scipy.fft.fft(np.eye(size), axis=0)
    assert_is(transforms.hartley(size), spectrum.real - spectrum.imag)


@pytest.mark.parametrize("size", [2, 4, 8, 64])
def test_transforms_of_signs(size: int) -> None:
    wanted = scipy.linalg.hadamard(size).astype(float)
    assert_is(transforms.hadamard(size), wanted)
    walsh = transforms.walsh(size).to_dense().numpy()
    assert [int((np.diff(row) != 0).sum()) for row in walsh] == list(range(size))
    assert {tuple(row) for row in walsh} == {tuple(row) for row in wanted}


@pytest.mark.parametrize("size", [2, 8, 32])
def test_circuits_B1_members_are_those_of_the_catalogue(size: int) -> None:
    """Two constructions that share no code: gate by gate, and factor by factor."""
    pairs = {
        "dft": (transforms.dft(size), catalogue.fourier(size), 1.0),
        "dct 2": (transforms.dct(size, 2), catalogue.cosine(size, 2), 2.0),
        "dct 4": (transforms.dct(size, 4), catalogue.cosine(size, 4), 2.0),
        "dst 2": (transforms.dst(size, 2), catalogue.sine(size, 2), 2.0),
        "dst 4": (transforms.dst(size, 4), catalogue.sine(size, 4), 2.0),
        "hadamard": (transforms.hadamard(size), catalogue.hadamard(size), 1.0),
        "haar": (transforms.haar(size), catalogue.haar(size), 1.0),
        "hartley": (transforms.hartley(size), catalogue.hartley(size), 1.0),
    }
    for name, (member, circuit, scale) in pairs.items():
        np.testing.assert_allclose(member.to_dense().numpy(), scale * circuit.to_dense(), atol=1e-12, err_msg=name)


@given(st.integers(1, 40), st.integers(0, 1000))
def test_permutations_and_reflections(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    assert torch.equal(transforms.permutation(order) @ x, x[order])
    for dtype in (torch.float64, torch.complex128):
        v = torch.randn(size, generator=generator, dtype=dtype)
        v[torch.rand(size, generator=generator) < 0.3] = 0
        v[seed % size] = 1.0
        wanted = torch.eye(size, dtype=dtype) - 2 * torch.outer(v, v.conj()) / v.abs().square().sum()
        torch.testing.assert_close(transforms.householder(v).to_dense(), wanted, rtol=0, atol=1e-13)


@given(st.integers(1, 40), st.integers(0, 1000))
def test_convolution(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.float64, torch.complex128):
        kernel = torch.randn(size, generator=generator, dtype=dtype)
        member = transforms.convolution(kernel)
        torch.testing.assert_close(
            member.to_dense(), torch.from_numpy(scipy.linalg.circulant(kernel)), rtol=0, atol=1e-12
        )
        if size & (size - 1) == 0:
            assert member.structure in (sm.Kaleidoscope(1, 1), sm.RealPart(sm.Kaleidoscope(1, 1)))


@pytest.mark.parametrize("member", [transforms.dct(12), transforms.haar(8), transforms.convolution(torch.randn(6))])
def test_a_member_is_trained_from_there(member: sm.StructuredMatrix) -> None:
    layer = sm.nn.StructuredLinear.from_matrix(member)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x = torch.randn(16, member.shape[1], dtype=member.dtype)
    wanted = torch.randn(16, member.shape[0], dtype=member.dtype)
    losses = []
    for _ in range(5):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


def test_in_float32() -> None:
    for member in (transforms.dct(48, dtype=torch.float32), transforms.hartley(32, dtype=torch.float32)):
        assert member.dtype == torch.float32
    got = transforms.dct(48, dtype=torch.float32).to_dense()
    torch.testing.assert_close(got.double(), torch.from_numpy(scipy.fft.dct(np.eye(48), axis=0)), rtol=0, atol=1e-5)


def test_what_is_refused() -> None:
    for call in (
        lambda: transforms.dft(0),
        lambda: transforms.dft(4, dtype=torch.float64),
        lambda: transforms.dct(1, 1),
        lambda: transforms.dct(4, 5),
        lambda: transforms.haar(6),
        lambda: transforms.permutation([0, 0, 1]),
        lambda: transforms.convolution(torch.zeros(2, 2)),
        lambda: transforms.dct(4, dtype=torch.int64),
        lambda: transforms.dst(4, dtype=torch.complex128),
        lambda: transforms.hartley(4, dtype=torch.complex128),
        lambda: transforms.haar(4, dtype=torch.int64),
        lambda: transforms.fourier(4, dtype=torch.float64),
        lambda: transforms.fourier_monarch(4, 2, dtype=torch.float64),
    ):
        with pytest.raises(ShapeError):
            call()
    for refused in (
        lambda: transforms.householder(torch.zeros(3)),
        lambda: transforms.householder(torch.tensor([1, 2, 2])),  # factors rounded to integers would be zero
        lambda: transforms.householder(torch.tensor([1.0, float("nan")])),
        lambda: transforms.convolution(torch.tensor([1, 2, 3])),
        lambda: transforms.convolution(torch.tensor([1.0, float("inf")])),
        lambda: transforms.permutation(torch.tensor([1.7, 0.2])),
    ):
        with pytest.raises(DataError):
            refused()


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_reflections_do_not_depend_on_the_length_of_the_vector(scale: float) -> None:
    v = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    wanted = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(v, v) / 25
    torch.testing.assert_close(transforms.householder(scale * v).to_dense(), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [2, 12, 64, 30])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_frozen_layers_recognize_the_fourier_transform(
    size: int, inverse: bool, orthonormal: bool, dtype: torch.dtype
) -> None:
    """As long as it is one: a factor that was trained is multiplied by as before."""
    made = transforms.dft(size, inverse=inverse, orthonormal=orthonormal, dtype=dtype)
    layer = sm.nn.StructuredLinear(size, size, structure=made.structure, dtype=dtype)
    layer.load_state_dict(
        {
            **layer.state_dict(),
            **{name: torch.view_as_real(t) if t.is_complex() else t for name, t in made.tensors.items()},
        }
    )
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0), dtype=dtype)
    frozen = layer.freeze()
    assert any(isinstance(stage, Fourier) for stage in stages(frozen.program))
    torch.testing.assert_close(frozen(x), layer(x).detach())
    with torch.no_grad():
        layer.factor0[0, 0, 0, 0] += 0.01
    trained = layer.freeze()
    assert not any(isinstance(stage, Fourier) for stage in stages(trained.program))
    torch.testing.assert_close(trained(x), layer(x).detach())
