"""Compression of mixtures of experts: each expert fitted for the tokens that are sent to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.compression.calibrate import calibrate
from structmat.compression.recover import recover
from structmat.compression.scan import scan
from structmat.compression.split import split_apart
from structmat.errors import FormatError, ShapeError
from structmat.nn.experts import ExpertsLinear, SplitExperts

EXPERTS, WIDTH = 4, 12


class Expert(nn.Module):
    """A gated perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class Mixture(nn.Module):
    """The two best of several experts for each token; an expert may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        weights, chosen = torch.softmax(self.router(rows), -1).topk(2, -1)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                y = y.index_add(0, token, expert(rows[token]) * weights[token, place, None])
        return x + y.reshape(x.shape)


def mixture() -> Mixture:
    """The last expert is never chosen."""
    torch.manual_seed(0)
    model = Mixture()
    with torch.no_grad():
        model.router.weight[-1] = 0
        model.router.weight[:-1, 0] = 8  # of every token, since the first number is large
    return model.eval()


def data() -> list[Tensor]:
    found = [torch.randn(6, 10, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for x in found:
        x[..., 0] = 2
    return found


def test_moments_are_those_of_the_tokens_that_are_sent() -> None:
    model, batches = mixture(), data()
    seen = calibrate(model, scan(model).sites, batches)
    rows = torch.cat(batches).reshape(-1, WIDTH)
    chosen = model.router(rows).topk(2, -1).indices
    for number in range(EXPERTS - 1):
        own = rows[(chosen == number).any(-1)].double()
        found = seen.moments[f"experts.{number}.up"]
        assert found.rows == len(own) > 0
        torch.testing.assert_close(found.second_moment, own.T @ own / len(own), rtol=1e-4, atol=1e-5)
    assert f"experts.{EXPERTS - 1}.up" not in seen.moments


def test_each_expert_is_compressed_for_itself() -> None:
    model = mixture()
    overrides = {"router": sm.Dense()}
    result = sm.compress(
        model, budget=sm.Parameters(0.6), calibration=data(), structures=["LowRank"], overrides=overrides
    )
    named = dict(result.model.named_modules())
    made = [name for name, module in named.items() if isinstance(module, sm.nn.StructuredLinear)]
    assert {name.split(".")[1] for name in made} == {"0", "1", "2"}
    assert isinstance(named["router"], nn.Linear)
    idle = {s["name"]: s["reason"] for s in result.report.skipped}
    assert idle[f"experts.{EXPERTS - 1}.down"] == "never called on calibration data"
    x = data()[0]
    blind = sm.compress(
        model,
        budget=sm.Parameters(0.6),
        structures=["LowRank"],
        overrides=overrides,
        exclude=(f"experts.{EXPERTS - 1}.*",),
    )
    error, other = (torch.linalg.norm(made.model(x) - model(x)) for made in (result, blind))
    assert error < other, "fits know what is sent to each expert"
    # A fit for all tokens alike, instead of those that are sent, is farther from the experts' outputs.
    name = "experts.0.up"
    site = next(s for s in scan(model).sites if s.name == name)
    rows = torch.cat(data()).reshape(-1, WIDTH)
    own = rows[(model.router(rows).topk(2, -1).indices == 0).any(-1)]
    weight = model.get_submodule(name).weight
    losses = []
    for seen in (own, rows):
        fit = sm.project(weight, sm.LowRank(4), second_moment=(seen.mT @ seen).double())
        losses.append(torch.linalg.norm(own @ (fit.matrix.to_dense() - weight).float().T).item())
    assert losses[0] <= losses[1]
    assert site.shape == (2 * WIDTH, WIDTH)


# ------------------------------------------------------------------------------------------------- one tensor for all


class Batched(nn.Module):
    """The same mixture with the weights of all experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate, self.up = (ExpertsLinear(EXPERTS, WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = ExpertsLinear(EXPERTS, 2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        weights, chosen = torch.softmax(self.router(rows), -1).topk(2, -1)
        twice, expert = rows.repeat_interleave(2, 0), chosen.flatten()
        y = self.down(nn.functional.silu(self.gate(twice, expert)) * self.up(twice, expert), expert)
        return x + (y * weights.flatten()[:, None]).unflatten(0, (-1, 2)).sum(1).reshape(x.shape)


def batched() -> Batched:
    """Equal to :func:`mixture`."""
    model, other = Batched(), mixture()
    with torch.no_grad():
        model.router.weight.copy_(other.router.weight)
        for name in ("gate", "up", "down"):
            weights = [expert.get_submodule(name).get_parameter("weight") for expert in other.experts]
            model.get_submodule(name).get_parameter("weight").copy_(torch.stack(weights))
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
def test_experts_multiply_their_rows(bias: bool) -> None:
    torch.manual_seed(0)
    layer = ExpertsLinear(3, 5, 4, bias, dtype=torch.float64)
    x, expert = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.tensor([2, 0, 2, 2, 0, 0, 2])
    shift = layer.bias if layer.bias is not None else torch.zeros(3, 4, dtype=torch.float64)
    wanted = torch.einsum("roi,ri->ro", layer.weight[expert], x) + shift[expert]
    apart = SplitExperts.from_experts(layer)
    torch.testing.assert_close(layer(x, expert), wanted)
    torch.testing.assert_close(apart(x, expert), wanted)
    grouped = torch.randn(3, 2, 5, dtype=torch.float64)
    wanted = torch.bmm(grouped, layer.weight.mT) + shift[:, None]
    torch.testing.assert_close(layer(grouped), wanted)
    torch.testing.assert_close(apart(grouped), wanted)
    torch.testing.assert_close(apart.to_experts()(grouped), wanted)
    assert layer(x[:0], expert[:0]).shape == (0, 4)
    assert torch.autograd.gradcheck(lambda rows: apart(rows, expert), (x,))
    assert apart.get_submodule("1").weight.data_ptr() == layer.weight[1].data_ptr(), "memory is shared"
    assert ExpertsLinear.from_weight(layer.weight.detach(), layer.bias).weight.data_ptr() == layer.weight.data_ptr()


def test_experts_refuse_other_axes() -> None:
    layer = ExpertsLinear(3, 5, 4)
    for x, expert in (
        (torch.randn(2, 4, 5), None),
        (torch.randn(7, 5), None),
        (torch.randn(7, 5), torch.zeros(6).long()),
    ):
        with pytest.raises(
            ShapeError, match=r"3 experts take \(3, rows, 5\), or \(rows, 5\) with the expert of each row"
        ):
            layer(x, expert)
    with pytest.raises(ShapeError, match="got shapes"):
        ExpertsLinear.from_weight(torch.randn(3, 4, 5), torch.randn(3, 5))
    with pytest.raises(ShapeError, match="one size in common"):
        SplitExperts([nn.Linear(2, 3), nn.Linear(3, 3)])


def test_one_tensor_is_compressed_as_modules_of_their_own_are() -> None:
    """The same moments, plan and outputs, under other names; the expert without tokens is kept."""
    one, other, batches = batched(), mixture(), data()
    x = batches[0]
    torch.testing.assert_close(one(x), other(x))
    seen, wanted = (calibrate(m, scan(m).sites, batches) for m in (one, other))
    for number in range(EXPERTS - 1):
        found, own = seen.moments[f"up.{number}"], wanted.moments[f"experts.{number}.up"]
        assert (found.rows, found.calls) == (own.rows, own.calls)
        torch.testing.assert_close(found.second_moment, own.second_moment)
        torch.testing.assert_close(found.gradient_moment, own.gradient_moment, rtol=1e-4, atol=1e-8)
    few: dict[str, Any] = {
        "budget": sm.Parameters(0.6),
        "calibration": batches,
        "structures": ["LowRank"],
        "overrides": {"router": sm.Dense()},
        "measure": False,
        "sequential": False,
    }
    made, as_modules = (sm.compress(m, **few) for m in (one, other))
    plan = {f"experts.{n.split('.')[1]}.{n.split('.')[0]}": s for n, s in made.plan.layers.items() if n != "router"}
    assert plan == {n: s for n, s in as_modules.plan.layers.items() if n != "router"}
    assert any(isinstance(s, sm.LowRank) for s in plan.values())
    torch.testing.assert_close(made.model(x), as_modules.model(x), rtol=1e-4, atol=1e-5)
    idle = {s["name"]: s["reason"] for s in made.report.skipped}
    assert idle[f"down.{EXPERTS - 1}"] == "never called on calibration data"
    assert type(one.up) is ExpertsLinear, "the given model is as it was"


@pytest.fixture(scope="module")
def compressed() -> tuple[Batched, sm.Result[Batched]]:
    model = batched()
    result = sm.compress(
        model, budget=sm.Parameters(0.5), calibration=data(), structures=["LowRank", "BlockDiagonal"], include=["*p.*"]
    )
    assert {layer.name.split(".")[0] for layer in result.report.layers} == {"up"}
    return model, result


def test_saved_frozen_and_dense_experts_are_equal(
    compressed: tuple[Batched, sm.Result[Batched]], tmp_path: Path
) -> None:
    model, result = compressed
    x = data()[1]
    wanted = result.model(x)
    assert isinstance(result.model.up, SplitExperts)
    assert type(result.model.down) is ExpertsLinear, "experts of which nothing changed are one tensor again"
    sm.save(result.model, tmp_path)
    torch.testing.assert_close(sm.load(tmp_path, Batched())(x), wanted, rtol=0, atol=0)
    with torch.device("meta"):
        empty = Batched()
    torch.testing.assert_close(sm.load(tmp_path, empty)(x), wanted, rtol=0, atol=0)
    with pytest.raises(FormatError, match="'up', a module of kind 'experts'"):
        sm.load(tmp_path, mixture())
    frozen = sm.freeze(result.model)
    torch.testing.assert_close(frozen(x), wanted, rtol=1e-4, atol=1e-5)
    sm.tune(frozen, [16], seconds=0.002)
    torch.testing.assert_close(frozen(x), wanted, rtol=1e-4, atol=1e-5)
    dense = sm.to_dense(result.model)
    assert type(dense.up) is ExpertsLinear
    torch.testing.assert_close(dense(x), wanted, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_plans_of_experts_are_applied_again_and_recover(
    compressed: tuple[Batched, sm.Result[Batched]], tmp_path: Path
) -> None:
    model, result = compressed
    result.plan.write(tmp_path / "plan.json")
    again = sm.compress(model, plan=sm.Plan.read(tmp_path / "plan.json"), calibration=data())
    x = data()[0]
    torch.testing.assert_close(again.model(x), result.model(x), rtol=1e-4, atol=1e-5)
    before = float(nn.functional.mse_loss(again.model(x), model(x)).detach())
    recover(again.model, model, data(), sm.Distill(steps=30, layerwise=5, hidden=0.1))
    assert float(nn.functional.mse_loss(again.model(x), model(x)).detach()) < before


def test_a_parameter_of_three_axes_is_reported_with_a_way_out() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 8))
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.einsum("eoi,ni->no", self.weight, x))
            return y

    skipped = {s.name: s.reason for s in scan(nn.Sequential(Raw())).skipped}
    assert "(3, 8, 8), which only Raw knows how to read" in skipped["0"]
    assert "sm.nn.ExpertsLinear" in skipped["0"]


# ---------------------------------------------------------------------------------------------------- transformers


def fused(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module of experts of transformers and its arguments."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_local_experts": EXPERTS}
    torch.manual_seed(0)
    x = torch.randn(10, WIDTH)
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(10)])
    arguments: tuple[Tensor, ...] = (x, index, torch.rand(10, 2))
    if kind == "Mixtral":
        made: nn.Module = MixtralExperts(transformers.MixtralConfig(**sizes))
        index[3, 1] = EXPERTS  # none
    elif kind == "GptOss":
        made = GptOssExperts(transformers.GptOssConfig(**sizes))
    elif kind == "Llama4":
        made, arguments = Llama4TextExperts(transformers.Llama4TextConfig(**sizes)), (torch.randn(12, WIDTH),)
    else:
        config = transformers.NemotronHConfig(
            hidden_size=WIDTH, n_routed_experts=EXPERTS, moe_intermediate_size=16, mlp_hidden_act="relu2"
        )
        made = NemotronHExperts(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    if hasattr(made, "config"):
        made.config._experts_implementation = "eager"
    return made, arguments


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "Llama4", "NemotronH"])
def test_experts_of_transformers_taken_apart_are_equal(kind: str) -> None:
    module, arguments = fused(kind)
    model = nn.ModuleList([module])
    wanted = module(*arguments)
    with split_apart(model):
        assert type(model[0]) is not type(module)
        torch.testing.assert_close(model[0](*arguments), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(copy.deepcopy(model)[0](*arguments), wanted, rtol=1e-5, atol=1e-6)
        dense = sm.to_dense(model)[0]
    assert model[0] is module
    assert type(dense) is type(module)
    torch.testing.assert_close(dense(*arguments), wanted, rtol=1e-5, atol=1e-6)
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}


def test_a_language_model_with_experts_is_compressed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, initializer_range=0.2, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    words = [{"input_ids": torch.randint(0, 24, (4, 12), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    result = sm.compress(
        model, budget=sm.Parameters(0.5), calibration=words, structures=["LowRank"], include=("*experts*",)
    )
    changed = set(result.plan.changed)
    assert any(".experts.gate_up_proj." in name for name in changed)
    wanted = result.model(**words[0]).logits
    assert bool(torch.isfinite(wanted).all())
    sm.save(result.model, tmp_path)
    loaded = sm.load(tmp_path, transformers.MixtralForCausalLM(config).eval())
    torch.testing.assert_close(loaded(**words[0]).logits, wanted, rtol=0, atol=0)
    torch.testing.assert_close(sm.freeze(result.model)(**words[0]).logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sm.to_dense(result.model)(**words[0]).logits, wanted, rtol=1e-4, atol=1e-5)
