"""Kronecker blocks as a choice of compression: linear at the start, with slopes that recovery learns."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import structmat as sm
from structmat.compression.layers import structured_layer_of
from structmat.compression.timing import layer_microseconds
from structmat.errors import FormatError, ModelError, StructureError
from structmat.nn import KroneckerBlock, StructuredLinear
from structmat.nn.kronecker import RectifiedKronecker, Slopes, absorb_, block_of, set_slopes, structure_of
from structmat.nn.kronecker.native import is_available
from structmat.structure import count_stored, from_json, resolve, specs, to_json
from structmat.structures import everything, families
from structmat.structures.kronecker import Kronecker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the benchmarks' data

F64 = torch.float64
QUICK = {"measure": False, "sweeps": 5}


def perceptron(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 48, bias=bias), nn.Tanh(), nn.Linear(48, 30, bias=bias))


def batches(features: int = 60, count: int = 3, rows: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(features, features, generator=generator) * torch.linspace(0.05, 1, features)
    return [torch.randn(rows, features, generator=generator) @ mix.T for _ in range(count)]


def blocks(model: nn.Module) -> dict[str, KroneckerBlock]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KroneckerBlock)}


# ------------------------------------------------------------------------------------------------------ as a structure


@settings(max_examples=30, deadline=None)
@given(*(st.integers(1, 5) for _ in range(5)))
def test_the_start_is_the_linear_sum(m: int, n: int, p: int, q: int, terms: int) -> None:
    """Tensors, projection, matrix: those of the linear family, and one slope a term."""
    shape = (m * q, n * p)
    terms = min(terms, m * n, p * q)
    structure = RectifiedKronecker(terms, ((m, n), (q, p)))
    weight = torch.randn(shape, dtype=F64)
    found, linear = sm.project(weight, structure), sm.project(weight, structure.linear)
    assert (found.error, found.certificate, found.lower_bound) == (linear.error, linear.certificate, linear.lower_bound)
    assert torch.equal(found.matrix.to_dense(), linear.matrix.to_dense())
    assert torch.equal(found.matrix.tensors["slope0"], torch.ones(1, terms, 1, dtype=F64))
    assert count_stored(structure, shape) == count_stored(structure.linear, shape) + terms
    bias, x = torch.randn(shape[0], dtype=F64), torch.randn(4, shape[1], dtype=F64)
    for given_bias in (bias, None):
        block = block_of(found.matrix, given_bias)
        assert structure_of(block) == structure
        assert sum(t.numel() for t in block.parameters()) == count_stored(structure, shape) + (
            0 if given_bias is None else shape[0]
        )
        y = x @ found.matrix.to_dense().T
        torch.testing.assert_close(block(x), y if given_bias is None else y + bias, rtol=1e-10, atol=1e-11)


def test_any_size_and_any_share() -> None:
    for shape in ((13, 7), (97, 33), (500, 784)):
        for share in (0.3, 0.5):
            structure = resolve(RectifiedKronecker(share), shape)
            assert isinstance(structure, RectifiedKronecker)
            assert count_stored(structure, shape) <= share * shape[0] * shape[1]
            assert from_json(to_json(structure), everything()) == structure
            for member in RectifiedKronecker.configurations(shape, int(share * shape[0] * shape[1])):
                assert count_stored(member, shape) <= share * shape[0] * shape[1]
        block = block_of(sm.StructuredMatrix.random(structure, shape), None)
        assert {n: tuple(t.shape) for n, t in _tensors(block).items()} == {
            n: s.shape for n, s in specs(structure, shape).items()
        }
        assert block(torch.randn(3, shape[1])).shape == (3, shape[0])


def _tensors(block: KroneckerBlock) -> dict[str, Tensor]:
    adapter = structured_layer_of(block)
    assert adapter is not None
    return {name: block.get_parameter(path) for name, path in adapter.paths(block).items()}


def test_it_is_no_family_and_no_linear_layer() -> None:
    assert "RectifiedKronecker" not in families()
    for structure in (RectifiedKronecker(2), sm.Sum(RectifiedKronecker(1), sm.LowRank(1))):
        with pytest.raises(StructureError, match="only at the start"):
            StructuredLinear(24, 24, structure=structure)
    for wrong in (3, ((2, 2), (2, 2), (3, 3))):
        with pytest.raises(StructureError, match="two factors"):
            RectifiedKronecker(1, wrong)
    with pytest.raises(StructureError, match="LowRank"):
        block_of(sm.StructuredMatrix.random(sm.LowRank(2), (8, 8)), None)
    # Blocks that hold more than the structure says have none.
    for other in ({"inner": torch.relu}, {"inner": Slopes(learned=False)}, {"bias": "axis"}, {"outer": torch.relu}):
        block = KroneckerBlock(24, 24, 2, **{"inner": Slopes(), "bias": "outer", **other})  # type: ignore[arg-type]
        assert structure_of(block) is None
    assert structure_of(KroneckerBlock(24, 24, 2, inner=Slopes(), bias="outer")) is not None
    turned = KroneckerBlock(32, 128, inner=Slopes(), bias="none", order="right", in_shape=(8, 4), out_shape=(4, 32))
    assert structure_of(turned) is None, "another function in another order"


# --------------------------------------------------------------------------------------------------------- in compress


@pytest.mark.parametrize("bias", [True, False])
def test_compress_chooses_blocks(tmp_path: Path, bias: bool) -> None:
    model, data = perceptron(bias), batches()
    result = sm.compress(
        model, budget=sm.Parameters(0.4), calibration=data, structures=["RectifiedKronecker"], folder=tmp_path, **QUICK
    )
    found = blocks(result.model)
    assert found
    for name, block in found.items():
        assert result.plan.layers[name] == structure_of(block)
        (layer,) = (r for r in result.report.layers if r.name == name)
        assert layer.structure.startswith("RectifiedKronecker(terms=")
        own = sum(p.numel() for n, p in block.named_parameters() if n != "bias")
        assert layer.parameters == own, "slopes are part of the budget"
        assert (block.bias is None) is not bias
    assert result.report.parameters.after <= 0.4 * result.report.parameters.before
    # The start is the linear approximation of the same plan.
    linear = {
        name: structure.linear if isinstance(structure, RectifiedKronecker) else structure
        for name, structure in result.plan.layers.items()
    }
    plan = sm.Plan(linear, result.plan.shapes)
    other = sm.compress(model, plan=plan, calibration=data, sweeps=5).model
    for batch in data:
        torch.testing.assert_close(result.model(batch), other(batch), rtol=1e-4, atol=1e-5)
    # The plan is a file that makes the same model.
    again = sm.compress(model, plan=sm.Plan.read(tmp_path / "plan.json"), calibration=data, sweeps=5)
    assert torch.equal(again.model(data[0]), result.model(data[0]))
    assert "RectifiedKronecker" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_competes_with_families_for_every_layer() -> None:
    """A layer that is a sum of products gets a block, one of low rank gets low rank."""
    model, data = perceptron(), batches()
    with torch.no_grad():
        planted = sm.StructuredMatrix.random(Kronecker(2, ((8, 10), (6, 6))), (48, 60))
        model[0].weight.copy_(3 * planted.to_dense())
        model[2].weight.copy_(torch.randn(30, 2) @ torch.randn(2, 48))
    result = sm.compress(
        model, budget=sm.Parameters(0.2), calibration=data, structures=["LowRank", RectifiedKronecker], **QUICK
    )
    chosen = {name: type(structure).__name__ for name, structure in result.plan.layers.items()}
    assert chosen == {"0": "RectifiedKronecker", "2": "LowRank"}
    # The linear sum is the same at the start and has fewer numbers, so beside it the block is not chosen.
    both = sm.compress(
        model, budget=sm.Parameters(0.2), calibration=data, structures=["LowRank", "Kronecker", RectifiedKronecker],
        **QUICK,
    )  # fmt: skip
    assert {type(s).__name__ for s in both.plan.layers.values()} == {"Kronecker", "LowRank"}


def test_recovery_learns_the_slopes() -> None:
    model, data = perceptron(), batches()
    result = sm.compress(
        model,
        budget=sm.Parameters(0.3),
        calibration=data,
        overrides={"0": RectifiedKronecker(2)},
        structures=["LowRank"],
        recover=sm.Distill(steps=40, learning_rate=3e-3, layerwise=5),
        **QUICK,
    )
    block = result.model.get_submodule("0")
    assert isinstance(block, KroneckerBlock)
    (slopes,) = block.slopes()
    assert slopes.requires_grad
    assert bool((slopes != 1).all())
    assert result.report.recovery is not None
    assert result.report.recovery["losses"][-1][1] < result.report.recovery["losses"][0][1] or (
        len(result.report.recovery["losses"]) == 1
    )


def test_what_stays_linear_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 10, 24), nn.Unflatten(1, (3, 8)), Last())
    data = [torch.randn(32, 4, 12) for _ in range(2)]
    result = sm.compress(
        model, budget=sm.Parameters(0.5), calibration=data, structures=["LowRank", "RectifiedKronecker"], **QUICK
    )
    kinds = {layer.name: type(result.plan.layers[layer.name]).__name__ for layer in result.report.layers}
    assert all(kind != "RectifiedKronecker" for name, kind in kinds.items() if name != "2")
    refused = {layer.name: " ".join(layer.refused) for layer in result.report.layers}
    assert "a Conv1d stays linear: RectifiedKronecker" in refused["0"]
    assert "a part of a recurrent net, of attention or of experts stays linear" in refused["4.net.ih_l0"]
    with pytest.raises(StructureError, match="a Conv1d stays linear"):
        sm.compress(model, budget=sm.Parameters(0.5), calibration=data, overrides={"0": RectifiedKronecker(1)}, **QUICK)


class Last(nn.Module):
    """The outcome of a recurrent net at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(8, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)[0][:, -1]
        return y


