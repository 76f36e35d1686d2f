"""Levels of convolutional arithmetic circuits as native passes: the same numbers as in PyTorch's operations."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from instruction_sets import every, printed_by
from torch import Tensor, nn

import structmat as sm
from structmat.errors import DataError
from structmat.kernels import native
from structmat.nn import ConvAC, ModeTree, TensorialMixture
from structmat.nn.convac import GaussianRepresentation, Log, Plain, RootMeanSquare, Scaled, SignedLog
from structmat.nn.convac.semiring import Semiring, State
from structmat.nn.convac.weights import Weights, normal_

F64 = torch.float64
pytestmark = pytest.mark.skipif(
    not native().available or native().by_address is not None, reason="there are no native operators"
)

TREES = {
    "cp of 1": ModeTree.sequence(1),
    "cp of 3": ModeTree.sequence(3, 3),
    "cp of 13": ModeTree.sequence(13, 13),
    "pairs": ModeTree.sequence(8),
    "pairs of 7": ModeTree.sequence(7),
    "threes of 11": ModeTree.sequence(11, 3),
    "sixes": ModeTree.sequence(12, 6),
    "quads": ModeTree.square(8, 8),
    "quads with gaps": ModeTree.square(5, 3),
    "mirror": ModeTree.mirror(4, 6),
    "truncated": ModeTree.square(4, 4).truncated(1),
}
SEMIRINGS = {"plain": Plain(), "scaled": Scaled(), "log": Log(), "rms": RootMeanSquare()}


def network(tree: ModeTree, semiring: Semiring, *, channels: int = 3, widths: Any = 4, **options: Any) -> ConvAC:
    generator = torch.Generator().manual_seed(1)
    if semiring == Log():
        options.setdefault("constraint", "positive")
    else:
        options.setdefault("initialize", lambda weights: normal_(weights, generator=generator))
    options.setdefault("dtype", F64)
    return ConvAC(None, tree, widths, 3, channels=channels, semiring=semiring, generator=generator, **options)


def passes(y: Tensor) -> int:
    """How many native levels the outcome was recorded by."""
    seen, waiting, count = set(), [y.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += "_Pooled" in type(node).__name__
        waiting += [following for following, _ in node.next_functions]
    return count


def made_by(model: nn.Module, x: Tensor, backend: str) -> list[Tensor]:
    """Outcome and gradients of the input and all parameters."""
    own = x.detach().clone().requires_grad_()
    with sm.backend(backend):
        y = model(own)
        weights = torch.arange(y.numel(), dtype=y.dtype).cos().reshape(y.shape)
        return [y, *torch.autograd.grad((y * weights).sum(), [own, *model.parameters()])]


def both(net: ConvAC, x: Tensor, tolerance: float = 1e-11) -> None:
    """The native passes beside the reference, in every number."""
    found, wanted = made_by(net, x, "auto"), made_by(net, x, "reference")
    assert passes(found[0]) == len(net.tree.levels) + 1
    assert passes(wanted[0]) == 0
    # What is normalized over one channel has gradients of 0, but for rounding: they are compared with the others.
    least = max(float(b.detach().abs().max()) for b in wanted) if net.semiring == RootMeanSquare() else 0.0
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * max(float(b.detach().abs().max()), least)
    with torch.no_grad():
        assert torch.equal(net(x), found[0])


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(TREES)),
    st.sampled_from(sorted(SEMIRINGS)),
    st.sampled_from(["shared", "window", "unshared"]),
    st.integers(1, 9),
    st.integers(1, 20),
    st.sampled_from([1, 2, 7, 8, 33, 64, 70, 128, 150]),
    st.integers(0, 10**6),
)
def test_native_equals_reference(
    tree: str, semiring: str, sharing: str, channels: int, width: int, batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    net = network(TREES[tree], SEMIRINGS[semiring], channels=channels, widths=width, sharing=sharing)
    x = torch.randn(batch, channels, net.tree.modes, dtype=F64)
    both(net, x.abs() + 0.1 if semiring == "log" else x)


@pytest.mark.parametrize("semiring", SEMIRINGS)
def test_single_precision_is_as_good_as_the_reference(semiring: str) -> None:
    torch.manual_seed(2)
    net = network(ModeTree.square(8, 8), SEMIRINGS[semiring], channels=24, widths=(32, 40, 48), dtype=torch.float32)
    x = torch.rand(130, 24, 64) + 0.5
    true = made_by(copy.deepcopy(net).double(), x.double(), "reference")
    found, reference = made_by(net, x, "auto"), made_by(net, x, "reference")
    for a, b, t in zip(*([v.detach() for v in made] for made in (found, reference, true)), strict=True):
        allowed = 8 * torch.finfo(torch.float32).eps
        error, own = (float((v.double() - t).norm() / t.norm()) for v in (a, b))
        assert error <= 2 * own + allowed
        if semiring != "rms":  # there the largest error of a single number is a matter of luck
            error, own = (float((v.double() - t).abs().max() / t.abs().max()) for v in (a, b))
            assert error <= 2 * own + allowed


@pytest.mark.parametrize("tree", TREES)
def test_scaled_numbers_are_those_of_the_reference_bit_for_bit(tree: str) -> None:
    """Small integers, whose sums are exact in any order: values and exponents agree."""
    generator = torch.Generator().manual_seed(3)

    def whole(weights: Weights) -> None:
        weights.set_dense(torch.randint(-3, 4, weights.weight.shape, generator=generator).float() * 2.0**-3)

    net = network(TREES[tree], Scaled(), initialize=whole, dtype=torch.float32)
    x = torch.randint(-2, 3, (37, 3, net.tree.modes), generator=generator).float()
    with torch.no_grad():
        leaves = net.semiring.lift(x.permute(1, 2, 0)[:, net.get_buffer("order")], logarithm=False)
        seen: dict[str, list[State]] = {}
        for backend in ("auto", "reference"):
            states: list[State] = []

            def visit(_: int, state: State, states: list[State] = states) -> State:
                states.append(state)
                return state

            with sm.backend(backend):
                net.evaluate(leaves, visit)
            seen[backend] = states[:1]  # above it sums may round
        for ours, theirs in zip(seen["auto"], seen["reference"], strict=True):
            assert torch.equal(ours.value, theirs.value)
            assert ours.scale is not None
            assert theirs.scale is not None
            assert torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_scaled_is_plain_bit_for_bit_where_that_is_in_range(tree: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    net = network(TREES[tree], Scaled(), dtype=dtype)
    plain = network(TREES[tree], Plain(), dtype=dtype)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(37, 3, net.tree.modes, dtype=dtype)
    y = net(x)
    assert passes(y) == passes(plain(x)) == len(net.tree.levels) + 1
    if net.tree.modes < 20:  # 64 patches leave the range of normal numbers on the way, in float32
        assert torch.equal(y, plain(x))


def test_a_thousand_patches_of_signed_weights() -> None:
    torch.manual_seed(5)
    net = network(ModeTree.square(32, 32), Scaled(), widths=5, dtype=torch.float32)
    for size in (1e-20, 1.0, 1e20):
        x = torch.randn(9, 3, 1024) * size
        found = net.signed_log(x)
        with sm.backend("reference"):
            wanted = net.signed_log(x)
        assert bool(found.log.isfinite().all())
        assert torch.equal(found.sign, wanted.sign)
        torch.testing.assert_close(found.log, wanted.log, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("semiring", SEMIRINGS)
@pytest.mark.parametrize("tree", ["quads with gaps", "threes of 11", "cp of 3"])
def test_gradients_by_differences(tree: str, semiring: str) -> None:
    torch.manual_seed(6)
    net = network(TREES[tree], SEMIRINGS[semiring], widths=2, sharing="window")
    names = [name for name, _ in net.named_parameters()]
    x = torch.rand(2, 3, net.tree.modes, dtype=F64) + 0.5

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(net, dict(zip(names, tensors, strict=True)), (x,))
        assert passes(y) == len(net.tree.levels) + 1
        return y

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *net.parameters()))
    if tree == "cp of 3":
        assert torch.autograd.gradgradcheck(run, (x, *net.parameters()))


def test_second_derivatives_are_those_of_the_reference() -> None:
    torch.manual_seed(7)
    net = network(TREES["quads with gaps"], Scaled())
    found = []
    for backend in ("auto", "reference"):
        x = torch.randn(3, 3, 15, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with sm.backend(backend):
            (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            found.append([first, *torch.autograd.grad(first.square().sum(), [x, *net.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("semiring", ["plain", "scaled"])
@pytest.mark.parametrize("window", [2, 3, 4, 6])
def test_gradients_at_zeros_are_exact(window: int, semiring: str) -> None:
    """A product with one factor zero has a gradient for that factor alone; with two, none."""
    net = ConvAC(None, ModeTree.sequence(window, window), 1, 1, channels=1, semiring=SEMIRINGS[semiring], dtype=F64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1)
    x = torch.arange(2.0, 2 + window, dtype=F64).repeat(3, 1).reshape(3, 1, window)
    x[1, 0, 1] = 0
    x[2, 0, :2] = 0
    x.requires_grad_()
    y = net(x)
    assert passes(y) == 2
    (grad,) = torch.autograd.grad(y.sum(), x)
    whole = math.prod(range(2, 2 + window))
    assert y.flatten().tolist() == [whole, 0, 0]
    assert grad[0, 0].tolist() == [whole / f for f in range(2, 2 + window)]
    assert grad[1, 0].tolist() == [whole / 3 if k == 1 else 0 for k in range(window)]
    assert grad[2, 0].tolist() == [0] * window


def test_no_probability_at_all() -> None:
    """Leaves of -inf: single ones, whole locations, whole samples."""
    torch.manual_seed(8)
    net = network(TREES["quads with gaps"], Log(), channels=4)
    x = torch.randn(9, 4, 15, dtype=F64)
    x[0, 2, 3] = x[1, :3, 4] = x[2, :, 5] = x[3] = -math.inf
    found = []
    for backend in ("auto", "reference"):
        leaves = x.clone().requires_grad_()
        with sm.backend(backend):
            state = net.evaluate(State(leaves.permute(1, 2, 0)[:, net.get_buffer("order")]))
            y = state.value.squeeze(1)
            grads = torch.autograd.grad(y[:, torch.isfinite(y[0].detach())].sum(), [leaves, *net.parameters()])
        found.append([y.detach(), *grads])
    assert bool((found[0][0][:, 2:4] == -math.inf).all())
    assert bool(found[0][0][:, [0, 1, 4]].isfinite().all())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert bool((found[0][1][0, 2, 3] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("tree", ["quads", "sixes"])
def test_nothing_depends_on_a_scale_that_is_divided_away(tree: str, dtype: torch.dtype) -> None:
    torch.manual_seed(15)
    net = network(TREES[tree], RootMeanSquare(), dtype=dtype)
    x = torch.randn(1, 3, net.tree.modes, dtype=dtype).repeat(6, 1, 1)
    x[1] *= 2.0**90
    x[2] *= 2.0**-90
    x[3, :, :2] *= 2.0**100
    x[4, :, 5] = 0
    x[5] = 0
    found, gradient = made_by(net, x, "auto")[:2]
    for row in (1, 2, 3):
        torch.testing.assert_close(found[row], found[0])
    assert found[4:].count_nonzero() == 0
    with sm.backend("reference"):
        torch.testing.assert_close(net(x), found)
    assert bool(gradient.isfinite().all())
    # Along x itself nothing changes.
    assert bool(((gradient[:4] * x[:4]).sum(1).abs() <= 1e-4 * (gradient[:4] * x[:4]).abs().sum(1)).all())


def test_logarithms_of_plain_zeros() -> None:
    torch.manual_seed(9)
    net = network(TREES["pairs of 7"], Log(), channels=4)
    x = torch.rand(9, 4, 7, dtype=F64)
    x[0, 2, 3] = x[1, :3, 4] = x[2, :3, :3] = 0
    both(net, x)
    with pytest.raises(DataError, match="negative"):
        net(-x)


def layer(x: Tensor, weight: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """One logarithmic layer with windows of one, each with a matrix of its own, and the gradient of the weights."""
    index = torch.arange(windows).reshape(1, windows, 1).repeat(2, 1, 1)
    made = x.new_empty(windows, weight.shape[1], x.shape[2])
    none, grad = torch.empty(0, dtype=torch.int64), torch.empty_like(weight)
    torch.ops.structmat.pool_layer.default(x, none, weight, index, made, none, 2)
    torch.ops.structmat.pool_layer_backward.default(
        x, none, weight, index, none, none, torch.ones_like(made), x.new_empty(0), grad, 2
    )
    return made, grad


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_exponential_and_logarithm_are_accurate(dtype: torch.dtype) -> None:
    """Within three units in the last place; logarithms near 1 relative to themselves."""
    info = torch.finfo(dtype)
    exponents = torch.linspace(math.log2(info.tiny), math.log2(info.max) - 0.01, 4000, dtype=F64)
    near = 1 + torch.linspace(-0.3, 0.3, 4001, dtype=F64)
    weight = torch.cat([exponents.exp2(), near]).to(dtype).reshape(-1, 1, 1)
    count = weight.numel()
    made, _ = layer(torch.zeros(count, 1, 1, dtype=dtype), weight, count)
    true = weight.double().log().flatten()
    error = (made.double().flatten() - true).abs()
    assert float((error / true.abs())[true != 0].max()) <= 3 * info.eps
    assert bool((error[true == 0] == 0).all())
    # The gradient of the second weight is exp(x), where the first is 1 and the second 0.
    x = -torch.linspace(0, -math.log(info.tiny) - 1, 8001, dtype=F64).to(dtype)
    two = torch.stack([torch.zeros_like(x), x], 1).unsqueeze(-1)
    weight = torch.tensor([1.0, 0.0], dtype=dtype).repeat(len(x), 1, 1)
    _, grad = layer(two, weight, len(x))
    true = x.double().exp()
    assert float(((grad[:, 0, 1].double() - true).abs() / true).max()) <= 3 * info.eps
    below = torch.tensor([0.0, -800.0, -math.inf], dtype=dtype)
    made, grad = layer(below.reshape(1, 3, 1), torch.ones(1, 1, 3, dtype=dtype), 1)
    assert grad.flatten().tolist() == [1, 0, 0]
    assert made.item() == 0
    for value, log in ((0.0, -math.inf), (info.tiny / 4, math.log(info.tiny / 4)), (math.inf, math.inf)):
        made, _ = layer(torch.zeros(1, 1, 1, dtype=dtype), torch.full((1, 1, 1), value, dtype=dtype), 1)
        torch.testing.assert_close(made.item(), log, rtol=1e-6, atol=0)


def test_products_that_underflow_take_one_logarithm_each() -> None:
    net = network(ModeTree.square(4, 4), Log(), widths=5, dtype=torch.float32)
    with torch.no_grad():
        for parameter in net.layers.parameters():
            parameter.uniform_(-40, -20)  # logarithms of weights: four of them leave the range of float32
    x = torch.rand(21, 3, 16) + 0.5
    both(net, x, 1e-4)
    assert bool(net(x).isfinite().all())


@pytest.mark.parametrize("semiring", SEMIRINGS)
@pytest.mark.parametrize("sharing", ["shared", "unshared"])
def test_nothing_depends_on_the_number_of_threads(sharing: str, semiring: str) -> None:
    torch.manual_seed(10)
    net = network(ModeTree.square(8, 8), SEMIRINGS[semiring], widths=17, sharing=sharing, dtype=torch.float32)
    x = torch.rand(150, 3, 64) + 0.5
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(made_by(net, x, "auto"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_pooled_states_are_all_that_is_kept() -> None:
    for semiring in SEMIRINGS.values():
        net = network(ModeTree.square(8, 8), semiring, widths=(8, 16, 24), dtype=torch.float32)
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        kept = dict[int, int]()

        def pack(tensor: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        x = torch.rand(64, 3, 8, 8).flatten(2) + 0.5
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(x)
        parameters = net.num_parameters if semiring == Log() else 0  # positive weights are exponentials
        factors = 64 * (16 + 4 + 1) if semiring == RootMeanSquare() else 0  # by which states were divided
        assert sum(kept.values()) <= 64 * (64 * 3 + 16 * 8 + 4 * 16 + 24) + parameters + factors


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch's own forward derivatives
def test_transforms_run_on_the_reference() -> None:
    torch.manual_seed(11)
    net = network(TREES["quads with gaps"], Scaled())
    x = torch.randn(4, 3, 15, dtype=F64)
    y = net(x)
    torch.testing.assert_close(torch.func.vmap(lambda one: net(one[None])[0])(x), y)
    held = x[:1].clone().requires_grad_()
    one = torch.autograd.functional.jacobian(net, held, vectorize=True)
    torch.testing.assert_close(one, torch.autograd.functional.jacobian(net, held))
    _, along = torch.func.jvp(net, (held.detach(),), (torch.ones_like(x[:1]),))[:2]
    torch.testing.assert_close(along[0], one.squeeze((0, 2)).sum((1, 2)))
    with torch.autocast("cpu"):
        assert passes(net(x)) == 0
    torch._dynamo.reset()
    compiled_net = torch.compile(net, backend="eager")
    torch.testing.assert_close(compiled_net(x), y)


def test_many_backward_passes_are_mapped() -> None:
    """``vmap`` over the gradients that go in, of an outcome that was recorded outside of it."""
    torch.manual_seed(12)
    net = network(TREES["quads with gaps"], Scaled())
    x = torch.randn(4, 3, 15, dtype=F64, requires_grad=True)
    y = net(x)
    assert passes(y) > 0
    grads = torch.randn(3, *y.shape, dtype=F64)

    def back(grad: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    torch.testing.assert_close(torch.func.vmap(back)(grads), torch.stack([back(grad) for grad in grads]))


def test_who_watches_a_level_sees_it() -> None:
    net = network(TREES["pairs"], Scaled())
    x, seen = torch.randn(3, 3, 8, dtype=F64), list[str]()
    y = net(x)
    handle = net.layers[0][0].register_forward_hook(lambda *_: seen.append("level"))  # type: ignore[index]
    watched = net(x)
    handle.remove()
    assert passes(watched) == passes(y) - 1
    torch.testing.assert_close(watched, y)


def test_mixtures_are_native_too() -> None:
    torch.manual_seed(12)
    tree = ModeTree.square(4, 4)
    model = TensorialMixture(GaussianRepresentation(4, 5), tree, (6, 7), 3, hidden_marginalization=(0.5,)).double()
    x = torch.randn(9, 4, 16, dtype=F64)
    x[:, :, 3] = math.nan
    model.eval()
    found, wanted = (made_by(model, x, backend)[0] for backend in ("auto", "reference"))
    assert passes(found) == 2  # the levels
    torch.testing.assert_close(found, wanted)
    model.train()
    torch.manual_seed(0)
    one = model(x)
    with sm.backend("reference"):
        torch.manual_seed(0)
        torch.testing.assert_close(model(x), one)


def test_the_fallback_is_said() -> None:
    assert network(TREES["quads"], Scaled()).fallback == ""
    assert "overlap" in network(ModeTree.overlapping(5, (3,), (2,)), Scaled()).fallback
    assert "other levels" in network(ModeTree.chain(4), Scaled()).fallback
    assert "SignedLog" in network(TREES["quads"], SignedLog()).fallback
    assert "not dense" in network(TREES["quads"], Scaled(), weights=sm.LowRank(1)).fallback
    relu = ConvAC(None, TREES["quads"], 4, 2, channels=3, semiring=Plain(), activation="relu", pooling="max")
    assert "max" in relu.fallback
    assert "bfloat16" in network(TREES["quads"], Scaled(), dtype=torch.float32).bfloat16().fallback
    with sm.backend("reference"):
        assert "forced" in network(TREES["quads"], Scaled()).fallback
    for net in (network(ModeTree.chain(4), Scaled()), network(TREES["quads"], Scaled(), weights=sm.LowRank(1))):
        x = torch.randn(3, 3, net.tree.modes, dtype=F64)
        found, wanted = made_by(net, x, "auto"), made_by(net, x, "reference")
        assert 0 < passes(found[0]) < len(net.tree.levels) + 1
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_unusual_inputs_and_weights() -> None:
    net = network(TREES["quads"], Scaled(), dtype=torch.float32)
    x = torch.randn(5, 64, 3).transpose(1, 2)
    torch.testing.assert_close(net(x), net(x.contiguous()))
    assert net(x[:0]).shape == (0, 3)
    y = net(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), y)
    y.sum().backward()  # a gradient without strides
    frozen = copy.deepcopy(net).requires_grad_(requires_grad=False)
    frozen.output.weights.weight.requires_grad_()
    frozen(x).sum().backward()
    torch.testing.assert_close(frozen.output.weights.weight.grad, net.output.weights.weight.grad)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1e-30)  # whose products leave the range at once
    found = net.signed_log(x)
    with sm.backend("reference"):
        wanted = net.signed_log(x)
    torch.testing.assert_close(found.log, wanted.log, rtol=1e-5, atol=1e-3)
    net.semiring = SignedLog()
    assert passes(net(x)) == 0
    assert "SignedLog" in net.fallback


@pytest.mark.slow
@pytest.mark.parametrize("name", every())
def test_every_instruction_set(name: str) -> None:
    code = (
        "import torch, structmat as sm\n"
        "from structmat.nn import ConvAC, ModeTree\n"
        "from structmat.nn.convac import Log, Plain, RootMeanSquare, Scaled\n"
        "torch.manual_seed(0)\n"
        "for semiring in (Plain(), Scaled(), Log(), RootMeanSquare()):\n"
        "  for tree in (ModeTree.square(4, 4), ModeTree.square(5, 3), ModeTree.sequence(12, 6)):\n"
        "    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-11)):\n"
        "      constraint = 'simplex' if semiring == Log() else 'none'\n"
        "      n = ConvAC(None, tree, 11, 3, channels=5, semiring=semiring, constraint=constraint, dtype=dtype)\n"
        "      x = torch.rand(37, 5, tree.modes, dtype=dtype) + 0.5\n"
        "      def made():\n"
        "        y = n(x)\n"
        "        return [y, *torch.autograd.grad(y.square().sum(), list(n.parameters()))]\n"
        "      first = made()\n"
        "      assert n.fallback == ''\n"
        "      with sm.backend('reference'): second = made()\n"
        "      for a, b in zip(first, second): assert (a - b).abs().max() <= tolerance * b.abs().max()\n"
        "print('same')"
    )
    assert printed_by(code, name) == "same"
