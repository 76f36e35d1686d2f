"""Compression of models with all kinds of layers: budgets, saving, freezing, tuning, resuming."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.compression.calibrate import calibrate
from structmat.compression.layers import cost_of, structured_layer_of
from structmat.compression.scan import scan
from structmat.errors import FormatError, ModelError
from structmat.io import size_on_disk
from structmat.nn.convolution import FrozenConvolution
from structmat.nn.recurrent import FrozenRecurrent


def seeded(index: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(index)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def test_structured_layers_of_all_kinds_are_recognised(compressed: tuple[Net, sm.Result[Net], list[Tensor]]) -> None:
    _, result, _ = compressed
    found = {n for n, m in result.model.named_modules() if structured_layer_of(m) is not None}
    assert found == set(PLAN)
    names = {s.name for s in scan(result.model).skipped}
    assert found <= names  # already structured