# ------------------------------------------------------------------------------------------------- save, load, freeze


@pytest.mark.parametrize("bias", [True, False])
def test_saved_loaded_frozen(tmp_path: Path, bias: bool) -> None:
    model, data = perceptron(bias), batches()
    small = sm.compress(
        model, budget=sm.Parameters(0.4), calibration=data, structures=["RectifiedKronecker"], **QUICK
    ).model
    assert blocks(small)
    start = {"frozen": sm.freeze(small), "dense": sm.to_dense(small)}
    for made in start.values():
        assert not blocks(made), "with slopes of 1 it is linear"
        torch.testing.assert_close(made(data[0]), small(data[0]), rtol=1e-4, atol=1e-5)
    set_slopes(small, 0.3)
    sm.save(small, tmp_path / "saved")
    with torch.device("meta"):
        empty = copy.deepcopy(model).to("meta")
    for fresh in (perceptron(bias), small, empty, start["dense"]):
        again = sm.load(tmp_path / "saved", copy.deepcopy(fresh))
        assert list(blocks(again)) == list(blocks(small))
        assert torch.equal(again(data[0]), small(data[0]))
    for made in (sm.freeze(small), sm.to_dense(small)):
        assert list(blocks(made)) == list(blocks(small)), "no matrix is equal to it"
        assert torch.equal(made(data[0]), small(data[0]))
        assert all(a is not b for a, b in zip(blocks(made).values(), blocks(small).values(), strict=True))
    if is_available():
        assert all(block.fallback == "" for block in blocks(small).values())
    with pytest.raises(FormatError):
        sm.load(tmp_path / "saved", nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 30)))
    # What was saved is read into a linear model too, and back.
    set_slopes(small, 1.01)
    assert absorb_(small)
    sm.save(small, tmp_path / "linear")
    blocked = sm.load(tmp_path / "saved", perceptron(bias))
    back = sm.load(tmp_path / "linear", blocked)
    assert not blocks(back)
    assert torch.equal(back(data[0]), small(data[0]))


