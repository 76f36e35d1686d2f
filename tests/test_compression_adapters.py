"""What compression knows of each kind of module: adapters against dense truths, modules taken apart."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import structmat as sm
from structmat.compression.calibrate import calibrate
from structmat.compression.layers import Load, cost_of, layer_of, layers, splitter_of
from structmat.compression.replace import replace_layers
from structmat.compression.scan import scan, site_of
from structmat.compression.split import split_, whole_again_
from structmat.nn.attention import SplitAttention
from structmat.nn.recurrent import Recurrent, joined, split
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
    monkeypatch.setattr("structmat.nn.convolution.base.PATCH_NUMBERS", 1)
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
