"""Structured recurrent layers: they compute what PyTorch's do, with matrices that are structured."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from recurrent_layers import KINDS, dense, flat
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import structmat as sm
from structmat.errors import DataError, ModelError, ShapeError, StructureError
from structmat.nn import StructuredGRU, StructuredLSTM, StructuredRNN
from structmat.nn.recurrent import FrozenRecurrent, GateLinear, Recurrent, joined, second_moments
from structmat.structure import Structure, count_parameters

STRUCTURES: tuple[Structure, ...] = (
    sm.LowRank(2), sm.Monarch(2), sm.BlockDiagonal(2), sm.Dense(), sm.Sum(sm.LowRank(1), sm.Sparse(nonzeros=7)),
)  # fmt: skip


def again(twin: nn.RNNBase, structure: Structure, **more: Any) -> Recurrent:
    """The structured layer that is fitted to PyTorch's."""
    if isinstance(twin, nn.LSTM):
        return StructuredLSTM.from_lstm(twin, structure, **more)
    if isinstance(twin, nn.GRU):
        return StructuredGRU.from_gru(twin, structure, **more)
    assert isinstance(twin, nn.RNN)
    return StructuredRNN.from_rnn(twin, structure, **more)


def assert_equal_outcomes(found: Any, wanted: Any) -> None:
    assert len(flat(found)) == len(flat(wanted))
    for ours, theirs in zip(flat(found), flat(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if isinstance(wanted[0], PackedSequence):
        assert isinstance(found[0], PackedSequence)
        assert torch.equal(found[0].batch_sizes, wanted[0].batch_sizes)
        for ours, theirs in zip(found[0][2:], wanted[0][2:], strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@st.composite
def layers(draw: st.DrawFn) -> Recurrent:
    """A layer of any kind and options, small, float64, in evaluation mode."""
    kind, more = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    count = draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    made = kind(
        draw(st.integers(2, 6)),
        draw(st.integers(4, 7)),
        count,
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        dropout=0.3 if count > 1 and draw(st.booleans()) else 0.0,
        bidirectional=draw(st.booleans()),
        structure=draw(st.sampled_from(STRUCTURES)),
        input_structure=draw(st.sampled_from((None, sm.LowRank(1), sm.Dense()))),
        per_gate=draw(st.booleans()),
        dtype=torch.float64,
        **more,
    )
    assert isinstance(made, Recurrent)
    return made.eval()


@st.composite
def calls(draw: st.DrawFn) -> tuple[Recurrent, tuple[Any, ...]]:
    """A layer and what it is called with: two axes, three, or packed; with initial states or without."""
    layer = draw(layers())
    width = layer.options.input_size
    form = draw(st.sampled_from(("single", "batch", "packed", "sorted")))
    times, batch = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    x: Tensor | PackedSequence
    if form == "single":
        x = drawn(times, width)
    elif form == "batch":
        x = drawn(batch, times, width) if layer.options.batch_first else drawn(times, batch, width)
    else:
        lengths = [draw(st.integers(1, 6)) for _ in range(batch)]
        lengths = sorted(lengths, reverse=True) if form == "sorted" else lengths
        x = pack_sequence([drawn(n, width) for n in lengths], enforce_sorted=form == "sorted")
    if draw(st.booleans()):
        return layer, (x,)
    options = layer.options
    count = options.num_layers * options.directions
    rows = () if form == "single" else (batch,)
    parts = [drawn(count, *rows, options.state_size)]
    if layer.cell.has_memory:
        return layer, (x, (*parts, drawn(count, *rows, options.hidden_size)))
    return layer, (x, *parts)


@given(calls())
@settings(max_examples=120)
def test_outputs_and_states_are_those_of_pytorch(call: tuple[Recurrent, tuple[Any, ...]]) -> None:
    layer, arguments = call
    wanted = dense(layer)(*arguments)
    assert_equal_outcomes(layer(*arguments), wanted)  # recorded
    with torch.no_grad():
        assert_equal_outcomes(layer(*arguments), wanted)  # into memory that is used again
        assert_equal_outcomes(layer.freeze()(*arguments), wanted)
        assert_equal_outcomes(layer.freeze(rows=1)(*arguments), wanted)


@given(calls())
@settings(max_examples=30)
def test_gradients_are_those_of_pytorch(call: tuple[Recurrent, tuple[Any, ...]]) -> None:
    layer, arguments = call
    layer = again(dense(layer), sm.Dense())  # so that each has the same parameters, under other names
    leaves = [t for t in flat(arguments) if t.is_floating_point()]
    outcomes = []
    for module in (layer, dense(layer)):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        given = arguments
        if isinstance(arguments[0], PackedSequence):
            given = (arguments[0]._replace(data=leaves[0]), *arguments[1:])
        sum(t.square().sum() + t.sum() for t in flat(module(*given))).backward()
        outcomes.append([leaf.grad for leaf in leaves])
        if module is not layer:
            names = layer.torch_names()
            for name, parameter in module.named_parameters():
                ours = layer.get_submodule(names[name])
                own = ours.bias if name.startswith("bias") else ours.weight
                assert isinstance(own, Tensor)
                torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-8, atol=1e-10)
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("per_gate", [False, True])
def test_gradients_are_those_of_differences(kind: str, per_gate: bool) -> None:
    made, more = KINDS[kind]
    layer = made(2, 4, structure=sm.LowRank(1), per_gate=per_gate, dtype=torch.float64, **more)
    names = [name for name, _ in layer.named_parameters()]

    def outcome(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))))

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(outcome, (drawn(3, 2, 2).requires_grad_(), *values))


