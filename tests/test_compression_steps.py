"""Screening, scoring, plans and replacement, each alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from compression_models import Encoder, gpt2, labelled, llama, mlp, tokens
from torch import nn

import structmat as sm
from structmat.compression.calibrate import calibrate
from structmat.compression.candidates import EXPECTED, Candidate, LayerScreen, layer_from_json, layer_to_json
from structmat.compression.norms import damped, layer_targets
from structmat.compression.plan import Plan
from structmat.compression.replace import replace_layers, to_dense
from structmat.compression.scan import scan
from structmat.compression.score import SHARES, Correction, points, score
from structmat.compression.screen import layer_worker, screen
from structmat.compression.workfolder import WorkFolder, digest
from structmat.errors import DataError, FormatError, ModelError, ShapeError, StructureError
from structmat.files import write_atomically
from structmat.projection.project import project_target

RANKED = ("LowRank", sm.BlockDiagonal, sm.PivotedLowRank)


# --------------------------------------------------------------------------------------------------------- screen


def test_errors_of_candidates_are_those_of_projection() -> None:
    model, data = mlp(), labelled()
    sites = scan(model).sites
    seen = calibrate(model, sites, data)
    found = screen(model, sites, sm.Parameters(0.5), calibration=seen, structures=RANKED)
    for number, site in enumerate(sites):
        moments = seen.moments[site.name]
        assert moments.gradient_moment is not None
        inputs, outputs = damped(moments.second_moment, 1e-3), damped(moments.gradient_moment, 0.1)
        weight = model[2 * number].weight
        assert found[site.name].norm == "inputs and outputs"
        for candidate in found[site.name].candidates:
            if candidate.method.endswith(EXPECTED):
                continue
            quick, better = (
                sm.project(weight, candidate.structure, second_moment=inputs, output_moment=outputs, sweeps=n)
                for n in (0, 1)
            )
            was_improved = abs(candidate.error - better.error) <= 1e-3 * better.error + 1e-5
            exact = better if was_improved else quick
            assert candidate.error == pytest.approx(exact.error, rel=1e-3, abs=1e-5)
            assert candidate.lower_bound <= candidate.error * (1 + 1e-9)
            change = (weight.detach() - exact.matrix.to_dense()).double()
            form = torch.trace(moments.gradient_moment @ change @ inputs @ change.T)
            assert candidate.loss == pytest.approx(0.5 * float(form), rel=1e-2, abs=1e-9)


def test_expected_losses_are_near_those_of_fits_with_sweeps() -> None:
    model, data = mlp(), labelled()
    sites = scan(model).sites
    seen = calibrate(model, sites, data)
    found = screen(
        model, sites, sm.Parameters(0.5), calibration=seen, structures=("PivotedLowRank", "Monarch", "BLAST")
    )
    ratios = []
    for site in sites:
        for candidate in found[site.name].candidates:
            if candidate.method.endswith(EXPECTED):
                worker = layer_worker(model, site, sm.Parameters(0.5), seen, sweeps=1, seed=0)
                ratios.append(candidate.loss / worker.fitted(candidate, swept=True).loss)
    assert ratios
    assert max(ratios) < 1.5
    assert min(ratios) > 1 / 1.5


def test_what_calibration_did_not_show_is_not_free() -> None:
    """The inputs lie in 6 of 32 dimensions; a product of two factors could do anything in the others."""
    model = mlp()
    generator = torch.Generator().manual_seed(0)
    seen_inputs = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    data = [torch.randn(64, 6, generator=generator) @ seen_inputs[:6] for _ in range(4)]
    site = scan(model).sites[0]
    moments = calibrate(model, (site,), data).moments["0"]
    weight, structure = model[0].weight.detach().double(), sm.Product(sm.Dense(), sm.BlockDiagonal(4), 8)
    free = sm.project(weight, structure, second_moment=moments.second_moment)
    (target,) = layer_targets(site, model[0].weight.unsqueeze(0), moments, sweeps=20, seed=0)
    kept = project_target(target, structure, dtype=torch.float64, device=torch.device("cpu"))
    unseen = seen_inputs[6:].double()
    lost, still_lost = (
        float(torch.linalg.norm((weight - found.matrix.to_dense()) @ unseen.T)) for found in (free, kept)
    )
    assert still_lost < 0.8 * lost


def test_predicted_losses_are_second_order_effects() -> None:
    """A small change of the last layer changes the divergence as predicted, up to the factoring of the two moments."""
    from structmat.compression.effects import Probe

    model, data = mlp(), labelled(count=8, size=64)
    sites = scan(model).sites
    seen = calibrate(model, sites, data)
    found = screen(model, sites, sm.Parameters(0.5), calibration=seen, structures=(sm.LowRank(5), sm.LowRank(7)))
    probe, moments = Probe(model, data, None, None), seen.moments["4"]
    assert moments.gradient_moment is not None
    inputs, outputs = damped(moments.second_moment, 1e-3), damped(moments.gradient_moment, 0.1)
    for candidate in found["4"].candidates:
        fitted = sm.project(model[4].weight, candidate.structure, second_moment=inputs, output_moment=outputs)
        assert probe.effect(model[4], fitted.matrix.to_dense().unsqueeze(0)) == pytest.approx(
            candidate.loss, rel=0.1, abs=1e-6
        )


@pytest.mark.parametrize("calibrated", [False, True])
def test_exact_candidates_are_not_ranked_by_their_rounding(calibrated: bool) -> None:
    model = nn.Sequential(nn.Linear(96, 80))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(80, 6, generator=generator) @ torch.randn(6, 96, generator=generator))
    data = [torch.randn(128, 96, generator=generator) for _ in range(3)] if calibrated else None
    result = sm.compress(model, budget=sm.Parameters(0.4), calibration=data)
    (layer,) = result.report.layers
    assert layer.error < 1e-5
    assert layer.parameters <= 8 * (80 + 96)  # rank 6, on the grid of sizes


def test_keep_is_always_there_and_nothing_dearer_than_dense() -> None:
    model = mlp()
    for budget in (sm.Parameters(0.5), sm.Flops(0.5)):
        found = screen(model, scan(model).sites, budget, structures=("LowRank", sm.LowRank(9)))
        for layer in found.values():
            assert layer.keep.loss == 0.0
            assert all(c.cost < layer.keep.cost for c in layer.candidates if c is not layer.keep)
        assert found["4"].refused == {f"not cheaper than the dense layer in {budget.unit}": 1}


def test_families_far_behind_are_not_tried_at_all_sizes() -> None:
    model = mlp()  # no block of these weights is better than another: block diagonals are hopeless
    found = screen(model, scan(model).sites, sm.Parameters(0.5), structures=RANKED)
    assert found["0"].refused["behind the best at 50% of the parameters: BlockDiagonal"] == 1
    blocks = {c.structure for c in found["2"].candidates if isinstance(c.structure, sm.BlockDiagonal)}
    ranks = {c.structure for c in found["2"].candidates if isinstance(c.structure, sm.PivotedLowRank)}
    assert len(blocks) < 6 < len(ranks)


def test_unknown_families_are_refused_by_name() -> None:
    model = mlp()
    with pytest.raises(StructureError, match="Unknown family 'Lowrank'"):
        screen(model, scan(model).sites, sm.Parameters(0.5), structures=("Lowrank",))


def test_a_structure_that_does_not_fit_is_counted() -> None:
    model = mlp()
    found = screen(model, scan(model).sites, sm.Parameters(0.5), structures=(sm.LowRank(30),))
    assert found["4"].refused == {"refuses the shape: LowRank": 1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named_by_layer(bad: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, :3] = bad
    with pytest.raises(DataError, match="weight of 2 has 3 entries that are NaN or infinite"):
        screen(model, scan(model).sites, sm.Parameters(0.5))


def test_layers_resume_from_disk_one_by_one(tmp_path: Path) -> None:
    model = mlp()
    sites = scan(model).sites
    folder = WorkFolder(tmp_path)
    whole = screen(model, sites, sm.Parameters(0.5), structures=RANKED, folder=folder, key="k")
    (piece,) = (tmp_path / "screen").glob("0001-*.safetensors")
    piece.unlink()
    with torch.no_grad():
        model[0].weight.zero_()  # would change the result if the layer were screened again
    again = screen(model, sites, sm.Parameters(0.5), structures=RANKED, folder=folder, key="k")
    assert again == whole
    other = screen(model, sites, sm.Parameters(0.5), structures=RANKED, folder=folder, key="other")
    assert other["0"] != whole["0"]


def test_screens_travel_as_json() -> None:
    model = mlp()
    layer = screen(model, scan(model).sites, sm.Parameters(0.5), structures=RANKED)["2"]
    assert layer_from_json(json.loads(json.dumps(layer_to_json(layer)))) == layer
    with pytest.raises(FormatError):
        layer_from_json({"name": "2"})


def test_dead_inputs_cost_nothing() -> None:
    """A singular second moment: what acts on inputs that never occur costs little, and rank 4 holds 4 directions."""
    model = mlp(sizes=(32, 24, 10))
    mix = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    mix[:, 16:] = 0.0
    data = [torch.randn(64, 4, generator=torch.Generator().manual_seed(i)) @ mix for i in range(4)]
    sites = scan(model).sites
    seen = calibrate(model, sites, data)
    found = screen(model, sites, sm.Parameters(0.5), calibration=seen, structures=(sm.LowRank(4), sm.LowRank(3)))
    errors = {str(c.structure): c.error for c in found["0"].candidates}
    assert errors["LowRank(rank=4)"] < 0.03 < 0.1 < errors["LowRank(rank=3)"]
    assert errors["LowRank(rank=3)"] > 1e-3
    result = sm.compress(model, budget=sm.Parameters(0.6), calibration=data, structures=("LowRank",))
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    torch.testing.assert_close(result.model(data[0]), model(data[0]), rtol=0.1, atol=0.2)


# ---------------------------------------------------------------------------------------------------------- score


def test_corrections_are_monotone_and_pass_through_their_points() -> None:
    curve = Correction([(1e-4, 2e-4), (1e-2, 5e-2), (1e-3, 3e-3)])
    assert curve(0.0) == 0.0
    for x, y in ((1e-4, 2e-4), (1e-3, 3e-3), (1e-2, 5e-2)):
        assert curve(x) == pytest.approx(y)
    assert curve(1e-6) == pytest.approx(2e-6)
    assert curve(1e-1) > 5e-1
    xs = [10.0 ** (-8 + i / 7) for i in range(60)]
    assert [curve(x) for x in xs] == sorted(curve(x) for x in xs)
    disorder = Correction([(1e-4, 1e-2), (1e-3, 1e-3), (1e-2, 2e-2)])
    assert [disorder(x) for x in xs] == sorted(disorder(x) for x in xs)
    assert Correction([])(0.3) == 0.3
    assert math.isfinite(Correction([(1e-9, 1e-9), (1e-8, 1e2)])(1e300))


def test_scores_are_measured_and_the_weights_come_back() -> None:
    model, data = mlp(), labelled()
    sites = scan(model).sites
    seen = calibrate(model, sites, data)
    screening = screen(model, sites, sm.Parameters(0.5), calibration=seen, structures=RANKED)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    corrected, measured = score(model, sites, screening, seen, data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for site in sites:
        known = {m.structure: m for m in measured[site.name]}
        assert 2 <= len(known) <= 4
        assert [m.structure for m in measured[site.name]] == [c.structure for c in points(screening[site.name])]
        for old, new in zip(screening[site.name].candidates, corrected[site.name].candidates, strict=True):
            assert (old.structure, old.cost, old.error) == (new.structure, new.cost, new.error)
            if new.structure in known:
                assert new.loss >= known[new.structure].measured * (1 - 1e-9)
    # what is measured is the divergence of the changed model's distribution from the original's
    name, chosen = "2", measured["2"][0]
    moments = seen.moments[name]
    assert moments.gradient_moment is not None
    inputs, outputs = damped(moments.second_moment, 1e-3), damped(moments.gradient_moment, 0.1)
    changed = mlp()
    found = sm.project(changed[2].weight, chosen.structure, second_moment=inputs, output_moment=outputs, sweeps=1)
    with torch.no_grad():
        changed[2].weight.copy_(found.matrix.to_dense())
        x = torch.cat([x for x, _ in data])
        p, q = torch.log_softmax(model(x), -1), torch.log_softmax(changed(x), -1)
    assert chosen.measured == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)


def test_what_reads_few_directions_is_measured_at_small_shares_too() -> None:
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


# ----------------------------------------------------------------------------------------------------------- plan


def plan_for(model: nn.Module, **layers: sm.Structure) -> Plan:
    shapes = {s.name: s.shape for s in scan(model).sites}
    return Plan({n: layers.get(f"l{n}", sm.Dense()) for n in shapes}, shapes, sm.Parameters(0.5), 3)


def test_plans_are_json_that_people_can_edit(tmp_path: Path) -> None:
    plan = plan_for(mlp(), l0=sm.LowRank(5), l2=sm.LowRank(0.25))
    assert plan.layers["2"] == sm.LowRank(5)  # resolved: 0.25 * 48 * 40 / 88
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    data["layers"]["4"]["structure"] = {"family": "BlockDiagonal", "blocks": 2}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert Plan.read(tmp_path / "plan.json").layers["4"] == sm.BlockDiagonal(2)
    assert not list(tmp_path.glob(".*"))


def test_bad_plans_are_refused(tmp_path: Path) -> None:
    good = plan_for(mlp(), l0=sm.LowRank(5)).to_json()
    for change, message in (
        ({"structmat_plan": 99}, "version 99"),
        ({"layers": None}, "missing"),
        ({"layers": {"0": {"structure": {"family": "Dense"}}}}, "'shape' and a 'structure'"),
        ({"layers": {"0": {"shape": 3, "structure": {"family": "Dense"}}}}, "is a list"),
        ({"layers": {"0": {"shape": [4, 4], "structure": {"family": "Low"}}}}, "Unknown family 'Low'"),
        ({"budget": {"budget": "Money", "amount": 1}}, "'budget' is one of"),
        ({"budget": {"budget": "Parameters", "amount": 7.5}}, "no valid budget"),
        ({"seed": "x"}, "seed"),
    ):
        with pytest.raises(FormatError, match=message):
            Plan.from_json({**good, **change})
    with pytest.raises(ShapeError):
        Plan.from_json({**good, "layers": {"0": {"shape": [4, 4], "structure": {"family": "LowRank", "rank": 9}}}})
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        Plan.read(tmp_path / "plan.json")


# -------------------------------------------------------------------------------------------------------- replace


def test_everything_but_the_weight_stays() -> None:
    model = mlp().to(torch.bfloat16).train()
    model[0].weight.requires_grad_(False)
    bias = model[0].bias.clone()
    (done,) = replace_layers(model, plan_for(model, l0=sm.LowRank(5)))
    layer = model[0]
    assert isinstance(layer, sm.nn.StructuredLinear)
    assert layer.training
    assert torch.equal(layer.bias, bias)
    assert {n: (p.dtype, p.requires_grad) for n, p in layer.named_parameters()} == {
        "left": (torch.bfloat16, False),
        "right": (torch.bfloat16, False),
        "bias": (torch.bfloat16, True),
    }
    assert (done.name, done.structure, done.certificate, done.norm) == ("0", sm.LowRank(5), "optimal", "weights")
    assert model(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert isinstance(model[2], nn.Linear)


def test_a_plan_for_another_architecture_is_refused() -> None:
    plan = plan_for(mlp(), l0=sm.LowRank(5))
    with pytest.raises(ModelError, match=r"0 has shape \(16, 32\) in the model and \(48, 32\) in the plan"):
        replace_layers(mlp(sizes=(32, 16, 10)), plan)
    with pytest.raises(ModelError, match="which Encoder does not have"):
        replace_layers(Encoder(), plan)
    with pytest.raises(ModelError, match="is a Identity"):
        replace_layers(nn.Sequential(nn.Identity()), plan)


def test_conv1d_keeps_its_meaning() -> None:
    model, batch = gpt2(), tokens()[0]
    expected = model(**batch).logits
    site = next(s for s in scan(model).sites if s.name.endswith("c_attn"))
    full = Plan({site.name: sm.LowRank(32)}, {site.name: site.shape})
    replace_layers(model, full)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_layers_of_an_encoder_that_are_asked_for_work(train: bool) -> None:
    torch.manual_seed(0)
    model = Encoder().train(train)
    x = torch.randn(3, 5, 8)
    expected = model(x)
    result = sm.compress(
        model,
        budget=sm.Parameters(0.95),
        calibration=[x],
        include=("*", "block.linear1", "block.linear2"),
        overrides={"block.linear1": sm.LowRank(20)},
        structures=("LowRank",),
    )
    assert isinstance(result.model.block.linear1, sm.nn.StructuredLinear)
    torch.testing.assert_close(result.model(x), expected, rtol=0.2, atol=0.2)
    stack = nn.TransformerEncoder(result.model.block, 2, enable_nested_tensor=False).eval()
    assert stack(torch.randn(3, 5, 32)).shape == (3, 5, 32)


def test_a_stack_of_encoder_layers_with_padding_works_when_asked() -> None:
    torch.manual_seed(0)
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 5, 32), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    result = sm.compress(
        stack,
        budget=sm.Parameters(0.5),
        include=("layers.0.linear1", "layers.1.linear1"),
        structures=("LowRank",),
    )
    with torch.no_grad():
        assert torch.isfinite(result.model(x, src_key_padding_mask=mask)).all()


def test_back_to_dense() -> None:
    model = llama()
    result = sm.compress(model, budget=sm.Parameters(0.5), structures=("LowRank", "PivotedLowRank"))
    dense = to_dense(result.model)
    assert not any(isinstance(m, sm.nn.StructuredLinear) for m in dense.modules())
    assert any(isinstance(m, sm.nn.StructuredLinear) for m in result.model.modules())
    batch = tokens()[0]
    torch.testing.assert_close(dense(**batch).logits, result.model(**batch).logits, rtol=1e-3, atol=1e-4)
    assert [tuple(p.shape) for p in dense.parameters()] == [tuple(p.shape) for p in model.parameters()]
    alone = sm.nn.StructuredLinear(8, 12, structure=sm.LowRank(3))
    assert isinstance(to_dense(alone), nn.Linear)


def test_a_frozen_model_computes_the_same() -> None:
    model = llama()
    result = sm.compress(
        model, budget=sm.Parameters(0.5), structures=("PivotedLowRank",), overrides={"*.q_proj": sm.Sparse(0.3)}
    )
    layers = {name: m for name, m in result.model.named_modules() if isinstance(m, sm.nn.StructuredLinear)}
    assert {type(m.structure) for m in layers.values()} == {sm.PivotedLowRank, sm.Sparse}
    with sm.backend("reference"):
        frozen = sm.freeze(result.model.train())
    assert not frozen.training
    assert result.model.training
    for name, layer in layers.items():
        module = frozen.get_submodule(name)
        assert list(module.parameters()) == []
        assert not any(b.dtype == torch.int64 for b in module.buffers())  # nothing is left to put together
        assert result.model.get_submodule(name) is layer
    batch = tokens()[0]
    wanted = result.model.eval()(**batch).logits
    for other in (frozen, sm.freeze(result.model), sm.freeze(result.model, rows=1)):
        torch.testing.assert_close(other(**batch).logits, wanted, rtol=1e-3, atol=1e-4)
    shared = sm.nn.StructuredLinear(8, 8, structure=sm.LowRank(3))
    twice = sm.freeze(nn.Sequential(shared, nn.ReLU(), shared))
    assert twice[0] is twice[2]


def test_a_fit_behind_compressed_layers_aims_at_the_outputs_of_before() -> None:
    model, data = mlp(), labelled()
    original = copy.deepcopy(model)
    seen = calibrate(model, scan(model).sites, data)
    plan = plan_for(model, l0=sm.LowRank(2), l2=sm.LowRank(4), l4=sm.LowRank(3))
    replace_layers(model, plan, calibration=seen, original=original, loader=data)
    x = torch.cat([model[:2](inputs) for inputs, _ in data]).double()
    z = torch.cat([original[:2](inputs) for inputs, _ in data]).double()
    wanted = z @ original[2].weight.double().T
    second = x.T @ x / len(x)
    regular = second + 1e-3 * second.diagonal().mean() * torch.eye(x.shape[1])
    weight = original[2].weight.double()
    weight = weight + weight @ (z.T @ x / len(x) - second) @ regular.inverse()
    outputs = seen.moments["2"].gradient_moment
    assert outputs is not None
    expected = sm.project(
        weight,
        sm.LowRank(4),
        second_moment=regular,
        output_moment=damped(outputs, 0.1),
    )
    fitted = model[2].matrix.to_dense().double()
    torch.testing.assert_close(fitted, expected.matrix.to_dense(), rtol=1e-4, atol=1e-5)
    # The corrected dense weight is nearer to the old outputs than the old weight is.
    old = original[2].weight.double()
    assert torch.linalg.norm(x @ weight.T - wanted) < 0.95 * torch.linalg.norm(x @ old.T - wanted)


# ---------------------------------------------------------------------------------------------------- work folder


def test_pieces_of_work_are_whole_or_absent(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "work")
    folder.store("a/b", "key", {"x": 1}, {"t": torch.arange(3)})
    data, tensors = folder.load("a/b", "key") or ({}, {})
    assert data == {"x": 1}
    assert tensors["t"].tolist() == [0, 1, 2]
    assert folder.load("a/b", "other key") is None
    assert folder.load("c", "key") is None
    file = tmp_path / "work" / "a" / "b.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(FormatError, match="damaged"):
        folder.load("a/b", "key")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "whole", fail)
    assert {p.name for p in tmp_path.iterdir()} == {"work"}
    assert WorkFolder(None).load("a", "k") is None
    assert digest(1, "a") == digest(1, "a") != digest(1, "b")
