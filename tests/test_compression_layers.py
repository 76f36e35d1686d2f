"""Compression of all kinds of layers: adapters against dense truths, whole models, saving, freezing, tuning."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import structmat as sm
from structmat.compression.calibrate import calibrate
from structmat.compression.layers import Load, cost_of, layer_of, layers, splitter_of, structured_layer_of
from structmat.compression.recover import recover
from structmat.compression.replace import replace_layers
from structmat.compression.scan import scan, site_of
from structmat.compression.split import split_, split_apart, whole_again_
from structmat.compression.statistics import reestimate
from structmat.errors import FormatError, ModelError
from structmat.io import size_on_disk
from structmat.nn.attention import SplitAttention
from structmat.nn.convolution import FrozenConvolution
from structmat.nn.recurrent import FrozenRecurrent, Recurrent, joined, split
from structmat.structure import count_stored, resolve


def convolutions() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Dense layers of every kind, with the shape of an input."""
    return [
        (nn.Conv2d(6, 8, 3, 2, 1, dilation=2, groups=2), (3, 6, 11, 9)),
        (nn.Conv2d(4, 6, (3, 5), padding="same", bias=False), (2, 4, 6, 5)),
        (nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9)),
        (nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, groups=2), (3, 6, 5, 4)),
        (nn.ConvTranspose1d(4, 6, 4, 3), (2, 4, 9)),
    ]


def seeded(index: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(index)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("which", range(6))
def test_rows_times_matrices_are_the_output_of_a_convolution(which: int) -> None:
    conv, size = convolutions()[which]
    conv.double()
    adapter = layer_of(conv)
    assert adapter is not None
    x = torch.randn(size, generator=seeded(), dtype=torch.float64)
    matrices = adapter.matrices(conv)
    copies, shape = adapter.shape(conv)
    assert matrices.shape == (copies, *shape)
    rows = torch.cat(list(adapter.rows(conv, x)), 1)
    y = rows @ matrices.mT
    if conv.bias is not None:
        y = y + conv.bias.view(copies, 1, -1)
    torch.testing.assert_close(adapter.output_rows(conv, conv(x)), y)
    other = copy.deepcopy(conv)
    adapter.assign(other, 2 * matrices)
    assert torch.equal(other.weight, 2 * conv.weight)


@pytest.mark.parametrize("which", range(6))
def test_the_streamed_moment_of_patches_is_that_of_the_unfolding(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conv, size = convolutions()[which]
    model = nn.Sequential(conv).eval()
    data = [torch.randn(size, generator=seeded(i)) for i in range(3)]
    sites = scan(model).sites
    found = calibrate(model, sites, data).moments["0"]
    adapter = layer_of(conv)
    assert adapter is not None
    rows = torch.cat([part for x in data for part in adapter.rows(conv, x)], 1).double()
    wanted = rows.mT @ rows / rows.shape[1]
    assert found.rows == rows.shape[1]
    for group in range(sites[0].copies):
        torch.testing.assert_close(found.inputs(group), wanted[group], rtol=1e-5, atol=1e-6)
        # The loss is the product with standard normal numbers, which are the gradients of the outputs.
        gradients = found.gradients(group)
        assert gradients is not None
        assert gradients.shape == (sites[0].shape[0],) * 2
    # The same in pieces of one image.
    monkeypatch.setattr("structmat.nn.convolution.layer.PATCH_NUMBERS", 1)
    pieces = calibrate(model, sites, data).moments["0"]
    torch.testing.assert_close(pieces.second_moment, found.second_moment, rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(out=st.integers(2, 9), inputs=st.integers(2, 7), height=st.integers(1, 4), width=st.integers(1, 3))
def test_forms_fit_into_their_share_and_hold_what_they_say(out: int, inputs: int, height: int, width: int) -> None:
    conv = nn.Conv2d(inputs, out, (height, width))
    site = site_of("conv", conv)
    adapter = layer_of(conv)
    assert adapter is not None
    forms = adapter.forms(site)
    assert set(forms) <= set(adapter.form_names)
    assert bool(forms) == (height * width > 1)
    for most in (site.numbers // 3, site.numbers):
        for name, members in forms.items():
            for structure in members(most):
                assert structure == resolve(structure, site.shape)
                assert count_stored(structure, site.shape) <= most, name


def test_a_bottleneck_is_a_convolution_of_few_channels_behind_one_of_1_x_1() -> None:
    conv = nn.Conv2d(6, 5, 3, padding=1).double()
    thin, kernel = nn.Conv2d(6, 2, 1, bias=False).double(), nn.Conv2d(2, 5, 3, padding=1).double()
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("oqhw,qi->oihw", kernel.weight, thin.weight[:, :, 0, 0]))
        conv.bias.copy_(kernel.bias)
    site, adapter = site_of("conv", conv), layer_of(conv)
    assert adapter is not None
    (structure,) = adapter.forms(site)["Bottleneck"](2 * 6 + 5 * 2 * 9)
    found = sm.project(adapter.matrices(conv)[0], structure)
    assert found.error < 1e-12
    layer = adapter.build(conv, [found.matrix])
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), kernel(thin(x)))
    assert layer.is_lowered
    # It counts what the two convolutions do.
    operations = cost_of(sm.Flops(0.5), site, structure, Load(49.0, (7, 7)))
    assert operations == pytest.approx(
        2 * 49 * (2 * 6 + 5 * 2 * 9), rel=0.07
    )  # the first of a sum's terms is not added


def test_flops_of_a_convolution_count_its_places() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(6 * 16, 4)).eval()
    seen = calibrate(model, scan(model).sites, [torch.randn(5, 4, 8, 8)])
    site = scan(model).sites[0]
    assert seen.load("0") == Load(16.0, (8, 8), lookups=0.0)
    dense = cost_of(sm.Flops(0.5), site, sm.Dense(), seen.load("0"))
    assert dense == pytest.approx(2 * 16 * 6 * 36, rel=0.02)
    low = cost_of(sm.Flops(0.5), site, resolve(sm.LowRank(2), site.shape), seen.load("0"))
    assert low == pytest.approx(2 * 16 * 2 * (6 + 36), rel=0.07)


