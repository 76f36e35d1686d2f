"""The whole way: budgets kept, failures clear, interrupted work resumed."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compression_models import Encoder, labelled, llama, mlp, tokens
from torch import Tensor, nn

import structmat as sm
from structmat.compression.plan import Plan
from structmat.compression.replace import replace_layers
from structmat.errors import BudgetError, DataError, ModelError, StructureError
from structmat.io import size_on_disk
from structmat.structure import count_stored

CLOSED = ("LowRank", "PivotedLowRank", "BlockDiagonal")


def compressed(**options: Any) -> sm.Result[Any]:
    given: dict[str, Any] = {"budget": sm.Parameters(0.4), "calibration": labelled(), "structures": CLOSED, **options}
    return sm.compress(given.pop("model", None) or mlp(), **given)


def stored(model: nn.Module) -> int:
    """Stored numbers of the weights, counted from the tensors themselves."""
    total = 0
    for module in model.modules():
        if isinstance(module, sm.nn.StructuredLinear):
            total += sum(t.numel() for n, t in module.state_dict().items() if n != "bias")
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
    return total


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_budget_is_kept_and_used(share: float) -> None:
    result = compressed(
        budget=sm.Parameters(share), model=mlp(sizes=(96, 128, 96, 64)), calibration=labelled(features=96, classes=64)
    )
    dense = 96 * 128 + 128 * 96 + 96 * 64
    spent = stored(result.model)
    assert spent == result.report.parameters.after == result.report.budget["spent"]
    assert 0.98 * share * dense <= spent <= share * dense
    assert result.report.parameters.before == dense
    assert result.report.model_parameters.before - result.report.model_parameters.after == dense - spent


@pytest.mark.parametrize("place", [True, False])
def test_one_copy_of_the_model_is_made(place: bool) -> None:
    copies = []

    class Counted(nn.Sequential):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            copies.append(self)
            return Counted(*(copy.deepcopy(m, memo) for m in self))

    model = Counted(*mlp())
    run = sm.compress_ if place else sm.compress
    options: dict[str, Any] = {"calibration": labelled(), "structures": CLOSED, "recover": sm.Distill(steps=3)}
    result = run(model, budget=sm.Parameters(0.4), **options)
    assert len(copies) == 1
    assert (result.model is model) == place
    with pytest.raises(ModelError, match="in place"):
        sm.compress_(model, budget=sm.Parameters(0.4), original=model)


def test_the_given_model_is_not_modified_and_compress__works_in_place() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    result = compressed(model=model)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    place = sm.compress_(model, budget=sm.Parameters(0.4), calibration=labelled(), structures=CLOSED)
    assert place.model is model
    for one, other in zip(model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_equal_seeds_give_equal_results_and_plans_apply_again() -> None:
    first, second = compressed(seed=5), compressed(seed=5)
    assert first.plan == second.plan
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    from structmat.compression.calibrate import calibrate
    from structmat.compression.scan import scan

    model = mlp()
    again = Plan.from_json(json.loads(json.dumps(first.plan.to_json())))
    seen = calibrate(model, scan(model).sites, labelled(), seed=5)
    replace_layers(model, again, calibration=seen, original=mlp(), loader=labelled(), seed=5)
    for one, other in zip(first.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_result_is_close_and_closer_with_calibration() -> None:
    data, model = labelled(), mlp()
    x = torch.cat([x for x, _ in data])

    def divergence(result: sm.Result[Any]) -> float:
        with torch.no_grad():
            p, q = torch.log_softmax(model(x), -1), torch.log_softmax(result.model(x), -1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    known = divergence(compressed())
    blind = divergence(compressed(calibration=None))
    assert known < 0.5 * blind
    assert known < 0.02


def test_without_data_errors_are_those_of_the_weights() -> None:
    result = compressed(calibration=None)
    assert result.report.calibration is None
    assert {layer.norm for layer in result.report.layers} == {"weights"}
    for layer, module in zip(result.report.layers, (result.model[0], result.model[2], result.model[4]), strict=True):
        original = mlp().get_submodule(layer.name).weight
        found = module.matrix.to_dense() if isinstance(module, sm.nn.StructuredLinear) else module.weight
        assert layer.error == pytest.approx(((original - found).norm() / original.norm()).item(), rel=1e-4, abs=1e-6)


def test_operations_and_time_are_budgets_too() -> None:
    result = compressed(budget=sm.Flops(0.5))
    assert result.report.budget["unit"] == "FLOPs"
    assert result.report.budget["spent"] <= 0.5 * result.report.budget["dense"]
    assert result.report.flops.after == pytest.approx(result.report.budget["spent"])
    wide = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    timed = sm.compress(wide, budget=sm.Latency(0.8, batch=256), structures=(sm.LowRank(16),))
    assert timed.report.budget["spent"] <= 0.8 * timed.report.budget["dense"]
    assert timed.plan.changed
    with pytest.raises(BudgetError, match="microseconds can't be met"):
        compressed(budget=sm.Latency(1))


@pytest.mark.parametrize("structures", [(sm.LowRank(4),), (sm.LowRank(4), "BlockDiagonal")])
def test_what_is_given_as_a_single_structure_stays_it(structures: tuple[Any, ...]) -> None:
    result = compressed(budget=sm.Parameters(0.9), structures=structures)
    ranks = {s.rank for s in result.plan.layers.values() if isinstance(s, sm.LowRank)}
    assert ranks <= {4}


def test_overrides_are_obeyed_and_paid_for() -> None:
    result = compressed(
        overrides={"*": sm.LowRank(rank=3), "2": sm.Dense(), "4": sm.LowRank(rank=0.5)}, budget=sm.Parameters(0.7)
    )
    assert result.plan.layers == {"0": sm.LowRank(3), "2": sm.Dense(), "4": sm.LowRank(4)}
    assert {layer.reason for layer in result.report.layers} == {"by override"}
    with pytest.raises(BudgetError, match="can't be met"):
        compressed(overrides={"2": sm.Dense()}, budget=sm.Parameters(0.4))
    with pytest.raises(ModelError, match="matches none"):
        compressed(overrides={"encoder.*": sm.LowRank(3)})
    with pytest.raises(StructureError, match="is a structure such as"):
        compressed(overrides={"2": "LowRank"})


def test_an_override_asks_for_a_kept_layer() -> None:
    model = llama(tie_word_embeddings=False)
    result = sm.compress(
        model, budget=sm.Parameters(0.5), calibration=tokens(), overrides={"lm_head": sm.LowRank(4)}, structures=CLOSED
    )
    assert result.model.lm_head.structure == sm.LowRank(4)


def test_a_language_model_with_a_tied_embedding() -> None:
    result = sm.compress(llama(), budget=sm.Parameters(0.5), calibration=tokens(), structures=CLOSED)
    model = result.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(**tokens()[0]).logits.shape == (4, 12, 24)
    assert {s["name"] for s in result.report.skipped} == {"lm_head", "model.embed_tokens"}
    assert result.report.calibration["kind"] == "labels sampled from the model"
    assert result.report.flops.before == 12 * sum(layer.dense_flops for layer in result.report.layers)


def test_bfloat16_stays() -> None:
    model = mlp().to(torch.bfloat16)
    result = compressed(model=model, calibration=[(x.bfloat16(), y) for x, y in labelled()])
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    x = labelled()[0][0].bfloat16()
    torch.testing.assert_close(result.model(x), model(x), rtol=0.1, atol=0.3)


def test_an_encoder_layer_is_compressed_part_by_part() -> None:
    model = Encoder().eval()
    x = torch.randn(3, 5, 8)
    result = sm.compress(model, budget=sm.Parameters(0.6), calibration=[x], structures=CLOSED)
    assert type(result.model.block) is nn.TransformerEncoderLayer
    assert {f"block.self_attn.{n}" for n in ("query", "key", "value", "output")} <= set(result.plan.layers)
    with torch.no_grad():  # the fast path of evaluation, if it were taken
        assert result.model(x).shape == (3, 4)


def test_a_user_s_forward_and_loss() -> None:
    data = [{"x": x, "y": y} for x, y in labelled()]
    result = compressed(
        calibration=data,
        forward=lambda model, batch: model(batch["x"]),
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch["y"]),
    )
    assert result.report.calibration["kind"] == "given loss"


def test_the_report_has_every_figure(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> dict[str, Any]:
        x, y = labelled()[0]
        with torch.no_grad():
            return {"accuracy": (model(x).argmax(-1) == y).float().mean(), "size": stored(model)}

    result = compressed(evaluate=evaluate, folder=tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == json.loads(json.dumps(result.report.to_json()))
    assert data["structmat_report"] == 1
    assert data["quality"]["before"]["size"] == 48 * 32 + 40 * 48 + 10 * 40
    assert data["quality"]["after"]["size"] == data["budget"]["spent"]
    assert Plan.read(tmp_path / "plan.json") == result.plan
    for layer in data["layers"]:
        assert layer["candidates"][-1]["structure"] == {"family": "Dense"}
        assert all(m["measured"] > 0 for m in layer["measured"])
        assert layer["dense_microseconds"] > 0
        assert layer["slower"] == (layer["microseconds"] > layer["dense_microseconds"])
    assert [t["batch"] for t in data["timings"]] == [1, 8, 32]
    assert all(t["model_after"] > 0 and t["model_ratio"] > 0 for t in data["timings"])
    for moment, model in (("before", mlp()), ("after", result.model)):
        on_disk = size_on_disk(sm.save(model, tmp_path / moment))
        assert 0 <= on_disk - data["model_bytes"][moment] < 5000  # names and structures
    assert {"scan", "calibrate", "screen", "score", "allocate", "replace"} <= set(data["seconds"])
    assert {"torch", "processor", "threads"} <= set(data["environment"])


# ------------------------------------------------------------------------------------------------------- failures


def test_a_budget_that_can_not_be_met_names_the_smallest() -> None:
    with pytest.raises(BudgetError, match=r"can't be met.*Use Parameters\((0\.\d+)\)") as failure:
        compressed(budget=sm.Parameters(0.001))
    share = float(str(failure.value).split("Parameters(")[1].split(")")[0])
    assert compressed(budget=sm.Parameters(share)).report.budget["spent"] > 0
    with pytest.raises(BudgetError, match="A budget is"):
        compressed(budget=0.4)


def test_empty_and_spent_calibration_data() -> None:
    with pytest.raises(DataError, match="not one batch"):
        compressed(calibration=[])
    with pytest.raises(DataError, match="read only once"):
        compressed(calibration=iter(labelled()))


def test_bad_weights_and_activations() -> None:
    model = mlp()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    for calibration in (labelled(), None):
        with pytest.raises(DataError, match="weight of 4 has 1 entries"):
            compressed(model=model, calibration=calibration)
    model = mlp()
    with torch.no_grad():
        model[4].bias[0] = float("nan")
    with pytest.raises(DataError, match="logits are NaN or infinite"):
        compressed(model=model)
    data = labelled()
    data[1][0][3, 3] = float("inf")
    with pytest.raises(DataError, match="inputs of 0 are NaN or infinite"):
        compressed(calibration=data)


def test_models_without_known_layers_or_values() -> None:
    with pytest.raises(ModelError, match="no layer that can be compressed"):
        compressed(model=nn.Sequential(nn.Conv3d(8, 8, 3)), calibration=None)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ModelError, match="meta device"):
        compressed(model=empty, calibration=None)


def test_a_layer_that_is_never_called_is_kept_with_the_reason() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    result = compressed(model=Unused(), calibration=[x for x, _ in labelled()])
    (skipped,) = result.report.skipped
    assert (skipped["name"], skipped["reason"]) == ("unused", "never called on calibration data")
    assert result.report.parameters.before == 32 * 32


def test_an_evaluation_that_is_no_number_is_an_error() -> None:
    with pytest.raises(DataError, match="returns a number"):
        compressed(evaluate=lambda _: "good")


# --------------------------------------------------------------------------------------------------- interruptions

KILLED = """
import os, signal, sys
import torch
from compression_models import labelled, mlp
import structmat as sm
from structmat.compression.workfolder import WorkFolder

