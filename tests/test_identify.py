"""What a matrix is, with no hint: planted structures are named, noise is not."""

from __future__ import annotations

import pytest
import torch

import structmat as sm
from structmat import transforms
from structmat.compression.identify import identify
from structmat.errors import ShapeError
from structmat.projection.plus_low_rank import toeplitz_plus_low_rank
from structmat.projection.project import make_target
from structmat.projection.simultaneous import monarch_pair

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
        ("cosine (type I)", lambda n: transforms.dct(n, 1, orthonormal=True).to_dense()),
        ("cosine (type I)", lambda n: transforms.dct(n, 1).to_dense()),
        ("cosine (type II)", lambda n: transforms.dct(n, 2).to_dense()),
        ("cosine (type III)", lambda n: transforms.dct(n, 3).to_dense()),
        ("sine (type II)", lambda n: transforms.dst(n, 2).to_dense()),
        ("sine (type III)", lambda n: transforms.dst(n, 3).to_dense()),
        ("cosine (type IV)", lambda n: transforms.dct(n, 4).to_dense()),
        ("sine (type I)", lambda n: transforms.dst(n, 1).to_dense()),
        ("Hartley", lambda n: transforms.hartley(n).to_dense()),
        ("Hadamard", lambda n: transforms.hadamard(n).to_dense()),
        ("Haar", lambda n: transforms.haar(n).to_dense()),
    ],
)
def test_transforms_are_named_in_any_order(name: str, make: object) -> None:
    assert callable(make)
    matrix = make(16)
    article = "an" if name.startswith("inverse") else "a"
    assert f"{article} {name} transform" in names(matrix)
    reordered = f"{article} {name} transform, columns reordered"
    if name.startswith("inverse"):  # which is the Fourier transform, in yet another order
        reordered = "a discrete Fourier transform, columns reordered"
    assert reordered in names(matrix[:, shuffled(16)])
    assert len([n for n in names(matrix[:, shuffled(16)]) if "transform" in n]) == 1
    rows = [n for n in names(matrix[shuffled(16)]) if name.removeprefix("inverse ") in n]
    assert rows, "the rows reordered"
    if name != "Haar":
        scaled = names(matrix[:, shuffled(16)] * (1 + torch.rand(16, generator=generator(3))))
        assert f"{reordered}, columns scaled" in scaled


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


def test_columns_taken_in_turn_are_a_reordered_structure() -> None:
    blocks = torch.block_diag(*noise(4, 8, 8))
    in_turn = torch.arange(32).reshape(8, 4).T.flatten().argsort()  # column j belongs to block j mod 4
    trait = identify(make_target(blocks[:, in_turn]), 1e-12)[1][0]
    assert (trait.name, trait.family) == ("a block diagonal matrix of 4 blocks, columns taken in turn", "Reordered")
    assert trait.numbers == 256
    assert family_of(blocks[:, shuffled(32)]) == "", "an order that has to be stored"


@pytest.mark.parametrize(
    ("left", "right", "terms"), [((3, 4), (5, 6), 1), ((3, 4), (5, 6), 2), ((2, 9), (12, 2), 1), ((1, 4), (12, 6), 1)]
)
def test_kronecker_products_of_any_shapes_are_named(left: tuple[int, int], right: tuple[int, int], terms: int) -> None:
    matrix = sum(torch.kron(noise(*left, seed=k), noise(*right, seed=9 + k)) for k in range(terms))
    assert isinstance(matrix, torch.Tensor)
    name = "a Kronecker product" if terms == 1 else f"a sum of {terms} Kronecker products"
    words = f"{name} of {left[0]} x {left[1]} and {right[0]} x {right[1]} matrices"
    assert words in names(matrix)
    assert "Kronecker product" not in " ".join(names(noise(*matrix.shape)))


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


def family_of(matrix: torch.Tensor) -> str:
    traits = identify(make_target(matrix), 1e-12)[1]
    return traits[0].family if traits and traits[0].error <= 1e-12 else ""


