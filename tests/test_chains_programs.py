"""Chains of contractions: checks circuits_S1 to S4, B3, B4, H1 to H3, exact members, and program passes."""

import itertools
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structmat as sm
from structmat.program import (
    FOR_REFERENCE,
    Chain,
    Contraction,
    Crop,
    Pad,
    Program,
    Shuffle,
    Sum,
    apply,
    chainable,
    cost,
    fuse,
    merge,
    merged_pattern,
    simplify,
    stages,
    tensor_sizes,
    transpose,
)
from structmat.projection.hierarchical import dense_product, factorize, product_pattern, restrict, split_errors, sweep
from structmat.projection.project import make_target
from structmat.projection.refine import refine
from structmat.projection.target import Certificate
from structmat.sizes import even_factors, smallest_chain, smooth_size
from structmat.transforms import fourier, hadamard

Tensors = dict[str, Tensor]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(program: Program, tensors: Tensors) -> Tensor:
    dtype = next(iter(tensors.values())).dtype
    return apply(program, tensors, torch.eye(program.in_features, dtype=dtype)).T


def by_definition(stage: Contraction, tensor: Tensor) -> Tensor:
    """The matrix of a contraction, entry by entry."""
    a, b, c, d = stage.pattern
    weight = tensor.expand(stage.pattern)
    matrix = torch.zeros(a, b, d, a, c, d, dtype=tensor.dtype)
    for group, offset in itertools.product(range(a), range(d)):
        matrix[group, :, offset, group, :, offset] = weight[group, :, :, offset]
    return matrix.reshape(a * b * d, a * c * d)


sizes = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(a=sizes, b=sizes, c=sizes, d=sizes, shared=st.tuples(st.booleans(), st.booleans()), is_complex=st.booleans())
def test_circuits_S1_contraction(a: int, b: int, c: int, d: int, shared: tuple[bool, bool], is_complex: bool) -> None:
    stage = Contraction("w", a, b, c, d, *shared)
    dtype = torch.complex128 if is_complex else torch.float64
    weight = gaussian(*stage.stored_shape, dtype=dtype).requires_grad_()
    matrix = by_definition(stage, weight)
    x = gaussian(3, a * c * d, seed=1, dtype=dtype).requires_grad_()
    y = apply(stage, {"w": weight}, x)
    torch.testing.assert_close(y, x @ matrix.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense(transpose(stage), {"w": weight}), matrix.T, rtol=1e-12, atol=1e-12)
    g = gaussian(3, a * b * d, seed=2, dtype=dtype)
    got, wanted = torch.autograd.grad(y, (x, weight), g), torch.autograd.grad(x @ matrix.T, (x, weight), g)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert stage.multiplications == a * b * c * d
    assert cost(stage).parameters == weight.numel()


@pytest.mark.parametrize("pattern", [(2, 3, 2, 1), (1, 2, 5, 2), (2, 2, 2, 3)])
def test_circuits_S1_gradcheck(pattern: tuple[int, int, int, int]) -> None:
    stage = Contraction("w", *pattern)
    weight = gaussian(*pattern).requires_grad_()
    x = gaussian(2, stage.in_features, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, v: apply(stage, {"w": w}, v), (weight, x))
    assert torch.autograd.gradgradcheck(lambda w, v: apply(stage, {"w": w}, v), (weight, x))


