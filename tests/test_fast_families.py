"""Kaleidoscopes, orthogonal butterflies, permutations, Fastfood, ACDC and Pixelfly: what they are, what they hold."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import given

import structmat as sm
from structmat import transforms
from structmat.errors import ShapeError, StructureError
from structmat.learn.choices import choice_penalty, harden_choices
from structmat.projection.orders import usual_orders
from structmat.structure import count_parameters

F64, C128 = torch.float64, torch.complex128


def normal(*sizes: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def drawn(structure: sm.Structure, size: int, seed: int = 0, dtype: torch.dtype = F64) -> sm.StructuredMatrix:
    generator = torch.Generator().manual_seed(seed)
    return sm.StructuredMatrix.random(structure, (size, size), generator=generator, dtype=dtype)


# ------------------------------------------------------------------------------------------------------ kaleidoscopes


@pytest.mark.parametrize(("size", "width", "expansion"), [(8, 1, 1), (16, 2, 1), (16, 1, 4), (32, 3, 2)])
def test_circuits_K5_parameters_of_the_family(size: int, width: int, expansion: int) -> None:
    """``2 e n (w (2 L - 2) + 1)`` after merging neighbours of one stride."""
    inner = size * expansion
    levels = inner.bit_length() - 1
    structure = sm.Kaleidoscope(width, expansion)
    assert count_parameters(structure, (size, size)) == 2 * inner * (width * (2 * levels - 2) + 1)
    assert count_parameters(structure, (size, size)) <= 4 * width * inner * levels


@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_circuits_K5_the_transpose_is_a_member(size: int) -> None:
    matrix = drawn(sm.Kaleidoscope(2), size)
    names = sorted(matrix.tensors, key=lambda name: int(name.removeprefix("factor")))
    turned = {n: matrix.tensors[o].transpose(1, 2).contiguous() for n, o in zip(names, reversed(names), strict=True)}
    other = sm.StructuredMatrix(sm.Kaleidoscope(2), (size, size), turned)
    torch.testing.assert_close(other.to_dense(), matrix.to_dense().T)


@given(st.integers(1, 5), st.integers(0, 1000))
def test_circuits_K1_every_permutation_is_projected_exactly(levels: int, seed: int) -> None:
    order = torch.randperm(1 << levels, generator=torch.Generator().manual_seed(seed))
    values = normal(len(order), seed=seed)
    matrix = torch.eye(len(order), dtype=F64)[order] * values[:, None]
    found = sm.project(matrix, sm.Kaleidoscope())
    torch.testing.assert_close(found.matrix.to_dense(), matrix, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(37, 37), (5, 5), (9, 14), (14, 9), (1, 3)], ids=str)
def test_permutations_of_any_size_are_projected_exactly(shape: tuple[int, int]) -> None:
    """What padding adds is a permutation too; a rectangle keeps a part of one."""
    order = torch.randperm(max(shape), generator=torch.Generator().manual_seed(1))
    matrix = torch.eye(max(shape), dtype=F64)[order][: shape[0], : shape[1]]
    assert sm.project(matrix, sm.Kaleidoscope()).error < 1e-14


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("size", [2, 4, 32])
def test_orthogonal_kaleidoscopes_find_permutations(size: int, dtype: torch.dtype, pairs: int) -> None:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    matrix = torch.eye(size, dtype=dtype)[order] * normal(size, dtype=dtype).sgn()[:, None]
    assert sm.project(matrix, sm.OrthogonalButterfly(pairs)).error < 1e-13


def test_a_kaleidoscope_holds_both_butterflies() -> None:
    butterfly = drawn(sm.Butterfly(), 16).to_dense()
    for matrix in (butterfly, butterfly.T.contiguous()):
        assert sm.project(matrix, sm.Kaleidoscope()).error < 1e-14
        assert sm.project(matrix, sm.Kaleidoscope(2, 2)).error < 1e-13
    assert sm.project(butterfly.T.contiguous(), sm.Butterfly()).error > 0.1


def test_more_sweeps_are_never_worse_for_wide_kaleidoscopes() -> None:
    wanted = normal(5, 3, seed=3)
    errors = [sm.project(wanted, sm.Kaleidoscope(2, 2), sweeps=sweeps).error for sweeps in (0, 1, 3, 6)]
    assert errors == sorted(errors, reverse=True)


def test_an_expansion_is_a_power_of_two() -> None:
    with pytest.raises(ShapeError, match="expansion=2 or 4"):
        drawn(sm.Kaleidoscope(1, 3), 4)


# ----------------------------------------------------------------------------------------------- orthogonal butterflies


@given(st.integers(0, 5), st.integers(0, 2), st.integers(0, 1000))
def test_orthogonal_for_all_parameters(levels: int, pairs: int, seed: int) -> None:
    size = 1 << levels
    for dtype in (F64, C128):
        matrix = drawn(sm.OrthogonalButterfly(pairs), size, seed, dtype).to_dense()
        torch.testing.assert_close(matrix @ matrix.mH, torch.eye(size, dtype=dtype), rtol=0, atol=1e-13 * size)


def test_circuits_B3_it_stays_orthogonal_under_any_optimizer() -> None:
    layer = sm.nn.StructuredLinear(32, 32, False, structure=sm.OrthogonalButterfly(), dtype=F64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    x = normal(64, 32)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
    matrix = layer.matrix.to_dense().detach()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(32, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_members_of_the_orthogonal_class(size: int) -> None:
    hadamard = transforms.hadamard(size).to_dense() / size**0.5
    assert sm.project(hadamard, sm.OrthogonalButterfly()).error < 1e-13
    dft = transforms.dft(size, orthonormal=True)
    arranged = dft.to_dense()[:, dft.tensors["columns"]]
    assert sm.project(arranged, sm.OrthogonalButterfly()).error < 1e-13
    member = drawn(sm.OrthogonalButterfly(), size, seed=4)
    found = sm.project(member.to_dense(), sm.OrthogonalButterfly(), sweeps=50)
    assert found.error < 1e-10


def test_coordinate_descent_is_no_worse_with_more_sweeps() -> None:
    weight = normal(16, 16)
    errors = [sm.project(weight, sm.OrthogonalButterfly(1), sweeps=sweeps).error for sweeps in (0, 1, 5, 30)]
    assert errors == sorted(errors, reverse=True)
    for size in (3, 12):
        with pytest.raises(ShapeError, match="power of two"):
            drawn(sm.OrthogonalButterfly(), size)


# ------------------------------------------------------------------------------------------------------- permutations


@given(st.integers(1, 5), st.integers(0, 1000))
def test_assignment_is_the_best_of_all_permutations(size: int, seed: int) -> None:
    weight = normal(size, size, seed=seed)
    found = sm.project(weight, sm.Permutation())
    eye = torch.eye(size, dtype=F64)
    best = min(float(torch.linalg.norm(weight - eye[list(p)])) for p in itertools.permutations(range(size)))
    assert found.error * float(torch.linalg.norm(weight)) == pytest.approx(best, rel=1e-12)
    assert found.certificate.value == "optimal"


@pytest.mark.parametrize("size", [64, 256])
def test_a_hidden_permutation_is_recovered_from_noisy_pairs(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(size, generator=generator)
    x = torch.randn(size // 4, size, generator=generator, dtype=F64)
    y = x[:, order] + 0.1 * torch.randn(size // 4, size, generator=generator, dtype=F64)
    found = sm.project(y.T @ x / len(x), sm.Permutation())
    assert torch.equal(found.matrix.tensors["order"], order)


@pytest.mark.parametrize("structure", [sm.SoftPermutation(), sm.SoftPermutation(200)], ids=str)
def test_soft_permutations_are_doubly_stochastic(structure: sm.Structure) -> None:
    matrix = drawn(structure, 16).to_dense()
    assert bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(0), torch.ones(16, dtype=F64), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.sum(1), torch.ones(16, dtype=F64), rtol=0, atol=1e-6)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    hard = torch.eye(16, dtype=F64)[order]
    found = sm.project(hard, structure)
    assert found.error < 1e-12
    assert float(structure.penalty((16, 16), found.matrix.tensors)) < 1e-12
    assert float(structure.penalty((16, 16), drawn(structure, 16).tensors)) > 0.1
    decided, tensors = structure.harden((16, 16), found.matrix.tensors)
    assert decided == sm.Permutation()
    assert torch.equal(tensors["order"], order)


@pytest.mark.parametrize(("structure", "rate"), [(sm.SoftPermutation(20), 0.2), (sm.SoftPermutation(), 0.2)], ids=str)
def test_a_hidden_permutation_is_learned_by_gradient(structure: sm.Structure, rate: float) -> None:
    """With the penalty rising, the layer ends at a permutation and hardens without a change."""
    size = 8
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    x = normal(128, size, seed=3)
    reached = False
    for seed in range(4):  # the search is not convex
        generator = torch.Generator().manual_seed(seed)
        layer = sm.nn.StructuredLinear(size, size, False, structure=structure, dtype=F64, generator=generator)
        optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
        for step in range(150):
            optimizer.zero_grad()
            penalty = layer.structure.penalty((size, size), layer.tensors())
            assert penalty is not None
            loss = (layer(x) - x[:, order]).square().mean() + step / 150 * penalty
            loss.backward()
            optimizer.step()
        hard = layer.harden()
        assert hard.structure == sm.Permutation()
        reached = reached or torch.equal(hard.matrix.tensors["order"], order)
    assert reached


# ------------------------------------------------------------------------------------------------- relaxed butterflies


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [4, 8, 32])
def test_circuits_B5_relaxed_permutation(size: int, shared: bool) -> None:
    structure = sm.RelaxedButterfly(shared=shared)
    matrix = drawn(structure, size)
    eye = {
        name: torch.eye(2, dtype=F64)[None, :, :, None].expand(t.shape).clone()
        for name, t in matrix.tensors.items()
        if name != "logits0"
    }
    logits = matrix.tensors["logits0"]

    def permutation(logits: torch.Tensor) -> torch.Tensor:
        return sm.StructuredMatrix(structure, (size, size), {**eye, "logits0": logits}).to_dense()

    soft = permutation(logits)
    torch.testing.assert_close(soft.sum(0), torch.ones(size, dtype=F64))
    torch.testing.assert_close(soft.sum(1), torch.ones(size, dtype=F64))
    assert bool((soft >= 0).all())
    signs = torch.tensor([100.0, -100.0, -100.0], dtype=F64).expand(logits.shape)
    reversal = usual_orders(size, [2] * (size.bit_length() - 1))["bit reversal"]
    torch.testing.assert_close(permutation(signs), torch.eye(size, dtype=F64)[reversal], rtol=0, atol=1e-15)
    # Evens ascending, then odds descending: at the first level alone, where levels have logits of their own.
    if not shared:
        first = torch.full_like(logits, -100.0)
        first[0] = torch.tensor([100.0, -100.0, 100.0])
        folded = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2).flip(0)])
        torch.testing.assert_close(permutation(first), torch.eye(size, dtype=F64)[folded], rtol=0, atol=1e-15)


def polished(layer: sm.nn.StructuredLinear, wanted: torch.Tensor) -> None:
    polish = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        polish.zero_grad()
        loss = (layer.matrix.to_dense() - wanted).abs().square().mean()
        loss.backward()
        return loss

    polish.step(closure)


def learned(structure: sm.Structure, wanted: torch.Tensor, seeds: int, steps: int, rate: float) -> float:
    """The least root mean square error of a few random starts: Adam, rounding, Adam for the factors alone, L-BFGS."""
    size, best = len(wanted), float("inf")
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        layer = sm.nn.StructuredLinear(size, size, False, structure=structure, dtype=wanted.dtype, generator=generator)
        for phase in ("soft", "hard"):
            optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
            for step in range(steps):
                optimizer.zero_grad()
                loss = (layer.matrix.to_dense() - wanted).abs().square().mean()
                if phase == "soft":
                    penalty = layer.structure.penalty((size, size), layer.tensors())
                    assert penalty is not None
                    loss = loss + 0.02 * step / steps * penalty
                loss.backward()
                optimizer.step()
            layer = layer.harden() if phase == "soft" else layer
        polished(layer, wanted)
        best = min(best, float((layer.matrix.to_dense() - wanted).abs().square().mean().sqrt().detach()))
        if best < 1e-4:
            break
    return best


def test_bp_learns_the_fourier_transform() -> None:
    wanted = transforms.dft(8, orthonormal=True).to_dense()
    assert learned(sm.RelaxedButterfly(shared=True), wanted, seeds=8, steps=150, rate=0.05) < 1e-4


def test_bp_finds_a_cosine_transform_from_its_permutation() -> None:
    """The exact member is a fixed point of rounding: hardening changes nothing."""
    member = transforms.dct(8)
    inner = sm.RelaxedButterfly(twice=True)
    start = sm.StructuredMatrix.random(sm.RealPart(inner), (8, 8), dtype=F64)
    tensors = {name: t.clone() for name, t in start.tensors.items()}
    for i in range(3):
        tensors[f"factor0_{i}"] = member.tensors[f"factor{i}"]
    # evens, then odds backwards, then the bit reversal of both halves
    tensors["logits0"] = torch.tensor([[9.0, -9.0, 9.0], *[[9.0, -9.0, -9.0]] * 2], dtype=F64) * 10
    soft = sm.StructuredMatrix(sm.RealPart(inner), (8, 8), tensors)
    torch.testing.assert_close(soft.to_dense(), member.to_dense())
    hard, kept = soft.structure.harden((8, 8), soft.tensors)
    assert hard == sm.RealPart(sm.PermutedButterfly())
    torch.testing.assert_close(sm.StructuredMatrix(hard, (8, 8), kept).to_dense(), member.to_dense())


def test_two_pairs_harden_to_a_product() -> None:
    structure = sm.RelaxedButterfly(2)
    matrix = drawn(structure, 8)
    tensors = {n: t.sign() * 100 if n.startswith("logits") else t for n, t in matrix.tensors.items()}
    soft = sm.StructuredMatrix(structure, (8, 8), tensors)
    hard, kept = structure.harden((8, 8), tensors)
    torch.testing.assert_close(sm.StructuredMatrix(hard, (8, 8), kept).to_dense(), soft.to_dense())


# ------------------------------------------------------------------------------------------------- finding permutations


@pytest.mark.parametrize("size", [8, 16, 64, 512])
@pytest.mark.parametrize("number", range(8))
def test_circuits_H4_fourier_transform_after_a_shared_permutation(size: int, number: int) -> None:
    order = torch.arange(size)
    for level in range(size.bit_length() - 2):
        inner = torch.arange(size >> level)
        inner = torch.cat([inner[::2], inner[1::2]]) if number & 4 else inner
        first, second = inner.split(len(inner) // 2)
        inner = torch.cat([first.flip(0) if number & 2 else first, second.flip(0) if number & 1 else second])
        order = order[(torch.arange(0, size, len(inner))[:, None] + inner).flatten()]
    dft = transforms.dft(size)
    butterfly = dft.to_dense()[:, dft.tensors["columns"]]
    hidden = butterfly[:, torch.argsort(order)]
    found = sm.project(hidden, sm.PermutedButterfly(), sweeps=0)
    assert found.error < 1e-13


@pytest.mark.parametrize("size", [8, 12, 60, 128])
def test_transforms_in_their_own_order_are_found(size: int) -> None:
    assert sm.project(transforms.dft(size).to_dense(), sm.PermutedButterfly()).error < 1e-13
    assert sm.project(transforms.dft(size, inverse=True).to_dense(), sm.PermutedButterfly()).error < 1e-13
    if size & (size - 1) == 0:
        for member in (transforms.hadamard(size), transforms.walsh(size)):
            assert sm.project(member.to_dense(), sm.PermutedButterfly()).error < 1e-13


def test_noise_is_no_butterfly() -> None:
    found = sm.project(normal(64, 64), sm.PermutedButterfly())
    assert 0.8 < found.error <= sm.project(normal(64, 64), sm.Butterfly()).error + 1e-12


# -------------------------------------------------------------------------------------------- Fastfood, ACDC, Pixelfly


def test_fastfood_is_its_product() -> None:
    matrix = drawn(sm.Fastfood(), 16)
    h = torch.from_numpy(scipy.linalg.hadamard(16).astype(float))
    b, g, s = (torch.diag(matrix.tensors[name]) for name in ("signs", "gains", "scales"))
    order = torch.eye(16, dtype=F64)[matrix.tensors["order"]]
    torch.testing.assert_close(matrix.to_dense(), s @ h @ g @ order @ h @ b)
    rows = matrix.to_dense()
    assert float(rows.square().mean()) == pytest.approx(1 / 3 / 16, rel=0.5)


def test_acdc_is_its_product() -> None:
    matrix = drawn(sm.ACDC(2), 12)
    c = torch.from_numpy(scipy.fft.dct(np.eye(12), norm="ortho", axis=0))
    wanted = torch.eye(12, dtype=F64)
    for layer in range(2):
        if layer:
            wanted = wanted[matrix.tensors[f"order{layer}"]]
        a, d = (torch.diag(matrix.tensors[f"{name}{layer}"]) for name in ("a", "d"))
        wanted = c.T @ d @ c @ a @ wanted
    torch.testing.assert_close(matrix.to_dense(), wanted)


@pytest.mark.parametrize("size", [1, 5, 8])
def test_afdf_holds_convolutions(size: int) -> None:
    kernel = normal(size)
    ones = torch.tensor([1.0, 0.0], dtype=F64).expand(size, 2)
    spectrum = torch.view_as_real(torch.fft.fft(kernel).to(C128))
    matrix = sm.StructuredMatrix(sm.ACDC(1, True), (size, size), {"a0": ones, "d0": spectrum})
    torch.testing.assert_close(matrix.to_dense(), torch.from_numpy(scipy.linalg.circulant(kernel)))


@given(st.integers(8, 40), st.integers(8, 40), st.sampled_from([2, 4, 8]), st.integers(0, 100))
def test_pixelfly_members_are_recovered(rows: int, columns: int, blocks: int, seed: int) -> None:
    structure = sm.Pixelfly(blocks, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    weight = sm.StructuredMatrix.random(structure, (rows, columns), generator=generator, dtype=F64).to_dense()
    found = sm.project(weight, structure, sweeps=300)
    assert found.error < 0.2
    errors = [sm.project(weight, structure, sweeps=sweeps).error for sweeps in (0, 5, 50)]
    assert errors == sorted(errors, reverse=True)


def test_pixelfly_support() -> None:
    """Block (i, j) is there where i and j differ in none or in one binary digit."""
    structure = sm.Pixelfly(8, None, 1)
    tensors = {n: torch.ones_like(t) for n, t in drawn(structure, 16).tensors.items()}
    tensors["left"] = torch.zeros_like(tensors["left"])
    matrix = sm.StructuredMatrix(structure, (16, 16), tensors).to_dense()
    for i, j in itertools.product(range(8), repeat=2):
        wanted = 1.0 if (i ^ j).bit_count() <= 1 else 0.0
        assert bool((matrix[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] == wanted).all())
    with pytest.raises(StructureError, match="blocks=4 or 8"):
        sm.Pixelfly(6)
    with pytest.raises(StructureError, match="strides=3 or fewer"):
        sm.Pixelfly(8, 4)


def test_real_part_improves_on_the_real_projection() -> None:
    weight = transforms.hartley(16).to_dense()
    plain = sm.project(weight, sm.Kaleidoscope(), sweeps=5).error
    assert sm.project(weight, sm.RealPart(sm.Kaleidoscope()), sweeps=5).error <= plain + 1e-9
    with pytest.raises(StructureError, match="real already"):
        sm.RealPart(sm.SoftPermutation())


def test_by_default_compress_keeps_to_the_usual_families() -> None:
    from structmat.compression.candidates import families_of

    names = {family.__name__ for family in families_of(None)}
    assert {"LowRank", "Monarch", "Butterfly"} <= names
    assert not names & {"Permutation", "Kaleidoscope", "RelaxedButterfly", "ACDC", "Fastfood", "RealPart"}
    assert families_of(["Kaleidoscope"]) == [sm.Kaleidoscope]


def test_choices_of_a_model_are_made_in_place() -> None:
    soft = sm.nn.StructuredLinear(8, 8, structure=sm.SoftPermutation(), dtype=F64)
    plain = sm.nn.StructuredLinear(8, 4, structure=sm.LowRank(2), dtype=F64)
    model = torch.nn.Sequential(soft, torch.nn.ReLU(), torch.nn.Sequential(plain))
    penalty = choice_penalty(model)
    assert float(penalty.detach()) > 0
    penalty.backward()
    assert soft.logits0.grad is not None
    assert harden_choices(model) is model
    assert model[0].structure == sm.Permutation()
    assert model[2][0] is plain
    assert float(choice_penalty(model)) == 0
    torch.testing.assert_close(model[0].bias, soft.bias)
