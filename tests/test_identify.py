"""What a matrix is, with no hint: planted structures are named, noise is not."""

from __future__ import annotations

import pytest
import torch

import structmat as sm
from structmat import transforms
from structmat.compression.identify import identify
from structmat.projection.project import make_target

F64 = torch.float64


def names(matrix: torch.Tensor, tolerance: float = 1e-12) -> list[str]:
    return [trait.name for trait in identify(make_target(matrix), tolerance)[1]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=generator(seed), dtype=F64)


def shuffled(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(size, generator=generator(seed))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("discrete Fourier", lambda n: transforms.dft(n).to_dense()),
        ("inverse discrete Fourier", lambda n: transforms.dft(n, inverse=True).to_dense()),
        ("cosine (type II)", lambda n: transforms.dct(n, 2, orthonormal=True).to_dense()),
        ("cosine (type IV)", lambda n: transforms.dct(n, 4).to_dense()),
        ("sine (type I)", lambda n: transforms.dst(n, 1).to_dense()),
        ("Hartley", lambda n: transforms.hartley(n).to_dense()),
        ("Hadamard", lambda n: transforms.hadamard(n).to_dense()),
        ("Haar", lambda n: transforms.haar(n).to_dense()),
    ],
)
def test_transforms_are_named_in_any_order(name: str, make: object) -> None:
    assert callable(make)
    matrix = make(32)
    assert f"a {name} transform" in names(matrix)
    assert f"a {name} transform, columns reordered" in names(matrix[:, shuffled(32)])
    rows = [n for n in names(matrix[shuffled(32)]) if name in n]
    assert rows, "the rows reordered"
    if name != "Haar":
        scaled = names(matrix[:, shuffled(32)] * (1 + torch.rand(32, generator=generator(3))))
        assert f"a {name} transform, columns reordered, columns scaled" in scaled


def test_supports_are_named() -> None:
    order = shuffled(40)
    assert names(torch.eye(40, dtype=F64)[order])[0] == "a permutation"
    assert names(3 * torch.eye(40, dtype=F64))[0] == "a multiple of the identity"
    assert names(torch.diag(noise(40)))[0] == "a diagonal matrix"
    band = torch.diag(noise(40)) + torch.diag(noise(39, seed=1), 1) + torch.diag(noise(39, seed=2), -1)
    assert "a banded matrix of bandwidth 1" in names(band)
    assert "a banded matrix of bandwidth 1, rows and columns reordered" in names(band[order][:, order])
    blocks = torch.block_diag(*[noise(10, 10, seed=s) for s in range(4)])
    assert "a block diagonal matrix of 4 blocks" in names(blocks)
    assert "a block diagonal matrix of 4 blocks, rows and columns reordered" in names(blocks[order][:, shuffled(40, 5)])
    sparse = noise(40, 40) * (torch.rand(40, 40, generator=generator(6)) < 0.1)
    assert f"a sparse matrix with {int((sparse != 0).sum())} entries" in names(sparse)


def test_ranks_are_named() -> None:
    low = noise(40, 3) @ noise(3, 32, seed=1)
    assert names(low)[0] == "a matrix of rank 3"
    nearly = low + 1e-3 * noise(40, 32, seed=2)
    assert names(nearly)[0] == "a matrix of rank 3"
    product = torch.kron(noise(4, 6), noise(8, 5, seed=1))
    found = identify(make_target(torch.kron(noise(4, 4), noise(8, 8, seed=1))), 1e-12)[1]
    assert any("a Kronecker product of 4 x 4 and 8 x 8" in trait.name for trait in found)
    assert product.shape == (32, 30)
    diagonal = torch.diag(1 + noise(64).abs() * 8) + noise(64, 2) @ noise(2, 64, seed=1)
    assert any(name.startswith("a diagonal matrix plus rank 2") for name in names(diagonal))
    sparse = noise(64, 64, seed=3) * 8 * (torch.rand(64, 64, generator=generator(4)) < 0.03)
    assert any("entries plus rank 2" in name for name in names(sparse + noise(64, 2) @ noise(2, 64, seed=1)))


def test_butterflies_are_named() -> None:
    matrix = sm.StructuredMatrix.random(sm.Butterfly(), (64, 64), generator=generator(), dtype=F64).to_dense()
    assert "a butterfly matrix" in names(matrix)
    assert "a Monarch matrix" in names(matrix)
    reversal = transforms.dft(64).tensors["columns"]
    assert "a butterfly matrix in another order" in names(matrix[:, reversal])


@pytest.mark.parametrize("shape", [(32, 32), (48, 64), (33, 17), (64, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_noise_has_no_name(shape: tuple[int, int], seed: int) -> None:
    for matrix in (noise(*shape, seed=seed), torch.linalg.qr(noise(*shape, seed=seed)).Q @ noise(min(shape), shape[1])):
        assert names(matrix) == []


def test_inspect_says_it_and_draws_it() -> None:
    matrix = transforms.dct(16, orthonormal=True).to_dense()[:, shuffled(16)]
    found = sm.inspect(matrix)
    assert "cosine (type II) transform, columns reordered" in found.verdict
    assert found.measures is not None
    assert found.measures.rank == 16
    assert found.measures.density == 1.0
    assert "rank 16" in str(found)
    assert found.to_json()["traits"][0]["name"] == found.traits[0].name
    pytest.importorskip("matplotlib")
    assert found.picture().get_title() == found.traits[0].name


def test_measures() -> None:
    measures, traits = identify(make_target(torch.zeros(8, 8)), 1e-12)
    assert [trait.name for trait in traits] == ["zero"]
    assert measures.rank == 0
    measures, _ = identify(make_target(torch.block_diag(*[torch.ones(8, 8, dtype=F64)] * 4)), 1e-12)
    assert measures.rank == 4
    assert measures.block_ranks == {2: 2, 4: 1, 8: 1}
    assert measures.kronecker_rank is not None
    assert measures.kronecker_rank[0] == 1
    assert measures.bandwidth == 7
