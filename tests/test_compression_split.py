"""Compression of fused projections and of gates: rows of one matrix with structures of their own."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compression_models import gpt2, tokens
from torch import Tensor, nn

import structmat as sm
import structmat.compression.norms
from structmat.compression.budget import Parameters
from structmat.compression.calibrate import calibrate
from structmat.compression.candidates import Candidate, LayerScreen
from structmat.compression.recover import recover
from structmat.compression.scan import scan
from structmat.compression.screen import screen
from structmat.compression.stacks import combinations, within
from structmat.errors import BudgetError, ModelError
from structmat.structure import count_stored

WIDTH, HEADS = 16, 4


class Attention(nn.Module):
    """Of a fused projection, or of three; ``queries`` heads share each head of keys and values."""

    def __init__(self, *, fused: bool = True, queries: int = 1, interleaved: bool = False) -> None:
        super().__init__()
        self.queries, self.interleaved, self.size = queries, interleaved, WIDTH // HEADS
        self.groups = HEADS // queries
        self.rows = [WIDTH, self.groups * self.size, self.groups * self.size]
        if fused:
            self.qkv = nn.Linear(WIDTH, sum(self.rows))
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, rows) for rows in self.rows)
        self.fused = fused
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, times, _ = x.shape
        if not self.fused:
            q, k, v = self.q(x), self.k(x), self.v(x)
        elif self.interleaved:
            y = self.qkv(x).unflatten(-1, (self.groups, -1))
            q, k, v = (z.flatten(-2) for z in y.split([rows // self.groups for rows in self.rows], -1))
        else:
            q, k, v = self.qkv(x).split(self.rows, -1)
        q, k, v = (z.view(batch, times, -1, self.size).transpose(1, 2) for z in (q, k, v))
        k, v = (z.repeat_interleave(self.queries, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(y.reshape(x.shape))


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(**options) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x.mean(1))
        return y


def low_rank(rows: int, rank: int, index: int, columns: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator) / WIDTH**0.5


def net(ranks: tuple[int | None, ...] = (2, 4, None), **options: Any) -> Net:
    """Queries, keys and values of the given ranks."""
    torch.manual_seed(0)
    model = Net(**options)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Attention)
        if not block.fused:
            continue
        rows, parts = block.rows, block.groups if block.interleaved else 1
        given = [
            low_rank(own, rank or own, 3 * number + i) for i, (own, rank) in enumerate(zip(rows, ranks, strict=True))
        ]
        together = torch.cat([w.unflatten(0, (parts, -1)) for w in given], 1).flatten(0, 1)
        with torch.no_grad():
            block.qkv.weight.copy_(together)
    return model.eval()


def data(count: int = 3) -> list[Tensor]:
    return [torch.randn(6, 5, WIDTH, generator=torch.Generator().manual_seed(10 + i)) for i in range(count)]


SPLITS: list[tuple[dict[str, Any], Any]] = [
    ({}, 3),
    ({}, [16, 16, 16]),
    ({"queries": 2}, [16, 8, 8]),
    ({"interleaved": True}, {"rows": 3, "groups": 4}),
    ({"queries": 2, "interleaved": True}, {"rows": [8, 4, 4], "groups": 2}),
]


@pytest.mark.parametrize(("options", "split"), SPLITS)
def test_each_part_gets_what_it_needs(options: dict[str, Any], split: Any) -> None:
    """Queries and keys of low rank, values of full rank: nothing is lost where a single structure would lose much."""
    model = net((2, 3, None), **options)
    rows = model.blocks[0].rows
    needed = 2 * (2 * (rows[0] + WIDTH) + 3 * (rows[1] + WIDTH) + rows[2] * WIDTH)
    few: dict[str, Any] = {
        "budget": sm.Parameters(needed + 2 * WIDTH * WIDTH + 3 * WIDTH),
        "structures": ["LowRank"],
        "overrides": {"head": sm.Dense(), "*.out": sm.Dense()},
    }
    x = data()[0]
    apart = sm.compress(model, calibration=data(), split={"blocks.*.qkv": split}, **few)
    whole = sm.compress(model, calibration=data(), **few)
    wanted = model(x)
    error, other = (float(torch.linalg.norm(r.model(x) - wanted).detach()) for r in (apart, whole))
    assert error < 1e-4 < 0.03 < other
    for name in ("blocks.0.qkv", "blocks.1.qkv"):
        structure = apart.plan.layers[name]
        assert isinstance(structure, sm.Stacked)
        assert structure.parts == (sm.LowRank(2), sm.LowRank(3), sm.Dense())
    assert apart.report.budget["spent"] <= apart.report.budget["limit"]


def test_parts_are_judged_as_layers_of_their_own_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused model and the one with three layers: the same inputs, gradients, norms and predicted losses. (But that
    damping is by the mean gradient of the whole layer.)"""
    monkeypatch.setattr(structmat.compression.norms, "OUTPUT_DAMPING", 1e-6)
    torch.manual_seed(0)
    fused, apart = Net(), Net(fused=False)
    for one, other in zip(fused.blocks, apart.blocks, strict=True):
        assert isinstance(one, Attention)
        assert isinstance(other, Attention)
        for name in ("q", "k", "v"):
            part = "qkv".index(name)
            with torch.no_grad():
                other.get_submodule(name).get_parameter("weight").copy_(one.qkv.weight.split(one.rows)[part])
                other.get_submodule(name).get_parameter("bias").copy_(one.qkv.bias.split(one.rows)[part])
        other.out.load_state_dict(one.out.state_dict())
    apart.head.load_state_dict(fused.head.state_dict())
    found = {}
    for model, split in ((fused, {"*.qkv": 3}), (apart, None)):
        sites = scan(model.eval(), split=split).sites
        seen = calibrate(model, sites, data())
        menu = ["LowRank", "BlockDiagonal"]
        found[split is None] = screen(model, sites, Parameters(0.5), calibration=seen, structures=menu)
    for block in (0, 1):
        for number, name in enumerate("qkv"):
            one = found[False][f"blocks.{block}.qkv"].parts[number]
            other_ = found[True][f"blocks.{block}.{name}"]
            assert [c.structure for c in one.candidates] == [c.structure for c in other_.candidates]
            assert len(one.candidates) > 4
            for a, b in zip(one.candidates, other_.candidates, strict=True):
                assert a.loss == pytest.approx(b.loss, rel=1e-3, abs=1e-9)
                assert a.cost == b.cost


