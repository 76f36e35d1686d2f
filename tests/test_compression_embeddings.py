"""Compression of embeddings and of output heads that are tied to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compression_models import llama, tokens
from torch import Tensor, nn

import structmat as sm
from structmat.compression.calibrate import calibrate
from structmat.compression.running import outcome, sampled_loss
from structmat.compression.scan import scan
from structmat.compression.tables import Use, looked_up, multiplied, together
from structmat.errors import ModelError, StructureError
from structmat.io import size_on_disk
from structmat.nn import StructuredEmbedding, StructuredLinear

WORDS, WIDTH = 48, 16
FAST = ("LowRank", "Monarch", "TensorTrain", "Sparse")


class GPT(nn.Module):
    """A small decoder with embeddings of tokens and positions; the head may be tied to the former."""

    def __init__(self, tied: bool = True, padding: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH, padding)
        self.positions = nn.Embedding(12, WIDTH)
        self.mix = nn.Linear(WIDTH, 2 * WIDTH)
        self.back = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        y = y + self.back(torch.relu(self.mix(y.cumsum(1) / 4)))
        logits: Tensor = self.head(self.norm(y))
        return logits


def gpt(**options: Any) -> GPT:
    """Weights whose table is nearly of rank 6."""
    torch.manual_seed(0)
    model = GPT(**options)
    with torch.no_grad():
        table = torch.randn(WORDS, 6) @ torch.randn(6, WIDTH) / 3 + 0.02 * torch.randn(WORDS, WIDTH)
        if model.tokens.padding_idx is not None:
            table[model.tokens.padding_idx] = 0
        model.tokens.weight.copy_(table)
    return model.eval()


def texts(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Some words are frequent."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        x = (torch.rand(8, 12, generator=generator) ** 2 * WORDS).long()
        made.append((x, x.roll(-1, 1)))
    return made


def compressed(model: nn.Module, **options: Any) -> sm.Result[Any]:
    given = {"budget": sm.Parameters(0.5), "calibration": texts(), "structures": FAST, "include": ("*", "tokens")}
    return sm.compress(model, **{**given, **options})


def test_embeddings_are_kept_unless_asked_for_by_name() -> None:
    model = gpt()
    found = scan(model)
    assert [site.name for site in found.sites] == ["mix", "back"]
    reasons = {s.name: s.reason for s in found.skipped}
    assert "asked for by its name" in reasons["positions"]
    assert "asked for by its name" in reasons["tokens"]
    assert "shared with" in reasons["head"]
    asked = scan(model, include=("*", "tokens"))
    sites = {site.name: site for site in asked.sites}
    assert set(sites) == {"tokens", "mix", "back"}
    assert sites["tokens"].tied == ("head",)
    assert sites["tokens"].numbers == WORDS * WIDTH, "counted once"
    assert "that of tokens" in {s.name: s.reason for s in asked.skipped}["head"]
    assert scan(gpt(tied=False), include=("tokens",)).sites[0].tied == ()


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_with_its_table(tied: bool, tmp_path: Path) -> None:
    model = gpt(tied=tied)
    result = compressed(model, overrides={"tokens": sm.LowRank(6)})
    made = result.model
    assert isinstance(made.tokens, StructuredEmbedding)
    if tied:
        assert isinstance(made.head, StructuredLinear)
        assert all(own is made.head.get_parameter(name) for name, own in made.tokens.named_parameters())
    else:
        assert isinstance(made.head, nn.Linear | StructuredLinear)
        assert made.tokens.get_parameter("left").data_ptr() not in {p.data_ptr() for p in made.head.parameters()}
    assert isinstance(model.tokens, nn.Embedding)
    x = texts()[0][0]
    y = made(x)
    agreement = (y.argmax(-1) == model(x).argmax(-1)).float().mean()
    assert agreement > 0.8
    layer = next(layer for layer in result.report.layers if layer.name == "tokens")
    assert (layer.kind, layer.shape) == ("Embedding", (WORDS, WIDTH))
    spent = 6 * (WORDS + WIDTH)
    assert layer.parameters == spent
    before, after = result.report.model_parameters.before, result.report.model_parameters.after
    assert before - after == sum(s.dense_parameters - s.parameters for s in result.report.layers)
    # Saved, loaded, frozen, dense.
    sm.save(made, tmp_path)
    loaded = sm.load(tmp_path, gpt(tied=tied))
    assert torch.equal(loaded(x), y)
    if tied:
        assert all(own is loaded.head.get_parameter(name) for name, own in loaded.tokens.named_parameters())
    torch.testing.assert_close(sm.freeze(made)(x), y, rtol=1e-4, atol=1e-4)
    dense = sm.to_dense(made)
    assert type(dense.tokens) is nn.Embedding
    assert (dense.head.weight is dense.tokens.weight) == tied
    torch.testing.assert_close(dense(x), y, rtol=1e-4, atol=1e-4)


def test_what_is_chosen_has_fast_rows_and_memory_is_kept(tmp_path: Path) -> None:
    model = gpt()
    whole = size_on_disk(sm.save(model, tmp_path / "whole"))
    result = compressed(model, budget=sm.Memory(0.8), include=("*", "tokens", "positions"))
    assert size_on_disk(sm.save(result.model, tmp_path / "small")) <= 0.8 * whole
    for module in result.model.modules():
        assert not isinstance(module, StructuredEmbedding) or module.is_fast
    refused = {layer.name: layer.refused for layer in result.report.layers}
    assert refused["tokens"]["single rows of it can't be taken fast"] > 0
    assert "single rows of it can't be taken fast" not in refused["mix"]
    with pytest.raises(StructureError, match="taken fast"):
        compressed(model, overrides={"tokens": sm.Sparse(density=0.2)})


def test_operations_of_lookups_are_counted() -> None:
    """A dense lookup takes none, so an untied table never gets cheaper; a tied one does by its head."""
    for tied in (False, True):
        result = compressed(gpt(tied=tied), budget=sm.Flops(0.6))
        table = next(layer for layer in result.report.layers if layer.name == "tokens")
        assert tied or table.structure == "Dense()"
        assert not tied or table.refused.get("not cheaper than the dense layer in FLOPs per sample", 0) >= 0
    alone = compressed(
        gpt(), budget=sm.Flops(0.99), overrides={"tokens": sm.LowRank(4), "mix": sm.Dense(), "back": sm.Dense()}
    )
    # 12 lookups of 4 x 16 multiply-adds, and 12 rows through 4 numbers.
    others = 12 * 2 * (2 * 2 * WIDTH * WIDTH) - 12 * 3 * WIDTH
    head = 12 * (2 * 4 * (WORDS + WIDTH) - 4 - WORDS)
    assert alone.report.flops.after == pytest.approx(others + head + 12 * 2 * 4 * WIDTH)


def test_recovery_and_in_place_and_a_folder(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "budget": sm.Parameters(0.4),
        "calibration": texts(),
        "structures": ("LowRank",),
        "include": ("*", "tokens"),
        "recover": sm.Distill(steps=5, layerwise=2),
        "folder": tmp_path,
    }
    first = sm.compress(gpt(), **options)
    second = sm.compress(gpt(), **options)
    x = texts()[0][0]
    assert torch.equal(first.model(x), second.model(x))
    held = dict(first.model.tokens.named_parameters())
    assert all(own is first.model.head.get_parameter(name) for name, own in held.items()), "tied through training"
    model = gpt()
    place = sm.compress_(model, plan=first.plan, calibration=texts())
    assert place.model is model
    assert isinstance(model.tokens, StructuredEmbedding)


def test_a_failed_run_gives_tied_tables_back() -> None:
    model = gpt()
    weight, value = model.tokens.weight, model.tokens.weight.detach().clone()

    def broken(_: nn.Module) -> float:
        if isinstance(model.tokens, StructuredEmbedding):
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        sm.compress_(
            model,
            budget=sm.Parameters(0.4),
            calibration=texts(),
            structures=("LowRank",),
            include=("*", "tokens"),
            evaluate=broken,
        )
    assert model.tokens.weight is weight
    assert model.head.weight is weight
    assert torch.equal(weight, value)


def test_a_padding_row_stays_zero_and_the_rest_is_refused() -> None:
    result = compressed(gpt(padding=3), overrides={"tokens": sm.LowRank(6)})
    assert not result.model.tokens(torch.tensor([3])).any()
    for spoil, message in (
        ("max_norm", "max_norm"),
        ("sparse", "sparse"),
        ("scale_grad_by_freq", "scale_grad_by_freq"),
        ("row", "padding_idx=3"),
    ):
        model = gpt(padding=3)
        if spoil == "row":
            with torch.no_grad():
                model.tokens.weight[3] = 1
        else:
            setattr(model.tokens, spoil, 1.0)
        with pytest.raises(ModelError, match=message):
            scan(model, include=("tokens",))
        assert [s.name for s in scan(model).sites] == ["mix", "back"], "unless asked for it is no matter"


def test_an_embedding_with_a_forward_of_its_own_is_refused() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    model = gpt(tied=False)
    model.tokens = Scaled(WORDS, WIDTH)
    with pytest.raises(ModelError, match="Scaled has a forward of its own"):
        scan(model, include=("tokens",))


def test_a_plan_that_keeps_a_table_dense_is_applied() -> None:
    model = gpt()
    result = compressed(model, overrides={"tokens": sm.Dense()})
    assert result.plan.layers["tokens"] == sm.Dense()
    again = sm.compress(model, plan=result.plan, calibration=texts())
    assert again.plan.layers == result.plan.layers
    assert again.model.head.weight is again.model.tokens.weight
    x, _ = texts(1)[0]
    torch.testing.assert_close(again.model(x), result.model(x))


class Reading(GPT):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.linear(self.tokens(x), self.tokens.weight)
        return y


def test_a_model_that_reads_the_table_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Reading reads its weight"):
        scan(Reading(), include=("tokens",))


def test_a_model_of_transformers_with_a_tied_head() -> None:
    model = llama()
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    data = tokens()
    result = sm.compress(
        model, budget=sm.Parameters(0.6), calibration=data, structures=("LowRank",), include=("*", name)
    )
    table = result.model.get_submodule(name)
    assert name in result.plan.layers
    if isinstance(table, StructuredEmbedding):
        assert all(own is result.model.lm_head.get_parameter(n) for n, own in table.named_parameters())


# --------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("large", [True, False])
def test_moments_of_a_table_are_those_of_its_positions_and_gradients(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against hooks on the model, with the same sampled labels."""
    if large:
        monkeypatch.setattr("structmat.compression.tables.LARGE_TABLE", 8)
        monkeypatch.setattr("structmat.compression.calibrate.LARGE_TABLE", 8)
    model, data = gpt(tied=False), texts()
    found = calibrate(model, scan(model, include=("tokens",)).sites, data)
    own, outer = found.moments["tokens"], found.moments["tokens"].gradient_moment
    positions = torch.cat([x.flatten() for x, _ in data])
    assert own.lookups == own.rows == len(positions)
    assert found.load("tokens").lookups == 12
    gradients: list[Tensor] = []

    def hook(module: nn.Module, x: object, y: Tensor) -> None:
        y.register_hook(lambda g: gradients.append(g.flatten(0, 1)))

    model.tokens.register_forward_hook(hook)
    generator = torch.Generator().manual_seed(0)
    for batch in data:
        sampled_loss(outcome(model(batch[0]), batch), generator).backward()
    g = torch.cat(gradients).double()
    assert outer is not None
    assert outer.dim() == (0 if large else 2)
    trace = outer * WORDS if large else outer.trace()
    torch.testing.assert_close(own.rows * trace * own.second_moment, g.T @ g, rtol=1e-4, atol=1e-6)
    if not large:
        shares = torch.bincount(positions, minlength=WORDS).double() / len(positions)
        torch.testing.assert_close(outer / trace, torch.diag(shares))