@pytest.mark.parametrize(
    "structure",
    [
        sm.ACDC(layers=1),
        sm.ACDC(layers=1, fourier=True),
        sm.BLAST(blocks=4, rank=3),
        sm.BlockLowRank(blocks=2, rank=2),
        sm.Butterfly(),
        sm.Cauchy(),
        sm.CauchyLike(rank=3),
        sm.Circulant(),
        sm.Fastfood(),
        sm.HODLR(levels=3, rank=1),
        sm.Hankel(),
        sm.HankelLike(rank=4),
        sm.OrthogonalButterfly(),
        sm.OrthogonalPolynomial(kind="legendre"),
        sm.Pixelfly(blocks=8, strides=2, rank=1),
        sm.Toeplitz(),
        sm.ToeplitzLike(rank=4),
        sm.Vandermonde(),
        sm.VandermondeLike(rank=3),
    ],
    ids=lambda structure: type(structure).__name__,
)
def test_members_of_families_are_identified(structure: sm.Structure) -> None:
    size = 64 if isinstance(structure, sm.Pixelfly) else 32
    member = sm.StructuredMatrix.random(structure, (size, size), generator=generator(1), dtype=F64)
    moved = {
        name: tensor * (1 + 0.1 * torch.rand(tensor.shape, generator=generator(2), dtype=F64))
        if tensor.is_floating_point() and isinstance(structure, sm.Butterfly)
        else tensor
        for name, tensor in member.tensors.items()
    }
    matrix = sm.StructuredMatrix(member.structure, member.shape, moved).to_dense()
    assert family_of(matrix) == type(structure).__name__


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        (sm.CauchyLike(rank=3), 32),
        (sm.Fastfood(), 32),
        (sm.Kaleidoscope(), 64),
        (sm.LDRSubdiagonal(rank=3), 32),
        (sm.PermutedButterfly(), 32),
        (sm.Product(sm.BlockDiagonal(blocks=4), sm.Dense(), inner=4), 32),
        (sm.RelaxedButterfly(), 32),
        (sm.SoftPermutation(), 32),
        (sm.Sum(sm.LowRank(3), sm.Sparse(nonzeros=16)), 32),
        (sm.VandermondeLike(rank=3), 32),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, sm.Structure) else "",
)
def test_members_far_from_a_fresh_matrix_are_identified(structure: sm.Structure, size: int) -> None:
    """Nodes, operators, diagonals and orders of their own: nothing is left of the ones that a fresh matrix has."""
    member = sm.StructuredMatrix.random(structure, (size, size), generator=generator(3), dtype=F64)
    moved = {
        name: tensor * (0.8 + 0.4 * torch.rand(tensor.shape, generator=generator(4), dtype=F64))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in member.tensors.items()
    }
    if isinstance(structure, sm.PermutedButterfly):
        moved |= {"rows": shuffled(size, 5), "columns": shuffled(size, 6)}
    matrix = sm.StructuredMatrix(member.structure, member.shape, moved).to_dense()
    assert family_of(matrix) == type(structure).__name__