@settings(max_examples=60, deadline=None)
@given(
    a1=st.integers(1, 3), b1=st.integers(1, 4), c2=st.integers(1, 4), d2=st.integers(1, 3),
    outer=st.integers(1, 3), inner=st.integers(1, 3), rank=st.integers(1, 3),
)  # fmt: skip
def test_circuits_S2_chainable_pairs(a1: int, b1: int, c2: int, d2: int, outer: int, inner: int, rank: int) -> None:
    left = Contraction("left", a1, b1, outer * rank, inner * d2)
    right = Contraction("right", a1 * outer, rank * inner, c2, d2)
    assert chainable(right, left) == rank
    tensors = {"left": gaussian(*left.pattern), "right": gaussian(*right.pattern, seed=1)}
    product = dense(Chain((right, left)), tensors)
    pattern = merged_pattern(right, left)
    merged = merge(right, left, tensors)
    assert merged.shape == pattern
    torch.testing.assert_close(by_definition(Contraction("m", *pattern), merged), product, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(restrict(product, pattern), merged, rtol=1e-11, atol=1e-11)
    blocks = merged.reshape(a1, b1, inner, outer, c2, d2).permute(0, 2, 3, 5, 1, 4)
    assert int(torch.linalg.matrix_rank(blocks, rtol=1e-9).max()) <= rank


def test_circuits_S2_not_chainable() -> None:
    assert chainable(Contraction("x", 1, 4, 4, 1), Contraction("y", 2, 2, 2, 1)) is None
    with pytest.raises(sm.StructmatError, match="not chainable"):
        sm.Chain(((1, 4, 4, 1), (2, 2, 2, 1)))
    with pytest.raises(sm.StructmatError, match="no pattern"):
        sm.Chain(((1, 4, 4),))
    with pytest.raises(sm.StructmatError, match="Leave them out"):
        sm.project(gaussian(8, 8), sm.Chain(((1, 4, 4, 1),)))


def dimension(program: Program) -> int:
    """Dimension of the set of matrices of a program: the rank of the derivative at a generic point."""
    sizes = tensor_sizes(program)
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(sum(sizes.values()), generator=g, dtype=torch.float64)

    def dense(parameters: Tensor) -> Tensor:
        parts = dict(zip(sizes, parameters.split(list(sizes.values())), strict=True))
        return apply(program, parts, torch.eye(program.in_features, dtype=torch.float64)).flatten()

    jacobian = torch.autograd.functional.jacobian(dense, flat)
    assert isinstance(jacobian, Tensor)
    return int(torch.linalg.matrix_rank(jacobian, rtol=1e-9))


def butterfly(size: int, prefix: str = "up") -> Chain:
    strides = [2**level for level in range(size.bit_length() - 1)]
    return Chain(tuple(Contraction(f"{prefix}{s}", size // (2 * s), 2, 2, s) for s in strides))


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_circuits_S3_dimension_of_butterfly_and_kaleidoscope_matrices(levels: int) -> None:
    """Of ``2 n log2 n`` numbers, one at each of the n coordinates between two stages is a matter of scaling."""
    size = 2**levels
    assert dimension(butterfly(size)) == size * (levels + 1) == {4: 12, 8: 32, 16: 80}[size]
    starred = transpose(butterfly(size, "down"))
    both = Chain((starred, butterfly(size)))
    assert dimension(both) == 2 * size * levels == {4: 16, 8: 48, 16: 128}[size]


@pytest.mark.parametrize(("size", "block"), [(4, 2), (12, 3), (12, 4), (16, 4), (15, 5)])
def test_circuits_S3_dimension_of_monarch_matrices(size: int, block: int) -> None:
    blocks = size // block
    within, across = Contraction("r", blocks, block, block, 1), Contraction("l", 1, blocks, blocks, block)
    assert dimension(Chain((within, across))) == size * block + size * blocks - size


@pytest.mark.parametrize("shape", [(16, 16), (12, 12), (16, 64), (36, 24)])
def test_circuits_S4_transpose_and_inverse(shape: tuple[int, int]) -> None:
    s = sm.StructuredMatrix.random(sm.Butterfly(), shape, dtype=torch.float64)
    torch.testing.assert_close(s.T.to_dense(), s.to_dense().T, rtol=1e-12, atol=1e-13)
    assert s.T.T.program == s.program
    assert s.T.macs == s.macs
    if shape[0] == shape[1]:  # the inverse: the chain reversed, every block inverted
        chain = [stage for stage in stages(s.program) if isinstance(stage, Contraction)]
        inverse = {
            stage.weight: torch.linalg.inv(s.tensors[stage.weight].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            for stage in chain
        }
        product = dense(Chain(tuple(reversed(chain))), inverse) @ s.to_dense()
        torch.testing.assert_close(product, torch.eye(shape[0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [8, 64, 256])
def test_circuits_B3_orthogonal_start(n: int) -> None:
    s = sm.StructuredMatrix.random(
        sm.Butterfly(), (n, n), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    m = s.to_dense() * 3**0.5
    assert float((m.T @ m - torch.eye(n)).abs().max()) < 1e-13 * n
    x = gaussian(4, n)
    single = (s.to(dtype=torch.float32) @ x.float().T).double()
    exact = s @ x.T
    assert float((single - exact).norm() / exact.norm()) < 1e-6


def test_circuits_B4_strides_fusion_and_count() -> None:
    n = 256
    s = sm.StructuredMatrix.random(sm.Butterfly(), (n, n), dtype=torch.float64)
    chain = stages(s.program)
    assert [stage.pattern for stage in chain] == [(n // (2 * t), 2, 2, t) for t in (1, 2, 4, 8, 16, 32, 64, 128)]
    assert s.flops == 3 * n * 8
    assert s.num_parameters == 2 * n * 8
    program, tensors = fuse(s.program, dict(s.tensors))
    assert [stage.pattern for stage in stages(program)] == [(16, 16, 16, 1), (1, 16, 16, 16)]
    torch.testing.assert_close(dense(program, tensors), s.to_dense(), rtol=1e-12, atol=1e-13)


CHAINS = [
    smallest_chain((16, 16)),
    smallest_chain((12, 36)),
    smallest_chain((64, 32), 3, 2),
    ((4, 2, 3, 1), (2, 3, 2, 2)),
    ((2, 4, 6, 3), (1, 6, 4, 6), (1, 2, 2, 18)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("patterns", CHAINS)
def test_circuits_H1_exact_recovery(patterns: tuple[tuple[int, int, int, int], ...], dtype: torch.dtype) -> None:
    member = dense_product([gaussian(*p, seed=i, dtype=dtype) for i, p in enumerate(patterns)], patterns)
    for splits in itertools.permutations(range(1, len(patterns))):
        for orthonormal in (True, False):
            found = dense_product(factorize(member, patterns, splits=splits, orthonormal=orthonormal), patterns)
            assert float((found - member).norm() / member.norm()) < 1e-12
    assert max(split_errors(member, patterns)) < 1e-12 * float(member.norm())


@pytest.mark.parametrize("noise", [0.1, None])
@pytest.mark.parametrize("patterns", [*CHAINS, smallest_chain((64, 64))])
def test_circuits_H2_certificates(patterns: tuple[tuple[int, int, int, int], ...], noise: float | None) -> None:
    random = gaussian(*dense_product([torch.zeros(p) for p in patterns], patterns).shape, seed=99)
    if noise is None:
        a = random
    else:
        member = dense_product([gaussian(*p, seed=i) for i, p in enumerate(patterns)], patterns)
        a = member + noise * random * member.norm() / random.norm()
    errors, count = split_errors(a, patterns), len(patterns)
    low, high = max(errors), math.hypot(*errors)
    slack = 1e-9 * float(a.norm())
    found = []
    for splits in (range(1, count), range(count - 1, 0, -1)):
        found.append(float((dense_product(factorize(a, patterns, splits=splits), patterns) - a).norm()))
        assert low - slack <= found[-1] <= high + slack
    for splits in itertools.islice(itertools.permutations(range(1, count)), 0, 24):
        found.append(float((dense_product(factorize(a, patterns, splits=splits), patterns) - a).norm()))
    assert low - slack <= min(found)
    assert max(found) <= max(1, count - 1) * min(found) + slack


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("patterns", CHAINS)
def test_circuits_H3_sweep(patterns: tuple[tuple[int, int, int, int], ...], dtype: torch.dtype) -> None:
    shape = dense_product([torch.zeros(p) for p in patterns], patterns).shape
    a = gaussian(*shape, dtype=dtype)
    factors = factorize(a, patterns)
    error = float((dense_product(factors, patterns) - a).norm())
    for _ in range(4):
        factors = sweep(a, factors, patterns)
        rest = a - dense_product(factors, patterns)
        assert float(rest.norm()) <= error * (1 + 1e-12)
        error = float(rest.norm())
        # the factor that was solved last is optimal: the gradient of the error in it vanishes
        others = dense_product(factors[1:], patterns[1:]) if len(factors) > 1 else torch.eye(shape[0], dtype=dtype)
        assert float(restrict(others.mH @ rest, patterns[0]).norm()) < 1e-10 * float(a.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(
    "structure", [sm.LowRank(2), sm.Monarch(2, 1), sm.Butterfly(), sm.TensorTrain(3), sm.BlockTensorTrain(1)]
)
@pytest.mark.parametrize("shape", [(12, 16), (11, 13)])
def test_refinement_never_increases_the_error(
    structure: sm.Structure, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    from structmat.structure import resolve

    w, x = (
        gaussian(*shape, dtype=dtype),
        gaussian(40, shape[1], dtype=dtype) @ gaussian(shape[1], shape[1], dtype=dtype),
    )
    structure = resolve(structure, shape)
    target = make_target(w, x.mH @ x).padded(structure.native_shape(shape))
    program = structure.program(target.native)
    generator = torch.Generator().manual_seed(0)
    tensors = sm.StructuredMatrix.random(structure, shape, generator=generator, dtype=dtype).tensors
    errors = [target.error(sm.StructuredMatrix(structure, shape, tensors).to_dense())]
    for _ in range(5):
        tensors = refine(program, tensors, target, 1)
        errors.append(target.error(sm.StructuredMatrix(structure, shape, tensors).to_dense()))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_refinement_of_low_rank_reaches_the_optimum() -> None:
    w, x = gaussian(12, 16), gaussian(40, 16, seed=1) @ gaussian(16, 16, seed=2)
    target = make_target(w, x.mT @ x)
    tensors = sm.StructuredMatrix.random(sm.LowRank(3), (12, 16), dtype=torch.float64).tensors
    for _ in range(10):
        tensors = refine(sm.LowRank(3).program((12, 16)), tensors, target, 50)
    reached = target.error(sm.StructuredMatrix(sm.LowRank(3), (12, 16), tensors).to_dense()) / target.norm()
    best = sm.project(w, sm.LowRank(3), second_moment=x.mT @ x)
    assert best.error - 1e-12 <= reached <= 1.01 * best.error


def test_refinement_of_a_sum() -> None:
    program = Sum((sm.LowRank(2).program((12, 12)), Contraction("diagonal", 12, 1, 1, 1)))
    truth = {"left": gaussian(12, 2), "right": gaussian(2, 12, seed=1), "diagonal": gaussian(12, 1, 1, 1, seed=2)}
    target = make_target(dense(program, truth))
    start = {name: tensor + 0.1 * gaussian(*tensor.shape, seed=9) for name, tensor in truth.items()}
    better = refine(program, start, target, 40)
    assert target.error(dense(program, better)) < 0.1 * target.error(dense(program, start))


@pytest.mark.parametrize(
    ("shape", "structure"),
    [((16, 16), sm.TensorTrain(4, 2)), ((64, 27), sm.TensorTrain(3)), ((17, 30), sm.TensorTrain(2))],
)
def test_tensor_train_projection(shape: tuple[int, int], structure: sm.Structure) -> None:
    w = gaussian(*shape)
    found = sm.project(w, structure)
    cores = found.matrix.structure.cores
    assert found.lower_bound <= found.error <= 1
    if found.certificate is Certificate.OPTIMAL:
        assert cores == 2
        assert found.error == pytest.approx(found.lower_bound, rel=1e-12)
    again = sm.project(found.matrix.to_dense(), structure)
    assert again.lower_bound <= again.error + 1e-12
    if found.matrix.structure.native_shape(shape) == shape:
        assert again.error < 1e-12
        tensors = {name: gaussian(*t.shape, seed=3) for name, t in found.matrix.tensors.items()}
        member = sm.StructuredMatrix(structure, shape, tensors)
        m, n = member.structure.out_factors, member.structure.in_factors
        full = torch.ones(1, 1, 1, dtype=torch.float64)
        for k in range(cores):
            full = torch.einsum("ijr,rabs->iajbs", full, tensors[f"core{k}"]).reshape(
                math.prod(m[: k + 1]), math.prod(n[: k + 1]), -1
            )
        torch.testing.assert_close(member.to_dense(), full[..., 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 8, 12, 30, 49, 60])
def test_exact_members_fourier(size: int) -> None:
    s, order = fourier(size)
    dft = torch.fft.fft(torch.eye(size, dtype=torch.complex128))
    torch.testing.assert_close(s.to_dense(), dft[:, order], rtol=0, atol=1e-12)
    x = gaussian(size, dtype=torch.complex128)
    torch.testing.assert_close(s @ x[order], torch.fft.fft(x), rtol=0, atol=1e-11)
    assert sm.project(dft[:, order], s.structure).error < 1e-12


@pytest.mark.parametrize("radices", [(2, 3, 4), (4, 3, 2), (5, 3), (16, 16), (2, 2, 2, 2)])
def test_exact_members_mixed_radix(radices: tuple[int, ...]) -> None:
    s, order = fourier(math.prod(radices), radices=radices)
    dft = torch.fft.fft(torch.eye(math.prod(radices), dtype=torch.complex128))
    torch.testing.assert_close(s.to_dense(), dft[:, order], rtol=0, atol=1e-11)
    with pytest.raises(sm.StructmatError, match="multiply to it"):
        fourier(7, radices=(2, 3))


@pytest.mark.parametrize("size", [2, 4, 32])
def test_exact_members_hadamard(size: int) -> None:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    assert torch.equal(hadamard(size).to_dense(), h)
    assert sm.project(h, sm.Butterfly()).error < 1e-13
    with pytest.raises(sm.StructmatError, match="power of two"):
        hadamard(size + 1)


# ------------------------------------------------------------------------------------------------- program passes


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, Tensors]:
    """A chain of contractions with paddings, shuffles and sums between them."""
    size, steps, tensors = draw(st.integers(1, 12)), [], {}
    for number in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["contraction", "pad", "crop", "shuffle", "sum"]))
        if kind == "contraction" or kind == "sum":
            a = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            d = draw(st.sampled_from([n for n in range(1, size // a + 1) if size // a % n == 0]))
            pattern = (a, draw(st.integers(1, 3)), size // (a * d), d)
            stage = Contraction(f"w{number}", *pattern)
            tensors[f"w{number}"] = gaussian(*pattern, seed=number)
            steps.append(
                Sum((stage, Chain((stage, Crop(stage.out_features, stage.out_features))))) if kind == "sum" else stage
            )
        elif kind == "pad":
            steps.append(Pad(size, size + draw(st.integers(0, 3))))
        elif kind == "crop":
            steps.append(Crop(size, draw(st.integers(1, size))))
        else:
            first = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            steps.append(Shuffle((first, size // first), (1, 0)))
        size = steps[-1].out_features
    return Chain(tuple(steps)), {**tensors, "unused": torch.zeros(1, dtype=torch.float64)}


@settings(max_examples=80, deadline=None)
@given(programs())
def test_passes_keep_the_matrix(case: tuple[Program, Tensors]) -> None:
    program, tensors = case
    matrix = dense(program, tensors)
    assert transpose(transpose(program)) == program
    torch.testing.assert_close(dense(transpose(program), tensors), matrix.T, rtol=1e-11, atol=1e-11)
    simple = simplify(program)
    assert simplify(simple) == simple
    assert len(stages(simple)) <= len(stages(program))
    torch.testing.assert_close(dense(simple, tensors), matrix, rtol=1e-11, atol=1e-11)
    for growth in (1.0, 2.0, 8.0):
        fused, own = fuse(program, tensors, replace(FOR_REFERENCE, growth=growth))
        merged = apply(fused, own, torch.eye(program.in_features, dtype=torch.float64)).T
        torch.testing.assert_close(merged, matrix, rtol=1e-11, atol=1e-11)
        assert cost(fused).multiplications <= growth * cost(program).multiplications
        assert "unused" not in own


# -------------------------------------------------------------------------------------------------------- sizes


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), count=st.integers(2, 3))
def test_sizes(size: int, count: int) -> None:
    factors = even_factors(size, count)
    assert math.prod(factors) >= size
    assert factors == tuple(sorted(factors))
    assert factors[-1] <= 4 * factors[0]
    smooth = smooth_size(size)
    assert smooth >= size
    rest = smooth
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    assert rest == 1
    assert size < 8 or smooth <= 1.16 * size  # 15 for 13 is the farthest


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 300), width=st.integers(1, 300))
def test_smallest_chain_is_chainable_and_small(out: int, width: int) -> None:
    shape = (smooth_size(out), smooth_size(width))
    patterns = smallest_chain(shape)
    assert product_pattern(patterns) == (1, *shape, 1)
    assert sum(math.prod(p) for p in patterns) <= shape[0] * shape[1]
    widths = [shape[1], *(a * b * d for a, b, _, d in patterns)]
    assert widths in (sorted(widths), sorted(widths, reverse=True))