def test_the_stored_size_is_kept(tmp_path: Path) -> None:
    model, data = perceptron(), batches()
    result = sm.compress(model, budget=sm.Memory(12_000), calibration=data, structures=["RectifiedKronecker"], **QUICK)
    assert blocks(result.model)
    folder = sm.save(result.model, tmp_path / "saved")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000


def test_a_block_is_a_layer_that_is_structured_already() -> None:
    model = nn.Sequential(KroneckerBlock(60, 48, 2, inner=Slopes(), bias="outer"), nn.Linear(48, 30))
    found = sm.scan(model)
    assert [site.name for site in found.sites] == ["1"]
    adapter = structured_layer_of(model[0])
    assert adapter is not None
    assert adapter.kind(model[0]) is None
    with pytest.raises(ModelError, match="no dense layer"):
        adapter.matrices(model[0])
    assert sum(len(g["params"]) for g in sm.parameter_groups(model, lr=1e-3)) == len(list(model.parameters()))


def test_its_time_is_that_of_the_block() -> None:
    assert layer_microseconds(RectifiedKronecker(1, ((6, 6), (8, 10))), (48, 60), 4) > 0


@pytest.mark.slow
def test_the_mnist_perceptron_as_a_block(real_data: object, tmp_path: Path) -> None:
    from benchmarks.kronecker_conversion import perceptron as trained
    from benchmarks.kronecker_data import mnist

    model, train, test = trained(), mnist("train"), mnist("test")
    data = [(x, y) for x, y in train.batches(1, 250, 0)][:16]

    def wrong(found: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((found(test.x).argmax(1) != test.y).float().mean())

    result = sm.compress(
        model,
        budget=sm.Parameters(0.2),
        calibration=data,
        structures=[RectifiedKronecker],
        exclude=["2"],
        recover=sm.Distill(steps=200, learning_rate=1e-3),
        evaluate=wrong,
        measure=False,
        sweeps=2,
    )
    assert list(blocks(result.model)) == ["0"]
    after, recovered = (result.report.quality[when]["quality"] for when in ("after", "recovered"))
    assert recovered < after
    assert recovered < 4
    sm.save(result.model, tmp_path / "saved")
    assert wrong(sm.load(tmp_path / "saved", trained())) == pytest.approx(recovered)