@pytest.mark.parametrize("shape", [(48, 48), (40, 57)])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_toeplitz_plus_low_rank_is_named(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The first example of the page: exactly, with the rank, and the parts themselves."""
    toeplitz = sm.StructuredMatrix.random(sm.Toeplitz(), shape, generator=generator(), dtype=dtype).to_dense()
    low = torch.randn(shape[0], 2, generator=generator(1), dtype=dtype)
    low = low @ torch.randn(2, shape[1], generator=generator(2), dtype=dtype)
    trait = identify(make_target(toeplitz + low), 1e-12)[1][0]
    assert trait.name == "a Toeplitz matrix plus rank 2"
    assert trait.error < 1e-13
    assert identify(make_target((toeplitz + low).flip(0)), 1e-12)[1][0].name == "a Hankel matrix plus rank 2"
    found = toeplitz_plus_low_rank(toeplitz + low, 1e-12)
    assert found is not None
    torch.testing.assert_close(found.structured, toeplitz, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.left @ found.right, low, rtol=0, atol=1e-11)


def test_shuffled_butterflies_and_monarch_matrices_are_put_in_order() -> None:
    rows, columns = shuffled(64, 1), shuffled(64, 2)
    butterfly = sm.StructuredMatrix.random(sm.Butterfly(), (64, 64), generator=generator(), dtype=F64).to_dense()
    for matrix in (butterfly, transforms.dft(64).to_dense(), transforms.hadamard(64).to_dense().to(F64)):
        measures, traits = identify(make_target(matrix[rows][:, columns]), 1e-12)
        assert measures.reordered_butterfly is not None
        assert measures.reordered_butterfly < 1e-14
        trait = next(t for t in traits if t.name == "a butterfly matrix, rows and columns reordered")
        assert trait.rows is not None
        assert trait.columns is not None
        shown = matrix[rows][:, columns][trait.rows][:, trait.columns]
        assert sm.project(shown, sm.Butterfly()).error < 1e-13
    patterns = ((6, 6, 6, 1), (1, 6, 6, 6))
    monarch = sm.StructuredMatrix.random(sm.Chain(patterns), (36, 36), generator=generator(), dtype=F64).to_dense()
    found = identify(make_target(monarch[shuffled(36, 1)][:, shuffled(36, 2)]), 1e-12)[0]
    assert found.reordered_monarch is not None
    assert found.reordered_monarch < 1e-14
    noisy = butterfly[rows][:, columns] + 1e-3 * noise(64, 64)
    assert identify(make_target(noisy), 1e-12)[0].reordered_butterfly is None


@pytest.mark.parametrize("shape", [(12, 12), (9, 14), (14, 9)])
def test_circulant_matrices_of_any_shape_are_named(shape: tuple[int, int]) -> None:
    matrix = sm.StructuredMatrix.random(sm.Circulant(), shape, generator=generator(), dtype=F64).to_dense()
    assert names(matrix)[0] == ("a circulant matrix" if shape[0] == shape[1] else "a corner of a circulant matrix")
    assert family_of(matrix) == "Circulant"
    toeplitz = sm.StructuredMatrix.random(sm.Toeplitz(), shape, generator=generator(), dtype=F64).to_dense()
    assert family_of(toeplitz) == "Toeplitz"


def test_measures_of_displacement() -> None:
    toeplitz = sm.StructuredMatrix.random(sm.Toeplitz(), (24, 32), generator=generator(), dtype=F64).to_dense()
    ranks = identify(make_target(toeplitz), 1e-12)[0].displacement
    assert ranks["Toeplitz"] == 2
    assert ranks["Toeplitz plus Hankel"] == 4
    assert ranks["Hankel"] > 20
    ranks = identify(make_target(toeplitz.flip(0)), 1e-12)[0].displacement
    assert ranks["Hankel"] == 2
    cauchy = sm.StructuredMatrix.random(sm.CauchyLike(rank=3), (24, 32), generator=generator(), dtype=F64).to_dense()
    measures, _ = identify(make_target(cauchy), 1e-12)
    assert measures.displacement["Cauchy"] == 3
    assert "3 (Cauchy)" in measures.sentence


@pytest.mark.parametrize(("size", "block"), [(16, 4), (64, 8), (36, 6), (24, 4), (30, 5)])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_circuits_M5_products_of_monarch_matrices_are_factored(size: int, block: int, dtype: torch.dtype) -> None:
    """``M_1 M_2^*`` is recovered to 1e-8 on random inputs."""
    rows = size // block
    structure = sm.Chain(((rows, block, block, 1), (1, rows, rows, block)))
    first, second = (
        sm.StructuredMatrix.random(structure, (size, size), generator=generator(s), dtype=dtype).to_dense()
        for s in range(2)
    )
    matrix = first @ second.mH
    found = monarch_pair(matrix, block)
    assert found is not None
    assert found.error < 1e-8
    # The three factors are what they say: products of the supports of the stages, computed densely.
    groups = torch.arange(size)
    dense = []
    for factor, label in ((found.first, groups % block), (found.middle, groups // block), (found.last, groups % block)):
        made = torch.zeros(size, size, dtype=dtype)
        for group, own in enumerate(factor):
            places = torch.nonzero(label == group)[:, 0]
            made[places[:, None], places] = own
        dense.append(made)
    product = dense[2] @ dense[1] @ dense[0]
    assert float(torch.linalg.norm(product - matrix) / torch.linalg.norm(matrix)) < 1e-8
    wrong = monarch_pair(torch.randn(size, size, generator=generator(5), dtype=dtype), block)
    assert wrong is None or wrong.error > 0.1


def test_monarch_pair_refuses_what_it_cannot_take() -> None:
    with pytest.raises(ShapeError, match="divisor of its size"):
        monarch_pair(torch.eye(12), 5)
    with pytest.raises(ShapeError, match="square matrix"):
        monarch_pair(torch.zeros(12, 6), 3)
    assert monarch_pair(torch.zeros(16, 16), 4) is None


def test_recurrences_of_any_width_are_identified() -> None:
    """A recurrence with nodes and coefficients of its own, which no classical family has."""
    member = sm.StructuredMatrix.random(sm.RecurrenceWidth(width=3), (48, 24), generator=generator(1), dtype=F64)
    jitter = torch.rand(member.tensors["steps"].shape, generator=generator(2), dtype=F64)
    moved = {**member.tensors, "steps": member.tensors["steps"] * 0.9 + 0.1 * jitter}
    matrix = sm.StructuredMatrix(member.structure, member.shape, moved).to_dense()
    trait = identify(make_target(matrix), 1e-12)[1][0]
    assert trait.name == "a matrix whose columns follow a recurrence of width 3"
    assert trait.error < 1e-12


def test_kaleidoscopes_are_named_as_products_of_monarch_matrices() -> None:
    """Which hold more: the name says that, and claims no family."""
    member = sm.StructuredMatrix.random(sm.Kaleidoscope(), (64, 64), generator=generator(1), dtype=F64)
    moved = {
        name: t * (1 + 0.1 * torch.rand(t.shape, generator=generator(2), dtype=F64))
        for name, t in member.tensors.items()
    }
    matrix = sm.StructuredMatrix(member.structure, member.shape, moved).to_dense()
    trait = next(t for t in identify(make_target(matrix), 1e-12)[1] if "transposed Monarch" in t.name)
    assert trait.error < 1e-10
    assert trait.family == ""


def test_errors_of_counted_ranks_are_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 1e-9 * torch.randn(33, 48, generator=generator, dtype=torch.float64)
    given = sm.StructuredMatrix.random(sm.BlockLowRank(4, 2), (33, 48), dtype=torch.float64, generator=generator)
    weight = given.to_dense()
    exact = {trait.family: trait for trait in sm.inspect(weight).traits}["BlockLowRank"]
    assert exact.error < 1e-14
    weight[-1] += torch.randn(48, generator=generator, dtype=torch.float64)  # a last row that is cut off from no block
    assert "BlockLowRank" not in {t.family for t in sm.inspect(weight).traits if t.error < 1e-6 and "rank 2" in t.name}
    near = sm.inspect((given.to_dense() + noise).float())
    (found,) = [trait for trait in near.traits if trait.name == exact.name]
    assert 1e-10 < found.error < 1e-6