@pytest.mark.parametrize("large", [True, False])
def test_a_tied_table_is_fitted_for_both_uses(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr("structmat.compression.tables.LARGE_TABLE", 8)
        monkeypatch.setattr("structmat.compression.calibrate.LARGE_TABLE", 8)
    model, data = gpt(), texts()
    tied = calibrate(model, scan(model, include=("tokens",)).sites, data).moments["tokens"]
    apart = gpt(tied=False)
    apart.head.weight = nn.Parameter(apart.tokens.weight.detach().clone())
    sites = scan(apart, include=("tokens", "head")).sites
    table, head = (calibrate(apart, sites, data).moments[name] for name in ("tokens", "head"))
    total = 0.0
    for moments in (table, head):
        outer = moments.gradient_moment
        assert outer is not None
        trace = outer.trace() if outer.dim() else outer * WORDS
        total += moments.rows * float(trace) * float(moments.second_moment.trace())
    outer = tied.gradient_moment
    assert outer is not None
    trace = outer.trace() if outer.dim() else outer * WORDS
    assert tied.rows * float(trace) * float(tied.second_moment.trace()) == pytest.approx(total, rel=1e-4)


def test_partial_traces_of_both_uses_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)

    def moment(size: int) -> Tensor:
        x = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return x @ x.T

    first = looked_up(moment(3), torch.tensor([4.0, 0.0, 1.0, 2.0, 3.0]).double(), (5, 3))
    second = multiplied(moment(3), moment(5), 20, (5, 3))
    for uses in ((first,), (first, second)):
        rows = uses[-1].rows
        inner, outer = together(uses, rows)
        assert outer is not None
        wanted = sum(u.rows * torch.kron(u.outer, u.inner) for u in uses if u.outer is not None)
        product = rows * torch.kron(outer, inner)
        assert isinstance(wanted, Tensor)
        for axes in ("iaja->ij", "aiaj->ij"):
            one, other = (torch.einsum(axes, m.reshape(5, 3, 5, 3)) for m in (wanted, product))
            torch.testing.assert_close(one, other)
    assert together((Use(moment(3), None, 0.0, 5),), 5)[1] is None
