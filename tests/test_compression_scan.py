"""What can be compressed, and why the rest is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compression_models import Encoder, gpt2, llama, mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

import structmat as sm
from structmat.compression.scan import scan
from structmat.errors import ModelError


def reasons(model: nn.Module, **options: object) -> dict[str, str]:
    return {s.name: s.reason for s in scan(model, **options).skipped}  # type: ignore[arg-type]


def test_linear_layers_are_sites() -> None:
    found = scan(mlp())
    assert [(s.name, s.kind, s.shape, s.bias, s.dtype) for s in found.sites] == [
        ("0", "Linear", (48, 32), True, "float32"),
        ("2", "Linear", (40, 48), True, "float32"),
        ("4", "Linear", (10, 40), True, "float32"),
    ]
    assert found.compressible_parameters == 48 * 32 + 40 * 48 + 10 * 40
    assert found.total_parameters == found.compressible_parameters + 48 + 40 + 10


def test_conv1d_of_transformers_has_its_shape_turned() -> None:
    found = scan(gpt2())
    shapes = {s.name.split(".", 3)[-1]: (s.kind, s.shape) for s in found.sites}
    assert shapes["attn.c_attn"] == ("Conv1D", (96, 32))
    assert shapes["mlp.c_proj"] == ("Conv1D", (32, 128))


def test_patterns_select_by_name() -> None:
    found = scan(llama(), include=("*.mlp.*",), exclude=("model.layers.1.*",))
    assert [s.name.split(".")[-1] for s in found.sites] == ["gate_proj", "up_proj", "down_proj"]
    why = {s.name: s.reason for s in found.skipped}
    assert why["model.layers.1.mlp.up_proj"] == "excluded by name"
    assert why["model.layers.0.self_attn.q_proj"] == "not among the included names"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str) -> None:
    with pytest.raises(ModelError, match=r"'encoder\.\*' in .* matches none of the 3 layers"):
        scan(mlp(), **{option: ("encoder.*",)})  # type: ignore[arg-type]


def test_one_string_instead_of_patterns_is_an_error() -> None:
    with pytest.raises(ModelError, match="one string"):
        scan(mlp(), include="0")


def test_tied_embedding_and_head_are_kept() -> None:
    why = reasons(llama())
    assert "shared with model.embed_tokens.weight" in why["lm_head"]
    assert "embedding" in why["model.embed_tokens"]


def test_an_untied_head_is_kept_unless_asked_for() -> None:
    model = llama(tie_word_embeddings=False)
    assert reasons(model)["lm_head"] == "it is the output head"
    assert "lm_head" in {s.name for s in scan(model, include=("*", "lm_head")).sites}
    assert "lm_head" in {s.name for s in scan(model, asked=("lm_head",)).sites}


def test_transformer_encoder_layer_is_taken_apart_and_put_together() -> None:
    model = Encoder()
    attention = model.block.self_attn
    names = [site.name.removeprefix("block.") for site in scan(model).sites if site.name.startswith("block.")]
    assert names == [*(f"self_attn.{n}" for n in ("query", "key", "value", "output")), "linear1", "linear2"]
    assert model.block.self_attn is attention


def test_attention_that_can_not_be_taken_apart_is_kept() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 2))
    assert "never calls it" in reasons(model)["1.out_proj"]
    with pytest.raises(ModelError, match="out_proj was asked for but can't be replaced"):
        scan(model, include=("*", "1.out_proj"))


def test_a_parent_that_reads_the_weight_is_recognised_by_its_source() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.to(self.a.weight.dtype)))

    assert reasons(nn.Sequential(Reads())) == {"0.a": "Reads reads its weight"}


def test_a_shared_module_is_kept_and_compressed_under_all_names_if_asked() -> None:
    linear = nn.Linear(16, 16)
    model = nn.Sequential(linear, nn.ReLU(), linear, nn.Linear(16, 16))
    assert "other names are 2" in reasons(model)["0"]
    (site,) = scan(model, include=("0",)).sites
    assert site.aliases == ("2",)
    result = sm.compress(model, budget=sm.Parameters(0.5), include=("0", "3"))
    assert isinstance(result.model[0], sm.nn.StructuredLinear)
    assert result.model[0] is result.model[2]


def test_a_shared_weight_is_kept() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    assert "shared with 1.weight" in reasons(model)["0"]
    assert "shared with 0.weight" in reasons(model)["1"]
    result = sm.compress(model, budget=sm.Parameters(0.5))
    assert result.model[1].weight is result.model[0].weight
    assert {s["name"] for s in result.report.skipped} == {"0", "1"}


def test_views_of_one_storage_count_as_shared() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert "shared" in reasons(model)["0"]


def test_parametrized_hooked_and_special_layers_are_kept() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Standardised(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), Mine(8, 8), Standardised(8, 8, 3))
    parametrize.register_parametrization(model[0], "weight", Double())
    spectral_norm(model[1])
    model[2].register_forward_hook(lambda *_: None)
    model[3] = torch.nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)
    why = reasons(model)
    assert "parametrization" in why["0"]
    assert "parametrization" in why["1"]
    assert "hooks" in why["2"]
    assert "parent reads" in why["3"]
    assert why["5"] == "Mine has a forward of its own"
    assert why["6"] == "Standardised has a _conv_forward of its own"
    assert [s.name for s in scan(model).sites] == ["4"]


@pytest.mark.parametrize("computed", [parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm])
def test_a_weight_that_is_computed_can_not_be_asked_for(computed: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(computed(nn.Linear(8, 8)), nn.Linear(8, 8))
    for options in ({"include": ("*", "0")}, {"asked": ("0",)}):
        with pytest.raises(ModelError, match=r"0 was asked for but can't be replaced: .* remove that first"):
            scan(model, **options)
    if parametrize.is_parametrized(model[0]):
        parametrize.remove_parametrizations(model[0], "weight")
        assert [s.name for s in scan(model).sites] == ["0", "1"]


def test_large_unknown_layers_are_reported() -> None:
    model = nn.Sequential(nn.Conv3d(8, 8, 3), nn.Flatten(), nn.Linear(48, 8), nn.LayerNorm(8))
    (skipped,) = scan(model).skipped
    assert (skipped.name, skipped.kind, skipped.parameters) == ("0", "Conv3d", 8 * 8 * 27 + 8)
    assert "Conv3d are not known to compress" in skipped.reason
    small = nn.Sequential(nn.Conv3d(2, 2, 1), nn.Flatten(), nn.Linear(480, 80))
    assert "one and two dimensions" in scan(small).skipped[0].reason
    with pytest.raises(ModelError, match="Conv3d"):
        scan(nn.Sequential(nn.Conv3d(8, 8, 3)))


def test_a_model_of_unknown_layers_is_an_error_that_names_them() -> None:
    with pytest.raises(ModelError, match=r"no layer that can be compressed: 0 \(Conv3d\)"):
        scan(nn.Sequential(nn.Conv3d(8, 8, 3)))
    with pytest.raises(ModelError, match="no layer with a weight"):
        scan(nn.Sequential(nn.ReLU()))
    with pytest.raises(ModelError, match="the model itself"):
        scan(nn.Linear(8, 8))


def test_a_lazy_layer_is_kept() -> None:
    assert "no shape yet" in reasons(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)))["0"]