def test_matrices_that_are_vectors_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 3))
    (skipped,) = scan(model).skipped
    assert (skipped.name, skipped.kind) == ("0", "Conv2d")
    assert "each group has a matrix of shape (1, 9)" in skipped.reason


def test_every_kind_has_one_adapter() -> None:
    kinds = [kind for adapter in layers() for kind in adapter.kinds]
    assert len(kinds) == len(set(kinds))
    assert {"Linear", "Conv1D", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"} <= set(kinds)
    assert splitter_of(nn.Linear(2, 2)) is None
    assert layer_of(nn.LayerNorm(3)) is None


# --------------------------------------------------------------------------------------------------------- splitting


RECURRENT = (
    lambda: nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True),
    lambda: nn.GRU(5, 7, bias=False),
    lambda: nn.RNN(5, 7, 2, nonlinearity="relu"),
)


@pytest.mark.parametrize("make", RECURRENT)
def test_a_recurrent_layer_taken_apart_is_equal_and_shares_its_memory(make: object) -> None:
    layer = make().double()  # type: ignore[operator]
    made = split(layer)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(made(x)[0], layer(x)[0])
    torch.testing.assert_close(joined(made)(x)[0], layer(x)[0])
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.5)
    torch.testing.assert_close(made(x)[0], layer(x)[0])
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 5, dtype=torch.float64) for n in (2, 4, 3)], False)
    torch.testing.assert_close(made(packed)[0].data, layer(packed)[0].data)
    torch.testing.assert_close(made.freeze()(x)[0], layer(x)[0])


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_taken_apart_is_equal(options: dict[str, int], batch_first: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).double()
    made = SplitAttention.from_attention(attention)
    again = made.to_attention()
    q = torch.randn(3, 4, 8, dtype=torch.float64)
    k = torch.randn(3, 4, options.get("kdim", 8), dtype=torch.float64)
    v = torch.randn(3, 4, options.get("vdim", 8), dtype=torch.float64)
    times, batch = (4, 3) if batch_first else (3, 4)
    causal = torch.triu(torch.ones(times, times, dtype=torch.bool), 1)
    padding = torch.zeros(batch, times, dtype=torch.bool)
    padding[0, -1] = True
    for masks in (
        {},
        {"attn_mask": causal},
        {"attn_mask": causal, "key_padding_mask": padding},
        {"attn_mask": torch.randn(2 * batch, times, times, dtype=torch.float64)},
        {"average_attn_weights": False, "key_padding_mask": padding},
    ):
        for needed in (True, False):
            y, weights = made(q, k, v, need_weights=needed, **masks)
            for other in (attention, again):
                wanted, wanted_weights = other(q, k, v, need_weights=needed, **masks)
                torch.testing.assert_close(y, wanted)
                assert (weights is None) == (wanted_weights is None)
                if weights is not None:
                    torch.testing.assert_close(weights, wanted_weights)
    if not options:
        single = q[:, 0]
        torch.testing.assert_close(made(single, single, single)[0], attention(single, single, single)[0])


