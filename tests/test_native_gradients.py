"""The native backend's gradients: those of the reference, for every stage, dtype, instruction set and batch."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator, Mapping

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from instruction_sets import every, printed_by
from native_programs import programs, tensors_of
from torch import Tensor
from torch.autograd import forward_ad

import structmat as sm
from structmat.kernels import affine, apply, native
from structmat.kernels.choice import prefers_native
from structmat.kernels.text import text_of
from structmat.matrix import draw
from structmat.program import Chain, Contraction, Crop, Diagonal, Program, Sum, build, reference
from structmat.structure import resolve
from structmat.structures import families

here = native()
pytestmark = pytest.mark.skipif(not here.available, reason=f"no native library: {here.reason}")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 6e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def assert_gradients(
    program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None, grad: Tensor, part: int = 0
) -> None:
    """Native gradients are those of the float64 reference, to the rounding of the dtype; `part` leaves some out."""
    learned = [name for name, t in tensors.items() if t.is_floating_point()]
    leaves = {"x": x, **{name: tensors[name] for name in learned}}
    if bias is not None:
        leaves["bias"] = bias
    wanted = [name for number, name in enumerate(leaves) if not part >> (number % 8) & 1] or ["x"]

    def product(dtype: torch.dtype) -> tuple[Tensor, ...]:
        own = {n: t.detach().to(dtype).clone().requires_grad_(n in wanted) for n, t in leaves.items()}
        all_tensors = {n: own.get(n, t) for n, t in tensors.items()}
        y = (
            apply(program, all_tensors, own["x"])
            if bias is None
            else affine(program, all_tensors, own["x"], own["bias"])
        )
        return torch.autograd.grad(y, [own[n] for n in wanted], grad.to(dtype), materialize_grads=True)

    with sm.backend("native"):
        found = product(x.dtype)
    with sm.backend("reference"):
        expected = product(torch.float64)
    for name, one, other in zip(wanted, found, expected, strict=True):
        assert one.dtype == x.dtype
        assert one.shape == other.shape
        if one.numel():
            size = float(other.abs().max())
            assert float((one.double() - other).abs().max()) <= TOLERANCE[x.dtype] * max(size, 1e-3), (name, program)


def random_case(
    program: Program, dtype: torch.dtype, batch: int, seed: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, grad = (
        torch.randn(batch, size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (program.in_features, program.out_features)
    )
    return tensors_of(program, dtype, seed), x, grad


@settings(deadline=None, max_examples=120)
@given(
    programs(), st.sampled_from(list(TOLERANCE)), st.integers(0, 140), st.integers(0, 10**6), st.booleans(),
    st.integers(0, 255),
)  # fmt: skip
def test_random_programs(
    program: Program, dtype: torch.dtype, batch: int, seed: int, with_bias: bool, part: int
) -> None:
    tensors, x, grad = random_case(program, dtype, batch, seed)
    bias = torch.randn(program.out_features, dtype=torch.float64).to(dtype) if with_bias else None
    assert_gradients(program, tensors, x, bias, grad)
    assert_gradients(program, tensors, x, bias, grad, part)


@pytest.mark.slow
@settings(deadline=None, max_examples=2000)
@given(programs(depth=3), st.sampled_from(list(TOLERANCE)), st.integers(0, 300), st.integers(0, 10**6),
       st.integers(0, 255))  # fmt: skip
def test_thousands_of_random_programs(program: Program, dtype: torch.dtype, batch: int, seed: int, part: int) -> None:
    tensors, x, grad = random_case(program, dtype, batch, seed)
    assert_gradients(program, tensors, x, None, grad, part)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_sizes_beyond_one_block_and_several_parts_of_a_batch(dtype: torch.dtype) -> None:
    program = Chain((Contraction("w", 2, 70, 90, 1), Contraction("v", 1, 33, 35, 4, shared_d=True),
                     Contraction("u", 3, 50, 11, 4, transposed=True)))  # fmt: skip
    for batch in (1, 63, 64, 65, 300):
        tensors, x, grad = random_case(program, dtype, batch, 1)
        assert_gradients(program, tensors, x, torch.randn(program.out_features).to(dtype), grad)


def test_a_tensor_that_is_read_twice_has_the_sum_of_both_gradients() -> None:
    twice = Chain((Contraction("w", 1, 24, 24, 1), Diagonal("d", 24), Contraction("w", 1, 24, 24, 1, transposed=True),
                   Diagonal("d", 24), Contraction("r", 12, 2, 2, 1), Contraction("r", 12, 2, 2, 1)))  # fmt: skip
    for program in (twice, Sum((twice, Contraction("w", 1, 24, 24, 1), Crop(24, 24)))):
        tensors, x, grad = random_case(program, torch.float64, 37, 0)
        assert_gradients(program, tensors, x, None, grad)


# ------------------------------------------------------------------------------------------------- families, orders


def small_members() -> Iterator[tuple[str, sm.Structure]]:
    for name in sorted(families()):
        for structure in list(families()[name].configurations((8, 6), 24))[:1]:
            if not isinstance(text_of(build(resolve(structure, (8, 6)), (8, 6))), str):
                yield name, resolve(structure, (8, 6))


@pytest.mark.parametrize(("name", "structure"), list(small_members()))
def test_gradients_of_gradients_in_float64(name: str, structure: sm.Structure) -> None:
    program = build(structure, (8, 6))
    tensors = draw(structure, (8, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learned = [n for n, t in tensors.items() if t.is_floating_point()]
    leaves = [torch.randn(3, 6, dtype=torch.float64), *(tensors[n] for n in learned), torch.randn(8).double()]

    def product(x: Tensor, *given: Tensor) -> Tensor:
        with sm.backend("native"):
            return affine(program, {**tensors, **dict(zip(learned, given[:-1], strict=True))}, x, given[-1])

    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(product, leaves)
    assert torch.autograd.gradgradcheck(product, leaves)


def test_a_second_derivative_where_the_weight_depends_on_the_input() -> None:
    program = Contraction("w", 2, 3, 4, 1)
    start = torch.randn(5, 8, dtype=torch.float64)

    def second(name: str) -> tuple[Tensor, Tensor]:
        x = start.clone().requires_grad_()
        with sm.backend(name):
            y = apply(program, {"w": (x * x).sum(0).tile(3).reshape(2, 3, 4, 1)}, x)
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return first, torch.autograd.grad(first.pow(2).sum(), x)[0]

    for found, wanted in zip(second("native"), second("reference"), strict=True):
        torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------------------------------------------ autograd


def layer() -> sm.nn.StructuredLinear:
    return sm.nn.StructuredLinear(64, 96, structure=sm.Monarch(4, rank=2), generator=torch.Generator().manual_seed(0))


def gradients(net: torch.nn.Module, x: Tensor, name: str, grad: Tensor | None = None) -> list[Tensor]:
    net.zero_grad()
    x = x.detach().requires_grad_()
    with sm.backend(name):
        y = net(x)
    y.backward(grad) if grad is not None else y.sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def test_inputs_and_gradients_of_any_strides_and_shape() -> None:
    net, wide = layer(), torch.randn(40, 128)
    for x in (wide[:, :64], wide[:, ::2], wide[::3, 64:], torch.randn(64, 40).T, torch.randn(64), torch.randn(0, 64),
              torch.randn(3, 1, 64).expand(3, 5, 64), torch.randn(2, 0, 64), torch.randn(2, 3, 64)):  # fmt: skip
        shape = (*x.shape[:-1], 96)
        grads = [None, torch.randn(96).expand(shape), torch.randn(*shape[:-1], 192)[..., ::2], torch.randn(shape)]
        if x.dim() > 1:
            grads.append(torch.randn(*shape[:-2], 96, shape[-2]).transpose(-1, -2))
        for grad in grads:
            for found, wanted in zip(
                gradients(net, x, "native", grad), gradients(net, x, "reference", grad), strict=True
            ):
                assert found.shape == wanted.shape
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_training_is_that_of_the_reference() -> None:
    def trained(name: str) -> list[Tensor]:
        net = torch.nn.Sequential(layer(), torch.nn.GELU(), sm.nn.StructuredLinear(96, 10, structure=sm.Butterfly()))
        net.load_state_dict(state)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        with sm.backend(name):
            for x, target in batches:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x), target).backward()
                optimizer.step()
        return [p.detach() for p in net.parameters()]

    first = torch.nn.Sequential(layer(), torch.nn.GELU(), sm.nn.StructuredLinear(96, 10, structure=sm.Butterfly()))
    state = copy.deepcopy(first.double().state_dict())
    torch.set_default_dtype(torch.float64)
    try:
        batches = [(torch.randn(20, 64), torch.randint(10, (20,))) for _ in range(5)]
        for found, wanted in zip(trained("native"), trained("reference"), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_accumulate() -> None:
    net, x = layer(), torch.randn(9, 64)
    once = gradients(net, x, "native")[1:]
    with sm.backend("native"):
        net(x).sum().backward()
    for parameter, first in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first)


def test_what_needs_no_gradient_gets_none() -> None:
    net, x = layer(), torch.randn(9, 64)
    with sm.backend("native"):
        net.requires_grad_(False)
        assert not net(x).requires_grad
        net.bias.requires_grad_()
        net(x).sum().backward()
        torch.testing.assert_close(net.bias.grad, torch.full((96,), 9.0))
        assert [n for n, p in net.named_parameters() if p.grad is not None] == ["bias"]
        net.requires_grad_(False)
        net(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, net.matrix.to_dense().sum(0).expand(9, 64), rtol=1e-4, atol=1e-5)


def test_changing_a_saved_tensor_is_noticed() -> None:
    net, x = layer(), torch.randn(9, 64)
    with sm.backend("native"):
        y = net(x)
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_many_gradients_at_a_time() -> None:
    net, x = layer(), torch.randn(64)
    with sm.backend("native"):
        jacobian = torch.autograd.functional.jacobian(net, x, vectorize=True)
    torch.testing.assert_close(jacobian, net.matrix.to_dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own, at the first use
def test_differentiation_forwards() -> None:
    net, x = layer(), torch.randn(70, 64)
    with torch.no_grad(), forward_ad.dual_level():
        dual = net(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, net.matrix.to_dense().sum(1).expand(70, 96), rtol=1e-4, atol=1e-5)


def test_checkpointing_and_autocast() -> None:
    net, x = layer(), torch.randn(70, 64)
    plain = gradients(net, x, "native")
    net.zero_grad()
    with sm.backend("native"):
        torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).sum().backward()
    for parameter, wanted in zip(net.parameters(), plain[1:], strict=True):
        assert torch.equal(parameter.grad, wanted)
    net.zero_grad()
    with sm.backend("native"), torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    y.sum().backward()
    for parameter, wanted in zip(net.parameters(), plain[1:], strict=True):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max()))


def test_results_do_not_depend_on_threads() -> None:
    x, grad = torch.randn(700, 96), torch.randn(700, 128)
    threads = torch.get_num_threads()
    for structure in (sm.Monarch(8, rank=2), sm.Butterfly(), sm.Sparse(density=0.2), sm.PivotedLowRank(5)):
        net = sm.nn.StructuredLinear(96, 128, structure=structure)
        try:
            outcomes = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                outcomes.append(gradients(net, x, "native", grad))
        finally:
            torch.set_num_threads(threads)
        for other in outcomes[1:]:
            assert all(torch.equal(one, two) for one, two in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("name", every())
def test_every_instruction_set_of_this_machine(name: str) -> None:
    if name not in here.supported:
        pytest.skip(f"this machine has no {name}")
    code = (
        "import torch, structmat as sm\n"
        "from structmat.kernels import native\n"
        "torch.manual_seed(0)\n"
        "structures = [sm.Monarch(4, rank=2), sm.Butterfly(), sm.Sparse(density=0.2), sm.PivotedLowRank(5),\n"
        "              sm.Kronecker(terms=2), sm.BLAST(4, rank=8), sm.TensorTrain(rank=4)]\n"
        "def gradients(net, x, grad, name):\n"
        "    net.zero_grad()\n"
        "    x = x.detach().requires_grad_()\n"
        "    with sm.backend(name):\n"
        "        net(x).backward(grad)\n"
        "    return [x.grad.double(), *(p.grad.double() for p in net.parameters())]\n"
        "for structure in structures:\n"
        "    net = sm.nn.StructuredLinear(64, 96, structure=structure)\n"
        "    x, grad = torch.randn(75, 64), torch.randn(75, 96)\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "        own = net.to(dtype)\n"
        "        found = gradients(own, x.to(dtype), grad.to(dtype), 'native')\n"
        "        wide = gradients(own.double(), x.to(dtype).double(), grad.to(dtype).double(), 'reference')\n"
        "        for one, two in zip(found, wide, strict=True):\n"
        "            error = float((one - two).abs().max() / two.abs().max())\n"
        "            assert error < 32 * torch.finfo(dtype).eps, (structure, dtype, error)\n"
        "print(native().instruction_set)\n"
    )
    assert printed_by(code, name) == name


# ------------------------------------------------------------------------------------------------- choice, bad input


def test_layers_train_native_where_it_pays() -> None:
    def chosen(structure: sm.Structure, rows: int, dtype: torch.dtype = torch.float32) -> bool:
        return prefers_native(build(resolve(structure, (256, 256)), (256, 256)), rows, dtype, recorded=True)

    assert chosen(sm.Butterfly(), 64)
    assert chosen(sm.Monarch(16), 64)
    assert chosen(sm.Monarch(16), 64, torch.bfloat16)
    assert chosen(sm.Sparse(density=0.1), 64)
    assert not chosen(sm.Sparse(density=0.7), 64)
    one_pass = here.instruction_set.startswith("avx512") and not torch.cpu._is_amx_tile_supported()
    assert chosen(sm.LowRank(8), 256) is one_pass
    assert not chosen(sm.LowRank(8), 64)
    assert not chosen(sm.LowRank(8), 256, torch.bfloat16)
    assert not chosen(sm.Dense(), 256)
    assert not chosen(sm.Monarch(16), 1)
    net = sm.nn.StructuredLinear(256, 256, structure=sm.Butterfly())
    assert type(net(torch.randn(64, 256)).grad_fn).__name__ == "_ProductBackward"
    assert type(net(torch.randn(1, 256)).grad_fn).__name__ != "_ProductBackward"
    assert "With gradients: native" in net.explain(64)
    assert "With gradients: native" not in net.explain(1)


def test_bad_input_is_an_error_and_not_a_crash() -> None:
    backward = torch.ops.structmat.multiply_backward.default
    program = "rows 4 contract 1 4 8 1 0 0 0 0"
    x, grad, weight = torch.randn(3, 8), torch.randn(3, 4), torch.randn(32)

    def call(**changes: object) -> None:
        given = {"x": x, "grad": grad, "tensors": [weight], "gx": torch.empty(3, 8), "grads": [torch.empty(32)]}
        given.update(changes)
        backward(given["x"], given["grad"], given["tensors"], given["gx"], given["grads"], program)

    call()
    for changes, message in (
        ({"grad": torch.randn(2, 4)}, "number of rows"),
        ({"grad": torch.randn(3, 5)}, "shape"),
        ({"grad": grad.double()}, "dtype"),
        ({"grad": torch.randn(4, 3).T}, "contiguous"),
        ({"gx": torch.empty(3, 7)}, "size"),
        ({"gx": torch.empty(8, 3).T}, "contiguous"),
        ({"grads": []}, "number of gradients"),
        ({"grads": [torch.empty(31)]}, "size"),
        ({"grads": [torch.empty(32, dtype=torch.float64)]}, "dtype"),
        ({"tensors": [torch.randn(1).expand(32)]}, "contiguous"),
        ({"tensors": [weight[:31]]}, "size"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)
    with pytest.raises(ValueError, match="integers"):
        backward(x, torch.randn(3, 8), [torch.arange(8)], torch.empty(0), [torch.empty(8)], "rows 8 permute 8 0 0")


def test_no_memory_grows() -> None:
    code = (
        "import resource, torch, structmat as sm\n"
        "net = sm.nn.StructuredLinear(64, 64, structure=sm.Sparse(density=0.2))\n"
        "x = torch.randn(64, 64, requires_grad=True)\n"
        "def run(count):\n"
        "    for _ in range(count):\n"
        "        net(x).sum().backward()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = run(200)\n"
        "print(run(4000) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048, f"{done.stdout} KB more"


def test_the_reference_is_the_meaning() -> None:
    """The short way, the long way and the reference give the same gradients for a layer."""
    net, x = sm.nn.StructuredLinear(256, 256, structure=sm.Butterfly()), torch.randn(64, 256)
    for found, wanted in zip(gradients(net, x, "auto"), gradients(net, x, "reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    tensors = net.tensors()
    y = reference.affine(net._program, tensors, x, net.bias)
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)