def test_without_data_losses_of_parts_add_up_to_those_of_the_whole() -> None:
    model = net()
    sites = scan(model, split={"*.qkv": 3}).sites
    layer = screen(model, sites, Parameters(0.5), structures=["LowRank"])["blocks.0.qkv"]
    known = [{c.structure: c.loss for c in part.candidates} for part in layer.parts]
    stacks = [c for c in layer.candidates if isinstance(c.structure, sm.Stacked)]
    assert len(stacks) > 4
    for stack in stacks:
        assert isinstance(stack.structure, sm.Stacked)
        total = sum(own[part] for own, part in zip(known, stack.structure.parts, strict=True))
        assert stack.loss == pytest.approx(total, rel=1e-4, abs=1e-12)


@pytest.fixture(scope="module")
def compressed() -> tuple[Net, sm.Result[Net]]:
    model = net(queries=2)
    result = sm.compress(
        model,
        budget=sm.Parameters(0.5),
        calibration=data(),
        split={"*.qkv": [16, 8, 8]},
        structures=["LowRank", "Monarch"],
    )
    assert any(isinstance(s, sm.Stacked) for s in result.plan.layers.values())
    return model, result


def test_a_plan_is_saved_edited_and_applied_again(compressed: tuple[Net, sm.Result[Net]], tmp_path: Path) -> None:
    model, result = compressed
    result.plan.write(tmp_path / "plan.json")
    plan = sm.Plan.read(tmp_path / "plan.json")
    assert plan == result.plan
    again = sm.compress(model, plan=plan, calibration=data())
    x = data()[0]
    torch.testing.assert_close(again.model(x), result.model(x), rtol=1e-4, atol=1e-5)
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    name = next(n for n, s in plan.layers.items() if isinstance(s, sm.Stacked))
    written["layers"][name]["structure"]["parts"][1] = {"family": "LowRank", "rank": 0.5}
    (tmp_path / "plan.json").write_text(json.dumps(written), encoding="utf-8")
    edited = sm.compress(model, plan=sm.Plan.read(tmp_path / "plan.json"), calibration=data())
    structure = edited.plan.layers[name]
    assert isinstance(structure, sm.Stacked)
    assert structure.parts[1] == sm.LowRank(2)
    with pytest.raises(BudgetError, match="leave out split"):
        sm.compress(model, plan=plan, split={"*.qkv": 2})