class Encoder(nn.Module):
    """A stack with PyTorch's fast path, which is taken in evaluation mode without gradients."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=norm_first)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.stack(x, src_key_padding_mask=mask)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("part", ["self_attn.query", "self_attn.output", "linear1", "linear2"])
def test_an_encoder_layer_with_exact_parts_is_equal_in_evaluation(part: str) -> None:
    model = Encoder().eval()
    x, mask = torch.randn(3, 5, 12), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    name = f"stack.layers.1.{part}"
    shape = next(site.shape for site in scan(model).sites if site.name == name)
    small = copy.deepcopy(model)
    replace_layers(small, sm.Plan({name: sm.LowRank(min(shape))}, {name: shape}))
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
        kept = ~mask
        torch.testing.assert_close(small(x, mask)[kept], model(x, mask)[kept], rtol=1e-4, atol=1e-5)
    assert isinstance(small.stack.layers[0].self_attn, nn.MultiheadAttention)
    assert isinstance(small.stack.layers[1].self_attn, SplitAttention) == part.startswith("self_attn")


def test_what_is_shared_or_hooked_is_not_taken_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.GRU(4, 4), nn.GRU(4, 4), nn.GRU(4, 4)
            self.b.weight_hh_l0 = self.a.weight_hh_l0
            self.c.register_forward_hook(lambda *_: None)
            self.d = self.e = nn.GRU(4, 4)

    model = Net()
    found = split_(model)
    assert list(found) == ["d"]
    assert model.d is model.e
    assert isinstance(model.e, Recurrent)
    assert whole_again_(model, found) == {}
    assert isinstance(model.d, nn.GRU)
    assert model.d is model.e
    assert split_(nn.LSTM(2, 2)) == {}  # the model itself


# ------------------------------------------------------------------------------------------------------ whole models


class Net(nn.Module):
    """A convolution in groups, batch normalisation, a recurrent net, an encoder and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.BatchNorm2d(8)
        self.plain = nn.Conv2d(8, 8, 3, padding=1)
        self.recurrent = nn.GRU(8, 6, bidirectional=True, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.up = nn.ConvTranspose1d(12, 8, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(torch.relu(self.norm(self.conv(x)))).flatten(2).transpose(1, 2)
        y, _ = self.recurrent(y)
        return self.up(self.encoder(y).transpose(1, 2))


PLAN = {
    "conv": sm.LowRank(2),
    "plain": sm.Sparse(density=0.5),
    "recurrent.ih_l0": sm.LowRank(3),
    "recurrent.hh_l0_reverse": sm.Sparse(density=0.4),
    "encoder.self_attn.value": sm.LowRank(4),
    "encoder.linear1": sm.BlockDiagonal(2),
    "up": sm.LowRank(5),
}


@pytest.fixture(scope="module")
def compressed() -> tuple[Net, sm.Result[Net], list[Tensor]]:
    model, data = net_and_data()
    result = sm.compress(
        model,
        budget=sm.Parameters(0.9),
        calibration=data,
        overrides={"*": sm.Dense(), **PLAN},
        measure=False,
    )
    return model, result, data


def net_and_data() -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), [torch.randn(4, 4, 4, 4, generator=seeded(i)) for i in range(3)]


FEW = ("LowRank", "Sparse")


def test_a_saved_model_of_all_kinds_has_at_most_the_bytes_of_the_budget(tmp_path: Path) -> None:
    model, data = net_and_data()
    whole = size_on_disk(sm.save(model, tmp_path / "dense"))
    result = sm.compress(
        model, budget=sm.Memory(int(0.9 * whole)), calibration=data, structures=FEW, measure=False, sequential=False
    )
    assert result.plan.changed
    assert size_on_disk(sm.save(result.model, tmp_path / "small")) <= 0.9 * whole


def test_points_of_the_frontier_are_built_with_all_kinds_of_layers(tmp_path: Path) -> None:
    """Each from a copy, so that what stays as it is in one of them is not shared with another."""
    model, data = net_and_data()
    wanted = [model(x) for x in data]

    def error(found: nn.Module) -> float:
        return float(sum((found(x) - y).square().sum() for x, y in zip(data, wanted, strict=True)).detach())

    result = sm.compress(
        model,
        budget=sm.Parameters(0.8),
        calibration=data,
        structures=FEW,
        evaluate=error,
        measure=False,
        frontier=(0.5,),
        rounds=1,
        folder=tmp_path,
    )
    assert all(torch.equal(model(x), y) for x, y in zip(data, wanted, strict=True))
    built = [point for point in result.frontier if point.quality is not None]
    assert len(built) >= 2
    for point in built:
        again = sm.compress(model, plan=point.plan, calibration=data, folder=tmp_path)
        assert error(again.model) == pytest.approx(next(iter(point.quality.values())), rel=1e-4)


def test_a_quality_is_kept_with_all_kinds_of_layers_and_recovery() -> None:
    model, data = net_and_data()
    wanted = [model(x).detach() for x in data]
    before = copy.deepcopy(model.state_dict())

    def error(found: nn.Module) -> float:
        return float(sum((found(x) - y).square().mean() for x, y in zip(data, wanted, strict=True)).detach())

    result = sm.compress(
        model,
        budget=sm.Quality(loss=0.05, better="lower", tries=3),
        calibration=data,
        structures=FEW,
        evaluate=error,
        measure=False,
        sequential=False,
        recover=sm.Distill(steps=3),
    )
    assert error(result.model) <= 0.05
    assert result.report.parameters.after < result.report.parameters.before
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_compress_takes_all_kinds_of_layers(compressed: tuple[Net, sm.Result[Net], list[Tensor]]) -> None:
    model, result, data = compressed
    assert {name for name, structure in result.plan.layers.items() if not isinstance(structure, sm.Dense)} == set(PLAN)
    assert isinstance(model.recurrent, nn.GRU)
    assert isinstance(result.model.conv, sm.nn.StructuredConv2d)
    assert isinstance(result.model.recurrent, sm.nn.StructuredGRU)
    assert isinstance(result.model.recurrent.hh_l0, nn.Linear)
    report = result.report
    kinds = {layer.name: layer.kind for layer in report.layers}
    assert kinds["conv"] == "Conv2d"
    assert kinds["recurrent.hh_l0"] == "Linear"
    conv = next(layer for layer in report.layers if layer.name == "conv")
    assert conv.dense_parameters == 8 * 2 * 9
    assert conv.parameters == 2 * 2 * (4 + 18)  # two groups
    total = sum(m.numel() for m in [model.conv.weight, model.plain.weight, model.up.weight])
    total += sum(p.numel() for n, p in model.recurrent.named_parameters() if n.startswith("weight"))
    total += sum(p.numel() for n, p in model.encoder.named_parameters() if p.dim() == 2)
    assert report.parameters.before == total
    assert report.statistics is not None
    assert report.statistics["layers"] == 1
    after = report.model_parameters.after
    stored = sum(p.numel() for p in result.model.parameters())
    assert after > stored  # places of sparse entries
    with torch.no_grad():
        assert torch.isfinite(result.model(data[0])).all()


def test_saved_loaded_frozen_and_dense_models_are_equal(
    compressed: tuple[Net, sm.Result[Net], list[Tensor]], tmp_path: Path
) -> None:
    _, result, data = compressed
    small, x = result.model, data[0]
    sm.save(small, tmp_path)
    with torch.device("meta"):
        empty = Net()
    with torch.no_grad():
        y = small(x)
        assert torch.equal(sm.load(tmp_path, Net()).eval()(x), y)
        assert torch.equal(sm.load(tmp_path, empty).eval()(x), y)
        assert torch.equal(sm.load(tmp_path, copy.deepcopy(small)).eval()(x), y)
        frozen, dense = sm.freeze(small), sm.to_dense(small)
        torch.testing.assert_close(frozen(x), y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dense(x), y, rtol=1e-4, atol=1e-5)
    assert isinstance(frozen.conv, FrozenConvolution)
    assert isinstance(frozen.recurrent, FrozenRecurrent)
    assert [type(m) for m in dense.modules()] == [type(m) for m in Net().modules()]
    with pytest.raises(ModelError, match="frozen"):
        sm.save(frozen, tmp_path / "frozen")
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(FormatError, match="no such module"):
        sm.load(tmp_path, other)


def test_a_failed_load_leaves_the_model_whole(
    compressed: tuple[Net, sm.Result[Net], list[Tensor]], tmp_path: Path
) -> None:
    _, result, _ = compressed
    sm.save(result.model, tmp_path)
    model = Net()
    model.plain = nn.Conv2d(8, 8, 1)
    recurrent, attention = model.recurrent, model.encoder.self_attn
    with pytest.raises(FormatError, match="'plain'"):
        sm.load(tmp_path, model)
    assert model.recurrent is recurrent
    assert model.encoder.self_attn is attention


def test_tune_chooses_for_convolutions_on_an_example(
    compressed: tuple[Net, sm.Result[Net], list[Tensor]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, result, data = compressed
    monkeypatch.setenv("STRUCTMAT_CACHE", str(tmp_path))
    frozen = sm.freeze(result.model)
    before = frozen(data[0])
    tuned = sm.tune(frozen, [4], allow_dense=True, example=data[0], seconds=0.001)
    entries = {entry.name: entry for entry in tuned.layers}
    assert {"conv", "plain", "up"} <= set(entries)
    assert entries["conv"].rows == 4 * 16
    for name in ("conv", "plain", "up"):
        assert (frozen.get_submodule(name).dense is not None) == (entries[name].chosen.value == "dense")
    torch.testing.assert_close(frozen(data[0]), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="example"):
        sm.tune(nn.Sequential(frozen.conv), [4])


def test_the_same_call_goes_on_from_its_folder(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(24, 5)).eval()
    data = [torch.randn(6, 4, 6, generator=seeded(i)) for i in range(2)]
    options = {"budget": sm.Parameters(0.6), "calibration": data, "structures": ["LowRank", "Tucker", "CP"]}
    first = sm.compress(model, **options, folder=tmp_path)
    again = sm.compress(model, **options, folder=tmp_path)
    assert first.plan == again.plan
    held = again.model.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in first.model.state_dict().items())
    assert first.report.statistics == again.report.statistics
    alone = sm.compress(model, **options)
    assert alone.plan == first.plan


def test_forms_are_chosen_by_name_and_beat_families_where_they_fit() -> None:
    kernel = torch.einsum("op,pqhw,qi->oihw", torch.randn(8, 3), torch.randn(3, 2, 3, 3), torch.randn(2, 8))
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 16, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(kernel)
    data = [torch.randn(16, 8, 6, 6, generator=seeded(i)) for i in range(2)]
    result = sm.compress(
        model,
        budget=sm.Parameters(0.25),
        calibration=data,
        exclude=("2",),
        structures=["LowRank", "Tucker"],
    )
    layer = result.report.layers[0]
    chosen = next(c for c in layer.candidates if c["structure"] == layer.structure_json)
    assert chosen["form"] == "Tucker"
    assert result.model[0].is_lowered
    with torch.no_grad():
        torch.testing.assert_close(result.model(data[0]), model(data[0]), rtol=1e-3, atol=1e-3)


def test_latency_of_convolutions_is_of_the_layer_that_runs() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 4)).eval()
    data = [torch.randn(2, 16, 8, 8)]
    seen = calibrate(model, scan(model).sites, data)
    site = scan(model).sites[0]
    few, many = (cost_of(sm.Latency(0.5, batch), site, sm.Dense(), seen.load("0")) for batch in (1, 64))
    assert many > 4 * few > 0


