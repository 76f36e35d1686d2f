"""Kronecker blocks as one native pass: the same numbers as in PyTorch's operations, in every direction."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from instruction_sets import every, printed_by
from torch import Tensor, nn
from torch.nn import functional as F

import structmat as sm
from structmat.kernels import native
from structmat.kernels.activated import Activation, Kind, activated
from structmat.kernels.operator import run_rows
from structmat.nn import KroneckerBlock, KroneckerNetwork
from structmat.nn.kronecker import Slopes

F64 = torch.float64
pytestmark = pytest.mark.skipif(not native().available, reason="there is no native library")

ACTIVATIONS: dict[str, Any] = {
    "none": None,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": nn.GELU(),
    "gelu, tanh": nn.GELU(approximate="tanh"),
    "rectifier": nn.PReLU(init=0.2),
}
INNER = {**ACTIVATIONS, "slopes": Slopes(0.3), "fixed slopes": Slopes(0.3, learned=False)}
MIXED = ("left", "right", "left", "right")


def scattered(model: nn.Module) -> nn.Module:
    """In float64, with nothing equal to zero."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.normal_().mul_(0.6)
    return model


def is_native(y: Tensor) -> bool:
    """Whether the outcome was recorded by the native pass."""
    node = y.grad_fn
    while node is not None and "Fused" not in type(node).__name__:
        node = node.next_functions[0][0] if node.next_functions else None
    return node is not None