def test_saved_frozen_tuned_and_dense_models_are_equal(compressed: tuple[Net, sm.Result[Net]], tmp_path: Path) -> None:
    model, result = compressed
    x = data()[1]
    wanted = result.model(x)
    sm.save(result.model, tmp_path)
    torch.testing.assert_close(sm.load(tmp_path, Net(queries=2))(x), wanted, rtol=0, atol=0)
    frozen = sm.freeze(result.model)
    torch.testing.assert_close(frozen(x), wanted, rtol=1e-4, atol=1e-5)
    sm.tune(frozen, [30], seconds=0.002)
    torch.testing.assert_close(frozen(x), wanted, rtol=1e-4, atol=1e-5)
    dense = sm.to_dense(result.model)
    torch.testing.assert_close(dense(x), wanted, rtol=1e-4, atol=1e-5)
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_the_report_shows_what_each_part_became(compressed: tuple[Net, sm.Result[Net]], tmp_path: Path) -> None:
    _, result = compressed
    layers = {layer.name: layer for layer in result.report.layers}
    name = next(n for n, s in result.plan.layers.items() if isinstance(s, sm.Stacked))
    assert str(result.plan.layers[name]) in str(layers[name].structure)
    assert layers[name].parameters == count_stored(result.plan.layers[name], (32, 16))
    result.report.write(tmp_path / "report.json")
    assert "Stacked" in (tmp_path / "report.json").read_text(encoding="utf-8")


def test_all_tensors_learn_in_recovery(compressed: tuple[Net, sm.Result[Net]]) -> None:
    model, result = compressed
    student = sm.compress(model, plan=result.plan, calibration=data()).model
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    x = data()[0]
    distance = float(F.mse_loss(student(x), model(x)).detach())
    recover(student, model, data(), sm.Distill(steps=40))
    assert float(F.mse_loss(student(x), model(x)).detach()) < distance
    name = next(n for n, s in result.plan.layers.items() if isinstance(s, sm.Stacked))
    moved = [n for n, p in student.named_parameters() if n.startswith(f"{name}.") and not torch.equal(p, before[n])]
    assert {n.split(".")[-1].split("_")[0] for n in moved} >= {"part0", "part1", "part2"}


@pytest.mark.parametrize("budget", [sm.Flops(0.5), sm.Memory(0.7), (sm.Parameters(0.6), sm.Flops(0.55))], ids=str)
def test_budgets_of_all_units_hold_with_parts(budget: Any) -> None:
    result = sm.compress(
        net(), budget=budget, calibration=data(), split={"*.qkv": 3}, structures=["LowRank"], measure=False
    )
    goals = result.report.budget.get("goals") or [result.report.budget]
    assert all(goal["spent"] <= goal["limit"] for goal in goals)
    if not isinstance(budget, sm.Memory):  # so small a model that descriptions outweigh what parts save
        assert any(isinstance(s, sm.Stacked) for s in result.plan.layers.values())


# -------------------------------------------------------------------------------------------- attention and gates


def test_projections_of_heads_are_parts_of_attention() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)}).eval()
    with torch.no_grad():
        for head in range(HEADS):
            rows = slice(4 * head, 4 * head + 4)
            model["attention"].in_proj_weight[rows] = low_rank(4, 1 if head < 3 else 4, head)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = net["attention"](x, x, x, need_weights=False)[0]  # type: ignore[index]
        return y

    result = sm.compress(
        model,
        budget=sm.Parameters(4 * WIDTH * WIDTH - 100),
        calibration=data(),
        forward=forward,
        split={"attention.query": HEADS},
        structures=["LowRank"],
        overrides={f"attention.{n}": sm.Dense() for n in ("key", "value", "output")},
    )
    structure = result.plan.layers["attention.query"]
    assert isinstance(structure, sm.Stacked)
    assert structure.parts == (*3 * (sm.LowRank(1),), sm.Dense())
    x = data()[0]
    torch.testing.assert_close(forward(result.model, x), forward(model, x), rtol=1e-4, atol=1e-5)