torch.set_num_threads(int(sys.argv[1]))
store, left = WorkFolder.store, int(sys.argv[2])

def counted(self, *arguments, **options):
    global left
    store(self, *arguments, **options)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

WorkFolder.store = counted
structures = ("LowRank", "PivotedLowRank", "BlockDiagonal")
sm.compress(mlp(), budget=sm.Parameters(0.4), calibration=labelled(), structures=structures, folder=sys.argv[3])
"""


def test_a_killed_run_goes_on_with_the_same_result(tmp_path: Path) -> None:
    here, work = Path(__file__).parent, tmp_path / "work"
    path = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(torch.get_num_threads()), "6", str(work)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = {p: p.stat().st_mtime_ns for p in work.rglob("*.safetensors")}
    # calibration, three screens, and two of three scores
    assert sorted(str(p.relative_to(work).parent) for p in done) == [".", "score", "score", *["screen"] * 3]
    resumed, whole = compressed(folder=work), compressed(folder=tmp_path / "whole")
    assert {p: p.stat().st_mtime_ns for p in done} == done  # nothing was done again
    assert resumed.plan == whole.plan
    assert [layer.measured for layer in resumed.report.layers] == [layer.measured for layer in whole.report.layers]
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_finished_run_is_read_back_quickly(tmp_path: Path) -> None:
    first = compressed(folder=tmp_path)
    start = time.perf_counter()
    again = compressed(folder=tmp_path)
    assert time.perf_counter() - start < 20
    assert again.plan == first.plan
    for name in ("screen", "score"):
        assert again.report.seconds[name] < first.report.seconds[name]
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_data_does_not_meet_old_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compressed(folder=tmp_path)
    more = compressed(folder=tmp_path, calibration=labelled(count=5))
    assert more.report.calibration is not None
    assert more.report.calibration["batches"] == 5
    assert more.plan == compressed(calibration=labelled(count=5)).plan
    assert not caplog.records


def test_shuffled_data_resumes_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = list(labelled())
    first = compressed(folder=tmp_path, calibration=batches)
    again = compressed(folder=tmp_path, calibration=batches[::-1])
    assert again.plan == first.plan
    assert "starts with another batch" in caplog.text
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_weights_do_not_meet_old_work(tmp_path: Path) -> None:
    compressed(folder=tmp_path)
    other = compressed(folder=tmp_path, model=mlp(seed=1))
    fresh = compressed(model=mlp(seed=1))
    assert other.plan == fresh.plan
    for one, two in zip(other.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_one_dominant_layer_uses_the_budget_too() -> None:
    model = mlp(sizes=(160, 200, 10))
    result = compressed(model=model, budget=sm.Parameters(0.5), calibration=labelled(features=160))
    limit = 0.5 * (160 * 200 + 200 * 10)
    # One step of the machine's grid in the dominant layer, 8 ranks, is what may be left.
    structure = result.plan.layers["0"]
    assert isinstance(structure, sm.PivotedLowRank)
    larger = sm.PivotedLowRank(structure.rank + 8)
    step = count_stored(larger, (200, 160)) - count_stored(structure, (200, 160))
    assert limit - step < stored(result.model) <= limit