# -------------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_estimated_again_where_that_is_nearer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    data = [torch.randn(64, 8, generator=seeded(i)) for i in range(4)]
    model.train()
    for _ in range(30):
        for x in data:
            model(x)
    model.eval()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.mul_(0.5)  # which normalisation undoes, if it knows
        changed[0].bias.add_(1.0)
    found = reestimate(changed, model, data)
    assert found is not None
    assert found.kept
    assert found.after < 0.05 * found.before
    assert changed[1].momentum == model[1].momentum
    assert not changed[1].training
    same = copy.deepcopy(model)
    held = {n: b.clone() for n, b in same.named_buffers()}
    found = reestimate(same, model, data)
    assert found is not None
    assert not found.kept  # nothing can be nearer
    assert all(torch.equal(b, held[n]) for n, b in same.named_buffers())
    assert reestimate(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)), [torch.zeros(1, 2)]) is None


# ----------------------------------------------------------------------------------------------------------- recovery


class Tagger(nn.Module):
    """Takes pairs of tokens and a state, and returns a tuple, as recurrent models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(9, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 9)

    def forward(
        self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.embedding(tokens), state)
        return self.head(y), state


@pytest.mark.parametrize("layerwise", [0, 5])
def test_models_that_return_tuples_recover(layerwise: int) -> None:
    model = Tagger()
    data = [(torch.randint(0, 9, (8, 7), generator=seeded(i)), torch.randint(0, 9, (8, 7))) for i in range(3)]
    result = sm.compress(model, budget=sm.Parameters(0.4), calibration=data, structures=["LowRank"])
    assert isinstance(result.model.lstm, sm.nn.StructuredLSTM)
    settings_ = sm.Distill(steps=25, layerwise=layerwise, learning_rate=3e-3, held_out=data, check_every=5)
    done = recover(result.model, model, data, settings_, show=False)
    assert done.objective == "divergence of the logits"
    assert done.held_out[-1][1] < 0.9 * done.held_out[0][1]
    assert isinstance(model.lstm, nn.LSTM)


def test_batches_of_several_inputs_and_packed_sequences_go_through_forward() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(6, 10, bidirectional=True), nn.Linear(20, 3)

        def forward(self, x: nn.utils.rnn.PackedSequence) -> Tensor:
            y, _ = self.gru(x)
            return self.head(y.data)

    model = Packed()
    data = [nn.utils.rnn.pack_sequence([torch.randn(n, 6) for n in (5, 2, 4)], False) for _ in range(3)]
    result = sm.compress(
        model,
        budget=sm.Parameters(0.5),
        calibration=data,
        structures=["LowRank"],
        forward=lambda m, batch: m(batch),
        recover=sm.Distill(steps=3),
    )
    assert isinstance(result.model.gru, sm.nn.StructuredGRU)
    assert result.model(data[0]).shape == (11, 3)
    found = calibrate(model, scan(model).sites, data, forward=lambda m, batch: m(batch))
    assert found.moments["gru.ih_l0"].rows == 33
    assert found.moments["gru.hh_l0_reverse"].rows == 33


def test_matrices_of_states_are_not_fitted_behind_what_they_do_themselves() -> None:
    model = Tagger()
    data = [torch.randint(0, 9, (8, 7), generator=seeded(i)) for i in range(2)]
    result = sm.compress(
        model, budget=sm.Parameters(0.5), calibration=data, overrides={"*": sm.LowRank(3)}, structures=["LowRank"]
    )
    behind = {layer.name for layer in result.report.layers if layer.norm.endswith("behind the layers before")}
    assert behind == {"head"}  # the inputs' matrix is the first


def test_labels_that_are_not_one_to_one_with_the_logits_make_no_loss() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    labels = torch.tensor([0, 1, -100, 2])

    def forward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"logits": net(batch[0])[batch[1] >= 0]}

    found = calibrate(model, (site_of("0", model[0]),), [(torch.randn(4, 6), labels)], forward=forward)
    assert (found.terms, found.loss) == (3, None)


def test_what_reads_few_directions_is_measured_at_small_shares_too() -> None:
    from structmat.compression.candidates import Candidate, LayerScreen
    from structmat.compression.score import SHARES, points

    def screen_of(losses: dict[int, float]) -> LayerScreen:
        found = [Candidate(sm.Dense(), 100, 0, 0.0, 0.0, "optimal", "", 0.0, 100.0)]
        found += [
            Candidate(sm.LowRank(cost), cost, 0, 0.0, 0.0, "none", "", loss, float(cost))
            for cost, loss in losses.items()
        ]
        return LayerScreen("a", (10, 10), "weights", tuple(sorted(found, key=lambda c: c.cost)), {})

    plain = points(screen_of({5: 1.0, 10: 0.5, 20: 0.2, 35: 0.1, 50: 0.05, 70: 0.01}))
    assert [c.cost for c in plain] == [100 * share for share in SHARES]
    faint = points(screen_of({5: 1.0, 10: 0.5, 20: 1e-6, 35: 1e-7, 50: 1e-8, 70: 1e-9}))
    assert [c.cost for c in faint] == [5, 10, *(100 * share for share in SHARES)]


def test_split_apart_gives_the_model_back_whatever_happens() -> None:
    model = Tagger()
    lstm = model.lstm

    def fail() -> None:
        with split_apart(model):
            assert isinstance(model.lstm, Recurrent)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.lstm is lstm


def test_structured_layers_of_all_kinds_are_recognised(compressed: tuple[Net, sm.Result[Net], list[Tensor]]) -> None:
    _, result, _ = compressed
    found = {n for n, m in result.model.named_modules() if structured_layer_of(m) is not None}
    assert found == set(PLAN)
    names = {s.name for s in scan(result.model).skipped}
    assert found <= names  # already structured