def test_the_transposed_fused_projection_of_gpt2_is_split(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, words = gpt2(), tokens()
    name = "transformer.h.0.attn.c_attn"
    with torch.no_grad():  # queries and keys of rank 2; the weight is stored (in, out)
        for part in (0, 1):
            weight = model.get_submodule(name).get_parameter("weight")
            weight[:, 32 * part : 32 * part + 32] = low_rank(32, 2, part, 32)
    result = sm.compress(
        model,
        budget=sm.Parameters(2 * 2 * 64 + 32 * 32),
        calibration=words,
        include=("*c_attn",),
        split={"*.c_attn": 3},
        structures=["LowRank"],
    )
    structure = result.plan.layers[name]
    assert isinstance(structure, sm.Stacked)
    assert structure.parts == (sm.LowRank(2), sm.LowRank(2), sm.Dense())
    wanted = model(**words[0]).logits
    torch.testing.assert_close(result.model(**words[0]).logits, wanted, rtol=1e-3, atol=1e-4)
    sm.save(result.model, tmp_path)
    torch.testing.assert_close(sm.load(tmp_path, gpt2(1))(**words[0]).logits, result.model(**words[0]).logits)


RECURRENT = [(nn.LSTM, 4), (nn.GRU, 3)]


@pytest.mark.parametrize(("kind", "gates"), RECURRENT)
def test_gates_get_sizes_of_their_own(kind: type[nn.RNNBase], gates: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hidden = 12

    def make() -> nn.Sequential:
        return nn.Sequential(kind(WIDTH, hidden, batch_first=True))

    model = make().eval()
    net_ = model[0]
    assert isinstance(net_, nn.RNNBase)
    with torch.no_grad():  # of the last gate nothing is to be had
        for key, columns in (("weight_ih_l0", WIDTH), ("weight_hh_l0", hidden)):
            for gate in range(gates - 1):
                net_.get_parameter(key)[gate * hidden : (gate + 1) * hidden] = low_rank(hidden, 2, gate, columns)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = net(x)[0]
        return y

    share = ((gates - 1) * 2 * (4 * hidden + WIDTH) + hidden * (WIDTH + hidden)) / (gates * hidden * (WIDTH + hidden))
    few: dict[str, Any] = {"calibration": data(), "forward": forward, "structures": ["LowRank"]}
    result = sm.compress(model, budget=sm.Parameters(share + 0.01), split={"0.*": "gates"}, **few)
    wanted = (*(gates - 1) * (sm.LowRank(2),), sm.Dense())
    for name in ("0.ih_l0", "0.hh_l0"):
        structure = result.plan.layers[name]
        assert isinstance(structure, sm.Stacked)
        assert structure.parts == wanted
    x = data()[0]
    torch.testing.assert_close(forward(result.model, x), forward(model, x), rtol=1e-4, atol=1e-5)
    sm.save(result.model, tmp_path)
    torch.testing.assert_close(forward(sm.load(tmp_path, make()), x), forward(result.model, x))
    torch.testing.assert_close(forward(sm.freeze(result.model), x), forward(result.model, x))
    dense = sm.to_dense(result.model)
    assert isinstance(dense[0], kind)
    torch.testing.assert_close(forward(dense, x), forward(model, x), rtol=1e-4, atol=1e-5)
    whole = sm.compress(model, budget=sm.Parameters(share + 0.01), **few)
    assert float(torch.linalg.norm(forward(whole.model, x) - forward(model, x)).detach()) > 1e-2
    y = forward(result.model, x)
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in result.model.parameters())


def test_stacked_gates_are_kept_where_that_is_better() -> None:
    """Gates of one row space: one low rank for all of them is smaller than one for each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(WIDTH, 12, batch_first=True)).eval()
    with torch.no_grad():
        model[0].weight_ih_l0.copy_(low_rank(48, 3, 0))
    result = sm.compress(
        model,
        budget=sm.Parameters(48 * 12 + 3 * (48 + WIDTH)),
        calibration=data(),
        forward=lambda net, x: net(x)[0],
        split={"0.*": "gates"},
        structures=["LowRank"],
    )
    assert result.plan.layers["0.ih_l0"] == sm.LowRank(3)
    assert result.plan.layers["0.hh_l0"] == sm.Dense()


def test_states_and_inputs_get_sizes_of_their_own() -> None:
    """A state matrix of rank 2 beside an input matrix of full rank: no size is shared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.GRU(WIDTH, 12, batch_first=True)).eval()
    with torch.no_grad():
        model[0].weight_hh_l0.copy_(low_rank(36, 2, 0, 12))
    few: dict[str, Any] = {"calibration": data(), "forward": lambda net, x: net(x)[0], "structures": ["LowRank"]}
    result = sm.compress(model, budget=sm.Parameters(36 * WIDTH + 2 * (36 + 12)), **few)
    assert result.plan.layers == {"0.ih_l0": sm.Dense(), "0.hh_l0": sm.LowRank(2)}
    overridden = sm.compress(
        model, budget=sm.Parameters(0.9), overrides={"0.hh_l0": sm.LowRank(3)}, split={"0.*": "gates"}, **few
    )
    assert overridden.plan.layers["0.hh_l0"] == sm.LowRank(3), "what is fixed is not split"