@given(layers())
@settings(max_examples=40)
def test_round_trips(layer: Recurrent) -> None:
    twin = dense(layer)
    assert type(twin) is layer.torch_class
    assert not twin.training
    state = layer.torch_state_dict()
    assert list(state) == list(twin.state_dict())  # PyTorch's names in PyTorch's order
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, state[name])
    back = again(twin, sm.Dense())
    assert not back.training
    for name, tensor in back.torch_state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-12, atol=1e-14)
    assert back.options == layer.options


def test_a_member_is_found_again() -> None:
    layer = StructuredLSTM(6, 8, 2, structure=sm.LowRank(2), per_gate=True, dtype=torch.float64)
    found = StructuredLSTM.from_lstm(layer.to_lstm(), sm.LowRank(2), per_gate=True)
    for name, tensor in layer.torch_state_dict().items():
        torch.testing.assert_close(found.torch_state_dict()[name], tensor)


@given(layers())
@settings(max_examples=40)
def test_parameters_are_those_of_the_structures(layer: Recurrent) -> None:
    count, gates = 0, len(layer.cell.gates)
    for name, (out, inputs), bias in layer.options.shapes(gates):
        parts = gates if layer.per_gate and not name.startswith("hr") else 1
        count += parts * count_parameters(layer.structure_of(name), (out // parts, inputs)) + out * bias
    assert count == sum(p.numel() for p in layer.parameters())


def test_the_numbers_of_a_layer_written_down() -> None:
    stacked = StructuredLSTM(10, 20, structure=sm.LowRank(3), input_structure=sm.LowRank(2))
    assert sum(p.numel() for p in stacked.parameters()) == 3 * (80 + 20) + 2 * (80 + 10) + 2 * 80
    apart = StructuredLSTM(10, 20, structure=sm.LowRank(3), per_gate=True, bias=False)
    assert sum(p.numel() for p in apart.parameters()) == 4 * 3 * (20 + 20) + 4 * 3 * (20 + 10)
    assert set(apart.state_dict()) == {
        f"{m}_l0.{g}.{t}" for m in ("ih", "hh") for g in "ifgo" for t in ("left", "right")
    }
    assert set(stacked.state_dict()) == {f"{m}_l0.{t}" for m in ("ih", "hh") for t in ("left", "right", "bias")}
    assert stacked.torch_names() == {
        "weight_ih_l0": "ih_l0", "bias_ih_l0": "ih_l0", "weight_hh_l0": "hh_l0", "bias_hh_l0": "hh_l0",
    }  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_start_has_the_variance_of_pytorchs(kind: str) -> None:
    made, more = KINDS[kind]
    options = {**more, "proj_size": 32} if "proj_size" in more else more
    layer = made(256, 64, structure=sm.LowRank(16), input_structure=sm.Monarch(4, 4), per_gate=True, **options)
    theirs = layer.torch_class(256, 64, **options)
    for name, tensor in layer.torch_state_dict().items():
        wanted = theirs.state_dict()[name]
        assert float(tensor.std()) == pytest.approx(float(wanted.std()), rel=0.15), name
        assert float(tensor.mean()) == pytest.approx(0, abs=0.15 * float(wanted.std()) + 0.01)


@pytest.mark.parametrize("per_gate", [False, True])
def test_second_moments_make_a_better_fit(per_gate: bool) -> None:
    lstm = nn.LSTM(12, 16, dtype=torch.float64)
    x = drawn(40, 8, 3) @ drawn(3, 12)  # inputs of rank 3
    moments = second_moments(lstm, [x, (x, (drawn(1, 8, 16), drawn(1, 8, 16)))])
    assert {name: tuple(m.shape) for name, m in moments.items()} == {"ih_l0": (12, 12), "hh_l0": (16, 16)}
    assert torch.linalg.matrix_rank(moments["ih_l0"]) == 3
    torch.testing.assert_close(moments["ih_l0"], x.flatten(0, 1).T @ x.flatten(0, 1) / 320)
    made = StructuredLSTM.from_lstm(
        lstm, sm.Dense(), input_structure=sm.LowRank(3), per_gate=per_gate, second_moments=moments
    )
    assert_equal_outcomes(made(x), lstm(x))  # rank 3 is enough for such inputs
    plain = StructuredLSTM.from_lstm(lstm, sm.Dense(), input_structure=sm.LowRank(3), per_gate=per_gate)
    assert float((plain(x)[0] - lstm(x)[0]).detach().abs().max()) > 1e-3


def test_second_moments_of_the_states_are_those_that_are_multiplied() -> None:
    gru = nn.GRU(3, 4, dtype=torch.float64)
    x = drawn(5, 2, 3)
    y, _ = gru(x)
    states = torch.cat([torch.zeros(1, 2, 4, dtype=torch.float64), y.detach()[:-1]]).flatten(0, 1)
    torch.testing.assert_close(second_moments(gru, [x])["hh_l0"], states.T @ states / 10)
    structured = StructuredGRU.from_gru(gru, sm.LowRank(2)).train()
    assert second_moments(structured, [x])["ih_l0"].shape == (3, 3)
    assert structured.training
    with pytest.raises(DataError, match="second moments of 0 inputs"):
        second_moments(gru, [])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_dropout_acts_between_layers_in_training_only(kind: str) -> None:
    made, more = KINDS[kind]
    layer = made(3, 6, 2, dropout=1.0, structure=sm.LowRank(2), dtype=torch.float64, **more)
    x = drawn(4, 2, 3)
    trained, evaluated = layer(x)[0].detach(), layer.eval()(x)[0].detach()
    nothing = dense(layer)
    with torch.no_grad():
        nothing.weight_ih_l1.zero_()  # type: ignore[operator]
    torch.testing.assert_close(trained, nothing(x)[0].detach())  # all that the second layer reads is dropped
    assert not torch.allclose(trained, evaluated)


@pytest.mark.parametrize("structure", [sm.Monarch(4), sm.LowRank(4), sm.BlockDiagonal(4), sm.Butterfly()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(structure: Structure, dtype: torch.dtype) -> None:
    for kind in (StructuredLSTM, StructuredGRU, StructuredRNN):
        layer = kind(16, 32, structure=structure, per_gate=True, bidirectional=True, dtype=dtype)
        x = torch.randn(6, 9, 16, dtype=dtype)
        wanted = dense(layer.double())(x.double())[0].detach()
        layer.to(dtype)
        with torch.no_grad():
            found = layer(x)[0]
        recorded = layer(x)[0].detach()
        assert found.dtype == recorded.dtype == dtype
        for y in (found, recorded):
            assert float((y - wanted).abs().max()) < 64 * torch.finfo(dtype).eps


def test_given_and_returned_states_share_no_memory_with_what_is_written() -> None:
    layer = StructuredLSTM(4, 8, structure=sm.LowRank(2))
    state = (torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    kept = copy.deepcopy(state)
    with torch.no_grad():
        y, (h, c) = layer(torch.randn(5, 3, 4), state)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    last = y[-1].clone()
    h.zero_()
    assert torch.equal(y[-1], last)
    assert c.shape == (1, 3, 8)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_sequences_can_be_continued_time_by_time(kind: str, batch_first: bool, count: int) -> None:
    made, more = KINDS[kind]
    layer = made(4, 8, count, batch_first=batch_first, structure=sm.Monarch(2), dtype=torch.float64, **more)
    x, axis = drawn(9, 5, 4), 1 if batch_first else 0
    with torch.no_grad():
        whole, end = layer(x)
        state, parts = None, []
        for now in x.split(1, axis):
            y, state = layer(now, state)
            parts.append(y.clone())
            for tensor in flat(y):
                tensor.zero_()  # states share no memory with it
    torch.testing.assert_close(torch.cat(parts, axis), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("per_gate", [False, True])
def test_the_state_is_multiplied_once_a_time_and_the_inputs_once(per_gate: bool) -> None:
    layer = StructuredLSTM(4, 8, structure=sm.BlockDiagonal(2), per_gate=per_gate)
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in ("ih_l0", "hh_l0"):
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.append((name, tuple(given[0].shape)))  # type: ignore[misc]
        )
    wanted = [("ih_l0", (7, 3, 4)), *[("hh_l0", (3, 8))] * 7]
    layer(torch.randn(7, 3, 4))
    assert seen == wanted
    seen.clear()
    with torch.no_grad():
        layer(torch.randn(7, 3, 4))
    assert seen == wanted


def test_hooks_of_gates_are_called() -> None:
    layer = StructuredGRU(4, 8, structure=sm.LowRank(2), per_gate=True, dtype=torch.float64)
    x, seen = drawn(6, 2, 4), list[int]()
    with torch.no_grad():
        wanted = layer(x)
        handle = layer.get_submodule("hh_l0.z").register_forward_hook(lambda *_: seen.append(1))
        assert_equal_outcomes(layer(x), wanted)
        assert len(seen) == 6
        with pytest.raises(ModelError, match="have hooks"):
            layer.freeze()
        handle.remove()
        layer.freeze()


def test_parameters_that_change_between_calls_are_seen() -> None:
    layer = StructuredLSTM(4, 8, structure=sm.LowRank(2), per_gate=True)
    x = torch.randn(6, 2, 4)
    with torch.no_grad():
        before = layer(x)[0]
        for parameter in layer.parameters():
            parameter.zero_()
        assert torch.equal(layer(x)[0], torch.zeros_like(before))
    layer.load_state_dict(StructuredLSTM(4, 8, structure=sm.LowRank(2), per_gate=True).state_dict(), assign=True)
    assert float(layer(x)[0].detach().abs().max()) > 0


@pytest.mark.parametrize("per_gate", [False, True])
def test_whole_models_are_saved_frozen_and_written_out(per_gate: bool, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(StructuredGRU(4, 8, 2, bidirectional=True, structure=sm.LowRank(2), per_gate=per_gate))

    first, second, x = model(), model(), torch.randn(5, 3, 4)
    wanted = first(x)[0]
    sm.save(first, tmp_path / "model")
    assert torch.equal(sm.load(tmp_path / "model", second)(x)[0], wanted)
    torch.testing.assert_close(sm.freeze(first)(x)[0], wanted, rtol=1e-5, atol=1e-6)
    plain = sm.to_dense(first)
    assert not any(isinstance(m, sm.nn.StructuredLinear) for m in plain.modules())
    torch.testing.assert_close(plain(x)[0], wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(plain(x)[0], wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sm.freeze(first)(x)[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_frozen_layer_holds_nothing_to_train_and_moves() -> None:
    layer = StructuredLSTM(6, 8, structure=sm.Monarch(2), per_gate=True, dtype=torch.float64)
    frozen = layer.freeze(rows=1)
    assert isinstance(frozen, FrozenRecurrent)
    assert list(frozen.parameters()) == []
    assert not frozen.training
    x = drawn(5, 6)
    assert_equal_outcomes(frozen(x), layer(x))
    assert frozen.get_submodule("hh_l0").bias is None  # added to that of the input
    assert copy.deepcopy(frozen).float()(x.float())[0].dtype == torch.float32
    assert "LSTMCell" in repr(frozen)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_backends_agree(kind: str) -> None:
    made, more = KINDS[kind]
    layer = made(8, 16, structure=sm.Monarch(2), per_gate=True, dtype=torch.float64, **more)
    for rows in (1, 9):
        x = drawn(6, rows, 8)
        with torch.no_grad():
            with sm.backend("reference"):
                wanted = layer(x)
            assert_equal_outcomes(layer(x), wanted)
            if sm.kernels.native().available:
                with sm.backend("native"):
                    assert_equal_outcomes(layer(x), wanted)


def test_on_the_meta_device() -> None:
    layer = StructuredLSTM(4, 8, structure=sm.LowRank(2), per_gate=True, device="meta")
    y, (h, c) = layer(torch.empty(5, 3, 4, device="meta"))
    assert (y.shape, h.shape, c.shape) == ((5, 3, 8), (1, 3, 8), (1, 3, 8))
    assert all(p.is_meta for p in layer.parameters())


@pytest.mark.parametrize("kind", [StructuredLSTM, StructuredGRU])
def test_autocast(kind: type[StructuredLSTM | StructuredGRU]) -> None:
    layer = kind(4, 8, structure=sm.LowRank(2))
    x = torch.randn(5, 3, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)[0]
    torch.testing.assert_close(found.float(), layer(x)[0].detach(), rtol=0.05, atol=0.02)


@pytest.mark.slow
def test_exported() -> None:
    layer = StructuredLSTM(4, 8, structure=sm.Monarch(2), per_gate=True).eval()
    x = torch.randn(5, 3, 4)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


def test_options_are_pytorchs_attributes() -> None:
    layer = StructuredLSTM(6, 8, 2, proj_size=4, bidirectional=True, structure=sm.LowRank(1))
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "proj_size"):
        assert getattr(layer, name) == getattr(layer.to_lstm(), name)
    assert "proj_size=4" in repr(layer)
    assert "structure=LowRank(rank=1)" in repr(layer)
    assert isinstance(StructuredGRU(2, 4, structure=sm.LowRank(1), per_gate=True).get_submodule("hh_l0"), GateLinear)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = layer.nothing_here


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_code_around_a_layer_finds_what_it_reads_of_pytorchs(kind: str) -> None:
    made, more = KINDS[kind]
    layer = made(6, 8, 2, batch_first=True, structure=sm.LowRank(2), **more)
    twin, x = joined(layer), torch.randn(2, 5, 6)
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"]
    for own in (layer, layer.freeze()):
        for name in names + ["nonlinearity"] * isinstance(twin, nn.RNN):
            assert getattr(own, name) == getattr(twin, name)
        own.flatten_parameters()
        assert_equal_outcomes(own(input=x, hx=None), own(x))
        if not isinstance(twin, nn.RNN):
            with pytest.raises(AttributeError, match="nonlinearity"):
                _ = own.nonlinearity


def test_errors_say_the_numbers_and_a_remedy() -> None:
    def layer(**more: Any) -> StructuredLSTM:
        return StructuredLSTM(4, 8, structure=sm.LowRank(2), **more)

    with pytest.raises(ShapeError, match=r"hidden_size=0 is no size\. Use"):
        StructuredGRU(4, 0, structure=sm.LowRank(2))
    with pytest.raises(ShapeError, match=r"proj_size=8 with hidden_size=8.*Use 1 to 7"):
        layer(proj_size=8)
    with pytest.raises(StructureError, match=r"dropout=1\.5 is no probability"):
        layer(dropout=1.5)
    with pytest.raises(StructureError, match=r"bias=1 is a int\. Use True"):
        layer(bias=1)
    with pytest.raises(StructureError, match=r"complex64\. Use a floating"):
        layer(dtype=torch.complex64)
    with pytest.raises(StructureError, match=r"nonlinearity='elu' is unknown\. Use 'tanh'"):
        StructuredRNN(4, 8, nonlinearity="elu", structure=sm.LowRank(2))
    with pytest.warns(UserWarning, match=r"dropout=0\.5 acts between layers, and there is one"):
        layer(dropout=0.5)
    with pytest.raises(ShapeError, match=r"4 axes.*Give \(time, 4\)"):
        layer()(torch.ones(1, 1, 1, 4))
    with pytest.raises(ShapeError, match=r"\(3, 5\); its last axis must hold input_size=4"):
        layer()(torch.ones(3, 5))
    with pytest.raises(ShapeError, match=r"length 0\. Give at least 1"):
        layer()(torch.ones(0, 2, 4))
    with pytest.raises(ShapeError, match=r"has 2 parts; got 1\. Give a pair"):
        layer()(torch.ones(3, 2, 4), torch.ones(1, 2, 8))
    with pytest.raises(ShapeError, match=r"state c has shape \(1, 2, 7\); it must have \(1, 2, 8\)"):
        layer()(torch.ones(3, 2, 4), (torch.ones(1, 2, 8), torch.ones(1, 2, 7)))
    with pytest.raises(ShapeError, match=r"state h has shape \(1, 2, 8\); it must have \(1, 8\)"):
        layer()(torch.ones(3, 4), (torch.ones(1, 2, 8), torch.ones(1, 8)))
    with pytest.raises(DataError, match=r"float32 and the initial state torch.float64.*Give both in one"):
        StructuredGRU(4, 8, structure=sm.LowRank(2))(torch.ones(3, 4), torch.ones(1, 8, dtype=torch.float64))
    with pytest.raises(ModelError, match=r"StructuredLSTM takes the place of an nn\.LSTM; got a GRU"):
        StructuredLSTM.from_lstm(nn.GRU(4, 8), sm.LowRank(2))  # type: ignore[arg-type]
    state = nn.LSTM(4, 8).state_dict()
    with pytest.raises(ModelError, match=r"1 missing \(bias_hh_l0\) and 1 unknown \(other\)"):
        layer().load_torch_state_dict({("other" if n == "bias_hh_l0" else n): t for n, t in state.items()})
    with pytest.raises(ModelError, match=r"weight_ih_l0 has shape \(32, 5\).*and \(32, 4\)"):
        layer().load_torch_state_dict(nn.LSTM(5, 8).state_dict())
    with pytest.raises(ModelError, match=r"given for hh_l1\. The matrices of this layer are hh_l0, ih_l0"):
        layer().load_torch_state_dict(state, second_moments={"weight_hh_l1": torch.eye(8)})