def both(model: nn.Module, x: Tensor) -> None:
    """Outcome and gradients, natively and on the reference backend."""
    found = []
    for name in ("auto", "reference"):
        own = x.detach().clone().requires_grad_()
        with sm.backend(name):
            y = model(own)
            assert is_native(y) == (name == "auto")
            weights = torch.arange(y.numel(), dtype=y.dtype).cos().reshape(y.shape)
            parameters = list(model.parameters())
            found.append([y.detach(), *torch.autograd.grad((y * weights).sum(), [own, *parameters])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(model(x), found[1][0], rtol=1e-10, atol=1e-10)


sizes = st.integers(1, 7)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.tuples(sizes, sizes, sizes, sizes),
    st.sampled_from(["left", "right", "mixed"]),
    st.integers(1, 4),
    st.sampled_from(["full", "axis", "outer", "none"]),
    st.sampled_from(sorted(INNER)),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from([(1,), (3,), (2, 5), (17,), (70,), ()]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_native_equals_reference(
    shape: tuple[int, int, int, int],
    order: str,
    terms: int,
    bias: str,
    inner: str,
    outer: str,
    lead: tuple[int, ...],
    recompute: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    m, n, p, q = shape
    terms = min(terms, m * n, p * q)
    if inner == "none" and outer == "none" and bias in ("outer", "none"):
        outer = "tanh"  # a linear block runs as one product
    block = KroneckerBlock(
        n * p,
        m * q,
        terms,
        in_shape=(n, p),
        out_shape=(m, q),
        order=MIXED[:terms] if order == "mixed" else order,
        inner=copy.deepcopy(INNER[inner]),
        outer=copy.deepcopy(ACTIVATIONS[outer]),
        bias=bias,
        recompute=recompute,
    )
    scattered(block)
    assert block.fallback == ""
    both(block, torch.randn(*lead, n * p, dtype=F64))


@pytest.mark.parametrize("bias", ["full", "axis"])
@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("inner", [torch.tanh, nn.GELU(), Slopes(0.3)])
@pytest.mark.parametrize("places", [(True, True), (False, True)])
def test_native_equals_reference_with_three_factors(
    bias: str, terms: int, inner: Callable[[Tensor], Tensor], places: tuple[bool, bool]
) -> None:
    torch.manual_seed(1)
    block = KroneckerBlock(
        30,
        24,
        terms,
        in_shape=(3, 5, 2),
        out_shape=(4, 2, 3),
        activated=places,
        inner=inner,
        outer=torch.tanh,
        bias=bias,
        dtype=F64,
        order=[(0, 1, 2), (2, 0, 1), (0, 1, 2)][:terms],
    )
    both(scattered(block), torch.randn(19, 30, dtype=F64))


@pytest.mark.parametrize(("inputs", "outputs"), [(13, 11), (97, 10), (784, 784)])
def test_native_equals_reference_with_padding(inputs: int, outputs: int) -> None:
    torch.manual_seed(2)
    block = KroneckerBlock(inputs, outputs, 2, inner=torch.tanh, outer=nn.GELU(), dtype=F64)
    both(block, torch.randn(40, inputs, dtype=F64))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("inner", ["tanh", "gelu", "slopes", "rectifier", "none"])
def test_networks_are_one_native_pass(inner: str, recompute: bool) -> None:
    torch.manual_seed(3)
    outer = torch.tanh if inner in ("slopes", "none") else "as inner"
    network = KroneckerNetwork(
        [(7, 6), 30, (5, 4), (2, 5)], 2, inner=copy.deepcopy(INNER[inner]), outer=outer, recompute=recompute
    )
    scattered(network)
    for count in (1, 9, 33, 130):
        both(network, torch.randn(count, 42, dtype=F64))
    y = network(torch.randn(2, 3, 7, 6, dtype=F64))
    assert y.shape == (2, 3, 10)
    assert is_native(y)


def test_native_is_true_in_single_precision() -> None:
    torch.manual_seed(4)
    network = KroneckerNetwork([(28, 28)] * 3 + [(2, 5)], 2, inner=torch.tanh)
    wide = copy.deepcopy(network).double()
    x = torch.rand(130, 784)
    both_ways = []
    for model, own in ((network, x), (wide, x.double())):
        y = model(own)
        both_ways.append([y, *torch.autograd.grad(y.square().mean(), list(model.parameters()))])
    for a, b in zip(*both_ways, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_native_gradients_by_differences() -> None:
    torch.manual_seed(5)
    block = scattered(KroneckerBlock(15, 8, 3, order=["left", "right", "left"], in_shape=(3, 5), out_shape=(4, 2),
                                     inner=Slopes(0.4), outer=nn.GELU(), dtype=F64))  # fmt: skip
    names = [name for name, _ in block.named_parameters()]
    x = torch.randn(3, 15, dtype=F64, requires_grad=True)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(block, dict(zip(names, tensors, strict=True)), (x,))
        assert is_native(y)
        return y

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))
    assert torch.autograd.gradgradcheck(run, (x, *block.parameters()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch's own forward derivatives
def test_transforms_run_on_the_reference() -> None:
    torch.manual_seed(6)
    network = scattered(KroneckerNetwork([(4, 3), (3, 5), (2, 2)], 2, inner=nn.PReLU(), outer=nn.SiLU()))
    x = torch.randn(6, 12, dtype=F64)
    y = network(x)
    torch.testing.assert_close(torch.func.vmap(network)(x), y)
    held = x[:1].clone().requires_grad_()
    one = torch.autograd.functional.jacobian(network, held, vectorize=True)
    torch.testing.assert_close(one, torch.autograd.functional.jacobian(network, held))
    torch.testing.assert_close(one.squeeze((0, 2)), torch.func.jacrev(network)(x[0]))
    _, along = torch.func.jvp(network, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along[0], one.squeeze((0, 2)).sum(1))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("watched", [False, True], ids=["natively", "by parts"])
def test_many_backward_passes_are_mapped(watched: bool, recompute: bool) -> None:
    """``vmap`` over the gradients that go in, of an outcome that was recorded outside of it."""
    torch.manual_seed(6)
    block = scattered(KroneckerBlock(12, 15, terms=2, inner=torch.tanh, recompute=recompute))
    if watched:
        block.chains[0].register_forward_hook(lambda *_: None)
    x = torch.randn(6, 12, dtype=F64, requires_grad=True)
    y = block(x)
    assert is_native(y) is not watched
    grads = torch.randn(3, *y.shape, dtype=F64)

    def back(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, *block.parameters()), grad, retain_graph=True)

    wanted = [torch.stack(each) for each in zip(*map(back, grads), strict=True)]
    torch.testing.assert_close(torch.func.vmap(back)(grads), tuple(wanted))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="compilers lag behind")
def test_compilers_see_one_operator() -> None:
    torch.manual_seed(7)
    network = scattered(KroneckerNetwork([(7, 6), (5, 4), (2, 5)], 2, inner=torch.tanh, dtype=F64))
    assert isinstance(network, KroneckerNetwork)
    x = torch.randn(9, 42, dtype=F64)
    wanted = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend=look)(x), network(x))
    assert [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"] == [
        "structmat.activated.default"
    ]
    torch._dynamo.reset()
    y = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    found = torch.autograd.grad(y.square().sum(), list(network.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    text = network._way.text
    assert text is not None
    blocks = network.layers()
    tensors = [
        getattr(blocks[number].chains[place] if place >= 0 else blocks[number], name).detach().requires_grad_()
        for number, place, name in network._way.places
    ]
    torch.library.opcheck(torch.ops.structmat.activated.default, (x.requires_grad_(), tensors, text.words))


def test_nothing_depends_on_the_number_of_threads() -> None:
    torch.manual_seed(8)
    network = KroneckerNetwork([(9, 8), (7, 10), (2, 5)], 2, inner=torch.tanh)
    x = torch.randn(200, 72)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = network(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(network.parameters()))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_is_kept() -> None:
    """The input and the outcomes of blocks, rounded up to whole tiles; hidden values too where that is asked for."""
    for recompute, inside in ((True, 0), (False, 2 * 784 + 2 * 28)):
        network = KroneckerNetwork([(28, 28)] * 3 + [(2, 5)], 1, inner=torch.tanh, order="left", recompute=recompute)
        own = {p.data_ptr() for p in network.parameters()}
        kept = 0

        def pack(tensor: Tensor, own: set[int] = own) -> Tensor:
            nonlocal kept
            kept += 0 if tensor.data_ptr() in own else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(torch.rand(128, 784))
        assert kept == 128 * (3 * 784 + inside)


VALUES = {
    Kind.RELU: torch.relu,
    Kind.TANH: torch.tanh,
    Kind.SIGMOID: torch.sigmoid,
    Kind.SILU: F.silu,
    Kind.GELU: F.gelu,
    Kind.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
UNITS = {Kind.RELU: 0, Kind.TANH: 3, Kind.SIGMOID: 3, Kind.SILU: 4, Kind.GELU: 16, Kind.GELU_TANH: 16}
"""Units in the last place of the larger of the value and 1."""


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.name)
def test_activations_are_accurate(kind: Kind, dtype: torch.dtype) -> None:
    text = activated((Activation(kind, 8),), 8).words
    near, far = torch.linspace(-12, 12, 4001, dtype=F64), torch.logspace(-30, 2, 4000, dtype=F64)
    x = torch.cat([near, far, -far, torch.zeros(7, dtype=F64)]).to(dtype).reshape(-1, 8)
    y, true = run_rows(x, [], text).double(), VALUES[kind](x.double())
    unit = torch.finfo(dtype).eps
    assert float(((y - true).abs() / true.abs().clamp(min=1)).max()) <= UNITS[kind] * unit
    if kind in (Kind.TANH, Kind.SIGMOID):  # relative, also where they are small
        large = true.abs() > (1e-30 if dtype is torch.float32 else 1e-200)
        assert float(((y - true).abs() / true.abs())[large].max()) <= 8 * unit
    few = run_rows(x[:3], [], text)
    assert torch.equal(few.double(), y[:3])
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0] * 2, dtype=dtype).expand(16, 8).contiguous()
    made = run_rows(odd, [], text)
    assert bool(made[:, 0].isnan().all())
    assert bool((made[:, 1] == (1.0 if kind in (Kind.TANH, Kind.SIGMOID) else math.inf)).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", every())
def test_every_instruction_set_has_the_same_activations(name: str) -> None:
    code = (
        "import torch, structmat as sm\n"
        "torch.manual_seed(0)\n"
        "n = sm.nn.KroneckerNetwork([(5, 4), (6, 3), (2, 5)], 2, inner=torch.tanh, outer=torch.nn.SiLU())\n"
        "x = torch.randn(21, 20)\n"
        "def made():\n"
        "    y = n(x)\n"
        "    return [y, *torch.autograd.grad(y.square().sum(), list(n.parameters()))]\n"
        "first = made()\n"
        "with sm.backend('reference'): second = made()\n"
        "assert 'Fused' in type(first[0].grad_fn).__name__\n"
        "for a, b in zip(first, second): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)\n"
        "print('same')"
    )
    assert printed_by(code, name) == "same"


@pytest.mark.slow
def test_by_address() -> None:
    """Without operators of PyTorch's dispatcher nothing is kept, and the numbers are the same."""
    code = (
        "import torch, structmat as sm\n"
        "from structmat.kernels import native\n"
        "assert native().by_address\n"
        "n = sm.nn.KroneckerNetwork([(5, 4), (6, 3), (2, 5)], 2, inner=torch.tanh, dtype=torch.float64)\n"
        "x = torch.randn(21, 20, dtype=torch.float64)\n"
        "def made():\n"
        "    y = n(x)\n"
        "    return [y, *torch.autograd.grad(y.square().sum(), list(n.parameters()))]\n"
        "first = made()\n"
        "assert 'Fused' in type(first[0].grad_fn).__name__\n"
        "with sm.backend('reference'): second = made()\n"
        "for a, b in zip(first, second): torch.testing.assert_close(a, b)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "STRUCTMAT_OPERATORS": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_fallback_is_said() -> None:
    block = KroneckerBlock(64, 64, inner=F.elu, outer=torch.tanh)
    assert "elu" in block.fallback
    assert "not one native pass: the inner activation elu" in repr(block)
    assert "not one native pass" in block.explain()
    assert not is_native(block(torch.randn(3, 64)))
    block.inner = torch.tanh  # the block's, not that of what runs inside
    for chain in block.chains:
        chain.inner = torch.tanh
    assert block.fallback == ""
    assert is_native(block(torch.randn(3, 64)))
    fine = KroneckerBlock(64, 64, inner=torch.tanh)
    assert "native" not in repr(fine)
    assert "one native pass in each direction" in fine.explain()
    assert KroneckerBlock(64, 64, inner=torch.tanh, dtype=torch.bfloat16).fallback.startswith("the input is torch.bf")
    assert "linear" in KroneckerBlock(64, 64, inner=None, bias="outer").fallback
    assert "PReLU" in KroneckerBlock(64, 64, inner=torch.tanh, outer=nn.PReLU(64)).fallback


def test_who_watches_a_part_sees_it() -> None:
    network = KroneckerNetwork([64, 64, 10], inner=nn.Tanh())
    x, seen = torch.randn(3, 64), []
    handle = network.blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    y = network(x)
    assert seen == ["block"]
    handle.remove()
    handle = network.layers()[0].chains[0].register_forward_hook(lambda *_: seen.append("chain"))
    torch.testing.assert_close(network(x), y)
    assert seen == ["block", "chain"]
    handle.remove()
    network(x)
    assert seen == ["block", "chain"]


def test_unusual_inputs_and_tensors() -> None:
    torch.manual_seed(9)
    network = KroneckerNetwork([(6, 4), (3, 5), (2, 2)], inner=torch.tanh)
    x = torch.randn(24, 40).T
    torch.testing.assert_close(network(x), network(x.contiguous()))
    assert network(x[:0]).shape == (0, 4)
    assert network(x[0]).shape == (4,)
    with torch.autocast("cpu"):
        assert network(x).dtype is torch.bfloat16
    with torch.no_grad():
        network.layers()[0].bias = nn.Parameter(torch.randn(30)[::2])
    y = network(x)
    assert is_native(y)
    with sm.backend("reference"):
        torch.testing.assert_close(network(x), y)
    y.sum().backward()  # a gradient without strides
    frozen = copy.deepcopy(network).requires_grad_(requires_grad=False)
    frozen.layers()[1].bias.requires_grad_()  # type: ignore[union-attr]
    frozen(x).sum().backward()
    torch.testing.assert_close(frozen.layers()[1].bias.grad, network.layers()[1].bias.grad)  # type: ignore[union-attr]
    again = pickle.loads(pickle.dumps(network))
    torch.testing.assert_close(again(x), y)
    assert is_native(again(x))
    half = copy.deepcopy(network).bfloat16()
    assert half(x.bfloat16()).dtype is torch.bfloat16
    nn.utils.parametrizations.weight_norm(network.layers()[0].chains[0], "factor0")
    torch.testing.assert_close(network(x), y, rtol=1e-4, atol=1e-5)


def test_the_slope_at_zero_counts_once() -> None:
    """A rectifier of slope 1 is the identity, at 0 too."""
    for block in (KroneckerBlock(16, 16, inner=Slopes(1.0)), KroneckerBlock(16, 16, inner=None, bias="full")):
        with torch.no_grad():
            for factor in block.factors():
                factor.fill_(1)
        for name in ("auto", "reference"):
            x = torch.zeros(2, 16, requires_grad=True)
            with sm.backend(name):
                block(x).sum().backward()
            assert torch.equal(x.grad, torch.full_like(x, 16.0))  # type: ignore[arg-type]