def test_matrices_of_one_gate_are_left_whole() -> None:
    model = nn.Sequential(nn.LSTM(WIDTH, 12, proj_size=4, batch_first=True))
    sites = {site.name: site.parts for site in scan(model, split={"0.*": "gates"}).sites}
    assert sites["0.hr_l0"] is None
    assert sites["0.hh_l0"] is not None
    assert sites["0.hh_l0"].rows == (12,) * 4


# --------------------------------------------------------------------------------------------------- combinations


def layer(seed: int, count: int) -> LayerScreen:
    """Of random candidates."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, 2, generator=generator, dtype=torch.float64).tolist()
    made = [Candidate(sm.Dense(), 0, 0, 0.0, 0.0, "none", "", loss, cost) for cost, loss in numbers]
    return LayerScreen(str(seed), (1, 1), "weights", tuple(sorted(made, key=lambda c: (c.cost, c.loss))), {})


@pytest.mark.parametrize("seed", range(5))
def test_combinations_are_the_best_at_every_price(seed: int) -> None:
    parts = [layer(10 * seed + i, 6) for i in range(3)]
    everything = [
        (sum(c.cost for c in chosen), sum(c.loss for c in chosen))
        for chosen in itertools.product(*(part.candidates for part in parts))
    ]
    found = [(sum(c.cost for c in f), sum(c.loss for c in f)) for f in combinations(parts, 100)]
    for price in (0.0, 0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 1e6):
        best = min(loss + price * cost for cost, loss in everything)
        assert min(loss + price * cost for cost, loss in found) == pytest.approx(best)
    assert len(combinations(parts, 4)) == min(4, len(found))
    assert combinations(parts, 4)[0] == combinations(parts, 100)[0]
    for limit in (0.2, 0.6, 1.0, 1.7, 3.0):
        chosen = within(parts, limit)
        allowed = [(cost, loss) for cost, loss in everything if cost <= limit]
        assert (chosen is None) == (not allowed)
        if chosen is not None:
            assert sum(c.cost for c in chosen) <= limit
            vertices = [loss for cost, loss in found if cost <= limit]
            assert sum(c.loss for c in chosen) <= min(vertices) + 1e-12


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ({"*.qkv": 5}, "blocks.0.qkv has 48 outputs, which are not 5 equal parts of two or more. Give a divisor of 48"),
        ({"*.qkv": 1}, "which are not 1 equal parts"),
        ({"*.qkv": [16, 16]}, r"2 parts of \[16, 16\] are 32. Give two or more parts that are 48 in all"),
        ({"*.qkv": {"rows": 3, "groups": 5}}, "48 outputs, which are not 5 equal groups. Give a divisor of 48"),
        ({"*.qkv": {"rows": [4, 4], "groups": 4}}, "48 outputs, 12 in each of 4 groups; 2 parts"),
        ({"*.qkv": {"row": 3}}, "Give 'rows', and 'groups' if they repeat"),
        ({"*.qkv": "heads"}, "was asked to be split by 'heads'. Give a number of equal parts"),
        ({"*.qkv": 1.5}, "was asked to be split by 1.5"),
        ({"*.qkv": "gates"}, "blocks.0.qkv has no gates"),
        ({"*.kqv": 3}, r"The pattern '\*.kqv' in split matches none of the 5 layers"),
    ],
)
def test_splits_that_are_none_are_refused_by_name(split: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        scan(net(), split=split)


def test_layers_of_other_kinds_are_not_split() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 4))
    with pytest.raises(ModelError, match="0 is a Conv2d and can't be split"):
        scan(model, split={"*": 2})


def test_later_patterns_win_and_folders_know_the_split(tmp_path: Path) -> None:
    sites = {site.name: site.parts for site in scan(net(), split={"*.qkv": 3, "blocks.1.*": 2}).sites}
    assert [parts and len(parts.rows) for parts in sites.values()] == [3, None, 2, 2, None]
    few: dict[str, Any] = {"budget": sm.Parameters(0.5), "structures": ["LowRank"], "folder": tmp_path}
    whole = sm.compress(net(), **few)
    apart = sm.compress(net(), split={"*.qkv": 3}, **few)
    assert whole.plan != apart.plan
    again = sm.compress(net(), split={"*.qkv": 3}, **few)
    assert dataclasses.replace(again.plan) == apart.plan
