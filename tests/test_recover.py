"""Recovery by distillation: it helps, it is deterministic, it resumes exactly, it leaves the rest alone."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import structmat as sm
from structmat.compression.checkpoint import NAME
from structmat.compression.distill import Rates
from structmat.compression.fading import Fading
from structmat.compression.objectives import Parts, block_names
from structmat.compression.recover import DIVERGENCE, SQUARES, Distill, _Run, distance, recover
from structmat.compression.running import Outcome
from structmat.errors import DataError, FormatError, ModelError, StructureError
from structmat.learn import learning_rate_multipliers, parameter_groups, recovery_groups
from structmat.structure import count_stored


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 32)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(self.drop(torch.relu(self.first(x))))))


@pytest.fixture
def original() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture
def student(original: Classifier) -> Classifier:
    model = copy.deepcopy(original)
    model.first = sm.nn.StructuredLinear.from_linear(model.first, sm.LowRank(rank=3))
    model.second = sm.nn.StructuredLinear.from_linear(model.second, sm.BlockDiagonal(blocks=4))
    return model


def batches(count: int = 6, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 10, generator=generator), torch.arange(16) % 4) for _ in range(count)]


def far(model: nn.Module, original: nn.Module) -> float:
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(9))
    model.eval(), original.eval()
    with torch.no_grad():
        return float(distance(Outcome(model(x), True), Outcome(original(x), True), 1.0, None))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_recovery_brings_the_model_nearer(original: Classifier, student: Classifier) -> None:
    before, untouched = far(student, original), state(original)
    result = recover(student, original, batches(20), Distill(steps=150, learning_rate=3e-3), show=False)
    assert far(student, original) < 0.5 * before
    assert same(untouched, original.state_dict())
    assert (result.objective, result.steps, result.kept_step) == (DIVERGENCE, 150, 150)
    assert result.losses[-1][1] < result.losses[0][1]
    assert all(parameter.grad is None for parameter in (*student.parameters(), *original.parameters()))


def test_layerwise_reconstruction_alone_helps(original: Classifier, student: Classifier) -> None:
    # Random perturbation, so that the reconstruction has something to repair.
    with torch.no_grad():
        student.second.weight.add_(0.1 * torch.randn(student.second.weight.shape))
    before = far(student, original)
    result = recover(student, original, batches(20), Distill(steps=1, layerwise=150, learning_rate=3e-3), show=False)
    assert (result.layerwise_steps, result.steps) == (150, 1)
    assert far(student, original) < 0.8 * before


def test_squared_error_for_outputs_without_labels(original: Classifier, student: Classifier) -> None:
    data = [x for x, _ in batches()]
    assert recover(student, original, data, Distill(steps=2), show=False).objective == SQUARES


def test_modes_and_the_callers_random_state_are_restored(original: Classifier, student: Classifier) -> None:
    student.train()
    student.drop.eval()
    original.eval()
    torch.manual_seed(5)
    random = torch.random.get_rng_state()
    data = DataLoader(TensorDataset(*(torch.cat(column) for column in zip(*batches(), strict=True))), 8, shuffle=True)
    recover(student, original, data, Distill(steps=5), show=False)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert student.training
    assert not student.drop.training
    assert not original.training


def shuffled() -> DataLoader[Any]:
    columns = (torch.cat(column) for column in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(*columns), 8, shuffle=True)


def test_equal_seeds_give_equal_weights(original: Classifier, student: Classifier) -> None:
    results = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(student)
        recover(model, original, shuffled(), Distill(steps=20), seed=seed, show=False)
        results.append(state(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [3, 9, 17])
def test_a_killed_run_goes_on_exactly(original: Classifier, student: Classifier, tmp_path: Path, at: int) -> None:
    settings = Distill(
        steps=15, layerwise=5, held_out=batches(2, seed=1), check_every=4, save_every=0, learning_rate=1e-2
    )
    whole = copy.deepcopy(student)
    expected = recover(whole, original, shuffled(), settings, show=False)
    calls = 0

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        if model is not original and model.training is False and len(batch[0]) == 8:
            calls += 1
            if calls == at:
                raise KilledError
        return model(batch[0])

    model = copy.deepcopy(student)
    with pytest.raises(KilledError):
        recover(model, original, shuffled(), settings, forward=forward, folder=tmp_path, show=False)
    model = copy.deepcopy(student)  # a new process starts from the projected weights
    result = recover(model, original, shuffled(), settings, folder=tmp_path, show=False)
    assert same(state(whole), state(model))
    assert (result.losses, result.held_out, result.kept_step) == (
        expected.losses,
        expected.held_out,
        expected.kept_step,
    )
    again = copy.deepcopy(student)  # a finished run is only read
    assert recover(again, original, shuffled(), settings, folder=tmp_path, show=False) == result
    assert same(state(whole), state(again))


def test_a_checkpoint_of_another_run_is_refused(original: Classifier, student: Classifier, tmp_path: Path) -> None:
    recover(student, original, batches(), Distill(steps=2), folder=tmp_path, show=False)
    with pytest.raises(FormatError, match="another run: settings differ"):
        recover(student, original, batches(), Distill(steps=3), folder=tmp_path, show=False)
    with pytest.raises(FormatError, match="another run: seed differ"):
        recover(student, original, batches(), Distill(steps=2), seed=1, folder=tmp_path, show=False)
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError, match="Delete it to start anew"):
        recover(student, original, batches(), Distill(steps=2), folder=tmp_path, show=False)


def test_the_best_on_held_out_batches_is_kept(original: Classifier, student: Classifier) -> None:
    before = state(student)
    wild = Distill(steps=6, learning_rate=5.0, clip=1e9, held_out=batches(2, seed=1), check_every=2)
    result = recover(student, original, batches(), wild, show=False)
    assert result.kept_step == 0  # such steps only do harm
    assert same(before, state(student))
    assert [step for step, _ in result.held_out] == [0, 2, 4, 6]


def test_too_high_a_rate_is_lowered_where_it_leads_away(original: Classifier, student: Classifier) -> None:
    near = Distill(steps=300, learning_rate=3e-3)
    recover(student, original, batches(), near, show=False)
    settings = Distill(steps=120, learning_rate=1.0, warmup=0.0, held_out=batches(seed=5), check_every=10)
    found = recover(student, original, batches(), settings, show=False)
    distances = [value for _, value in found.held_out]
    assert max(distances) > distances[0]  # it was too high
    assert min(distances[1:]) < distances[0]  # and still helped in the end
    assert found.kept_step > 0


def test_users_forward_and_loss_are_honoured(original: Classifier, student: Classifier) -> None:
    seen = []

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["pixels"])

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        seen.append(len(batch["pixels"]))
        return nn.functional.cross_entropy(output, batch["digit"])

    data = [{"pixels": x, "digit": y} for x, y in batches()]
    recover(student, original, data, Distill(steps=3, own_loss=0.5), forward=forward, loss=loss, show=False)
    assert seen == [16, 16, 16]
    with pytest.raises(DataError, match="needs a loss"):
        recover(student, original, [{"x": x} for x, _ in batches()], Distill(steps=3, own_loss=0.5), show=False)


def test_time_limit(original: Classifier, student: Classifier) -> None:
    result = recover(student, original, batches(), Distill(steps=None, minutes=0.3 / 60), show=False)
    assert result.steps >= 1
    assert 0.25 < result.seconds < 5


def test_half_precision_learns_in_float32(original: Classifier, student: Classifier) -> None:
    original, student = original.to(torch.bfloat16), student.to(torch.bfloat16)
    data = [(x.bfloat16(), y) for x, y in batches()]
    before = far(student.float(), original.float())
    original.bfloat16(), student.bfloat16()
    recover(student, original, data, Distill(steps=150, learning_rate=1e-3), show=False)
    assert student.first.left.dtype == torch.bfloat16
    assert far(student.float(), original.float()) < 0.7 * before


def test_frozen_parameters_stay(original: Classifier, student: Classifier) -> None:
    student.head.requires_grad_(False)
    before = state(student)
    recover(student, original, batches(), Distill(steps=3), show=False)
    assert torch.equal(student.head.weight, before["head.weight"])
    assert not torch.equal(student.first.left, before["first.left"])
    assert not student.head.weight.requires_grad
    student.requires_grad_(False)
    with pytest.raises(DataError, match="nothing to recover with"):
        recover(student, original, batches(), show=False)


def test_padding_does_not_count() -> None:
    teacher, student = torch.randn(4, 5), torch.randn(4, 5)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    value = distance(Outcome(student, True), Outcome(teacher, True), 1.0, mask)
    assert torch.isclose(value, distance(Outcome(student[:2], True), Outcome(teacher[:2], True), 1.0, None))


def test_distance_is_the_divergence() -> None:
    teacher, student = torch.randn(3, 5), torch.randn(3, 5)
    p, q = torch.softmax(teacher / 2, -1), torch.softmax(student / 2, -1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert torch.isclose(distance(Outcome(student, True), Outcome(teacher, True), 2.0, None), expected)
    teacher[:, 0] = -torch.inf  # a forbidden class
    assert math.isfinite(float(distance(Outcome(student, True), Outcome(teacher, True), 1.0, None)))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"minutes": 0},
        {"learning_rate": 0},
        {"learning_rate": math.nan},
        {"temperature": -1},
        {"own_loss": -1},
        {"layerwise": -1},
        {"warmup": 1},
        {"clip": 0},
        {"check_every": 0},
        {"steps": None},
    ],
)
def test_settings_are_validated(options: dict[str, Any]) -> None:
    with pytest.raises(StructureError, match=next(iter(options))):
        Distill(**options)


def test_bad_data(original: Classifier, student: Classifier) -> None:
    with pytest.raises(DataError, match="no batches"):
        recover(student, original, [], show=False)
    with pytest.raises(DataError, match="only once"):
        recover(student, original, iter(batches()), show=False)
    with pytest.raises(DataError, match="held_out has no batches"):
        recover(student, original, batches(), Distill(held_out=[]), show=False)
    bad = [(torch.full((16, 10), float("nan")), torch.arange(16) % 4)]
    with pytest.raises(DataError, match="nan at step 0"):
        recover(student, original, bad, show=False)


# ---------------------------------------------------------------------------------------------- parameter groups


@pytest.mark.parametrize(
    ("structure", "shape", "expected"),
    [
        (sm.Dense(), (24, 16), {"weight": 1.0}),
        (sm.LowRank(rank=4), (24, 16), {"right": 0.5, "left": 16 / 8}),
        (sm.BlockDiagonal(blocks=4), (24, 16), {"weight": 4.0}),
    ],
)
def test_multipliers_are_those_of_the_paper(structure: Any, shape: tuple[int, int], expected: dict[str, float]) -> None:
    assert learning_rate_multipliers(structure, shape) == expected


def test_every_learned_tensor_of_every_family_has_a_multiplier() -> None:
    for family in sm.families().values():
        for structure in family.configurations((48, 64), 48 * 64):
            layer = sm.nn.StructuredLinear(64, 48, False, structure=structure)
            factors = learning_rate_multipliers(layer.structure, (48, 64))
            assert set(factors) == {name for name, _ in layer.named_parameters()}, structure
            assert all(0 < factor <= 64 for factor in factors.values()), structure


@pytest.mark.parametrize("width", [64, 256, 1024])
@pytest.mark.parametrize("structure", [sm.LowRank(rank=8), sm.LowRank(rank=0.5), sm.BlockDiagonal(blocks=4)], ids=str)
def test_one_step_changes_the_output_as_much_as_in_a_dense_layer(structure: Any, width: int) -> None:
    changes = []
    for kind in (sm.Dense(), structure):
        generator = torch.Generator().manual_seed(0)
        layer = sm.nn.StructuredLinear(width, width, False, structure=kind, generator=generator)
        x = torch.randn(64, width, generator=generator)
        goal = torch.randn(64, width, generator=generator)
        optimizer = torch.optim.Adam(parameter_groups(layer, lr=1e-3 / width))
        before = layer(x)
        ((before - goal) ** 2).sum().backward()
        optimizer.step()
        changes.append(float((layer(x) - before).detach().square().mean().sqrt()))
    assert 0.4 < changes[1] / changes[0] < 2.5


def test_groups_cover_each_parameter_once(student: Classifier) -> None:
    student.head.bias.requires_grad_(False)
    groups = parameter_groups(student, lr=0.1, weight_decay=0.01)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert [id(p) for p in decayed] == [id(student.head.weight)]
    torch.optim.AdamW(groups, lr=0.1)


def test_fitted_factors_of_a_layer_learn_at_one_rate(student: Classifier) -> None:
    rates = {id(p): group["lr"] for group in recovery_groups(student, lr=0.1) for p in group["params"]}
    factors = learning_rate_multipliers(student.first.structure, (32, 10))
    expected = 0.1 * (factors["left"] * factors["right"]) ** 0.5
    assert rates[id(student.first.left)] == rates[id(student.first.right)] == pytest.approx(expected)
    assert rates[id(student.second.weight)] == rates[id(student.head.weight)] == 0.1


def test_windows_move_while_distilling(original: Classifier) -> None:
    """The numbers that the layers hold stay within what they held, and the windows of the fit are left behind."""

    def compressed() -> Classifier:
        model = copy.deepcopy(original)
        for name in ("first", "second"):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            setattr(model, name, sm.nn.StructuredLinear.from_linear(linear, sm.GBLR(terms=12, rows=96, columns=48)))
        return model

    model, still = compressed(), compressed()
    before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith("windows")}
    start = far(model, original)
    recover(model, original, batches(), Distill(steps=80, windows=True, learning_rate=3e-3), show=False)
    recover(still, original, batches(), Distill(steps=80, learning_rate=3e-3), show=False)
    assert far(model, original) < 0.9 * start
    spent = sum(getattr(model, n).matrix.num_parameters for n in ("first", "second"))
    assert 0.99 * 288 - 1 <= spent <= 288
    moved = {n: t for n, t in model.state_dict().items() if n.endswith("windows")}
    assert any(t.shape != before[n].shape or not torch.equal(t, before[n]) for n, t in moved.items())
    for n, t in still.state_dict().items():
        assert not n.endswith("windows") or torch.equal(t, before[n])


def windowed(original: Classifier) -> Classifier:
    model = copy.deepcopy(original)
    for name in ("first", "second"):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model, name, sm.nn.StructuredLinear.from_linear(linear, sm.GBLR(terms=12, rows=96, columns=48)))
    return model


def test_moving_windows_keep_the_best_on_held_out_batches(original: Classifier) -> None:
    """What is kept is what was judged, windows in whole numbers: no farther than the start, and each layer's size."""
    for rate in (3e-3, 3.0):  # the second leads away at once, so that the first state is the best
        model, held = windowed(original), batches(3, seed=2)
        before = far_on(model, original, held)
        settings = Distill(steps=40, windows=True, learning_rate=rate, held_out=held, check_every=5)
        result = recover(model, original, batches(), settings, show=False)
        best = min(value for _, value in result.held_out)
        assert far_on(model, original, held) == pytest.approx(best, rel=1e-4)
        assert best < 0.95 * before if rate < 1 else result.held_out[-1][1] <= 1e3
        assert best <= result.held_out[0][1] == pytest.approx(before, rel=1e-4)
        for name in ("first", "second"):
            assert model.get_submodule(name).matrix.num_parameters <= 144


def far_on(model: nn.Module, original: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    model.eval(), original.eval()
    with torch.no_grad():
        values = [float(distance(Outcome(model(x), True), Outcome(original(x), True), 1.0, None)) for x, _ in data]
    return sum(values) / len(values)


@pytest.mark.parametrize("at", [3, 9, 17, 40])
def test_moving_windows_of_a_killed_run_go_on_exactly(original: Classifier, tmp_path: Path, at: int) -> None:
    settings = Distill(
        steps=15,
        layerwise=4,
        windows=True,
        held_out=batches(2, seed=1),
        check_every=4,
        save_every=0,
        learning_rate=3e-2,
    )
    whole = windowed(original)
    expected = recover(whole, original, shuffled(), settings, show=False)
    calls = 0

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        if model is not original and len(batch[0]) == 8:
            calls += 1
            if calls == at:
                raise KilledError
        return model(batch[0])

    model = windowed(original)
    with pytest.raises(KilledError) if at < 19 else contextlib.nullcontext():
        recover(model, original, shuffled(), settings, forward=forward, folder=tmp_path, show=False)
    model = windowed(original)  # a new process starts from the projected weights; at 40 the run was over
    result = recover(model, original, shuffled(), settings, folder=tmp_path, show=False)
    assert same(state(whole), state(model))
    assert (result.losses, result.held_out, result.kept_step) == (
        expected.losses,
        expected.held_out,
        expected.kept_step,
    )
    assert result.layerwise_steps == 4


def test_windows_in_recovery_refuse(original: Classifier, student: Classifier) -> None:
    with pytest.raises(StructureError, match="needs GBLR layers"):
        recover(student, original, batches(), Distill(steps=2, windows=True), show=False)
    with pytest.raises(StructureError, match="need a number of steps"):
        Distill(steps=None, minutes=1.0, windows=True)


def test_compress_with_windows_that_move(original: Classifier) -> None:
    """Under one budget, which the moving windows keep, too; the report and what is saved know the new windows."""
    settings = Distill(steps=20, windows=True, learning_rate=3e-3)
    result = sm.compress(
        original, budget=sm.Parameters(0.6), calibration=batches(), structures=("GBLR",), recover=settings
    )
    chosen = [m for m in result.model.modules() if isinstance(m, sm.nn.StructuredLinear)]
    assert any(isinstance(m.structure, sm.GBLR) for m in chosen)
    dense = sum(m.weight.numel() for m in original.modules() if isinstance(m, nn.Linear))
    kept = sum(m.weight.numel() for m in result.model.modules() if isinstance(m, nn.Linear))
    assert sum(count_stored(m.structure, (m.out_features, m.in_features)) for m in chosen) + kept <= 0.6 * dense
    named = dict(result.model.named_modules())
    for layer in result.report.layers:
        module = named[layer.name]
        if isinstance(module, sm.nn.StructuredLinear):
            assert layer.parameters == count_stored(module.structure, (module.out_features, module.in_features))
            assert result.plan.layers[layer.name] == module.structure


# ------------------------------------------------------------------------------------------- ways to recover, and rates


class Stack(nn.Module):
    """Blocks of two layers in a list, as transformers have them."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x + self.down(torch.tanh(self.up(x))), None

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


def stacks(rank: int = 2) -> tuple[Stack, Stack]:
    """A network, and the same with every layer in blocks of low rank."""
    torch.manual_seed(3)
    original = Stack()
    student = copy.deepcopy(original)
    for block in student.blocks:
        for name in ("up", "down"):
            setattr(block, name, sm.nn.StructuredLinear.from_linear(getattr(block, name), sm.LowRank(rank=rank)))
    return original, student


def hidden_error(model: Stack, original: Stack) -> float:
    """Of the last block's outputs, as a share of the original's."""
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(9))
    outputs = []
    for net in (model, original):
        y = x
        with torch.no_grad():
            for block in net.blocks:
                y, _ = block(y)
        outputs.append(y)
    return float((outputs[0] - outputs[1]).square().sum() / outputs[1].square().sum())


def test_blocks_are_found() -> None:
    _, student = stacks()
    assert block_names(student) == ["blocks.0", "blocks.1", "blocks.2"]
    assert block_names(student, ["blocks.[02]"]) == ["blocks.0", "blocks.2"]
    assert block_names(nn.Sequential(sm.nn.StructuredLinear(4, 4, structure=sm.LowRank(1)), nn.ReLU())) == ["0"]
    with pytest.raises(ModelError, match="matches no module"):
        block_names(student, ["layers.*"])


def test_blockwise_reconstruction_brings_the_blocks_nearer() -> None:
    original, student = stacks()
    before = hidden_error(student, original)
    head = student.head.weight.clone()
    settings = Distill(steps=1, blockwise=120, learning_rate=1e-2)
    done = recover(student, original, batches(20), settings, show=False)
    assert (done.blockwise_steps, done.layerwise_steps, done.steps) == (120, 0, 1)
    assert hidden_error(student, original) < 0.6 * before
    # No gradient passes from block to block, nor into what is in none.
    torch.testing.assert_close(student.head.weight, head, rtol=0.02, atol=0.02)


def test_no_gradient_passes_from_block_to_block() -> None:
    original, student = stacks()
    parts = Parts(student, original, block_names(student, ["blocks.2"]), apart=True)
    parts.error(batches(1)[0], None).backward()
    assert student.blocks[2].up.left.grad is not None
    assert all(p.grad is None for block in student.blocks[:2] for p in block.parameters())
    whole = Parts(student, original, block_names(student, ["blocks.2"]), apart=False)
    whole.error(batches(1)[0], None).backward()
    assert student.blocks[0].up.left.grad is not None


def test_hidden_states_are_distilled_too() -> None:
    errors = []
    for weight in (0.0, 3.0):
        original, student = stacks()
        recover(student, original, batches(20), Distill(steps=80, hidden=weight, learning_rate=1e-2), show=False)
        errors.append(hidden_error(student, original))
    assert errors[1] < 0.8 * errors[0]


def test_annealing_begins_as_the_original_and_ends_as_the_compressed_model() -> None:
    original, student = stacks()
    x = batches(1)[0][0]
    fading = Fading(student, original)
    with torch.no_grad():
        own, wanted = student(x), original(x)
        with fading.added(1.0):
            torch.testing.assert_close(student(x), wanted, rtol=1e-4, atol=1e-5)
        with fading.added(0.0):
            assert torch.equal(student(x), own)
        with fading.added(0.5):
            assert 0 < float((student(x) - wanted).norm()) < float((own - wanted).norm())
        assert torch.equal(student(x), own)
    names = [name for name, _ in student.named_modules()]
    before = far(student, original)
    settings = Distill(steps=150, anneal=0.5, learning_rate=1e-2, held_out=batches(2, seed=1), check_every=10)
    done = recover(student, original, batches(20), settings, show=False)
    assert far(student, original) < 0.5 * before
    assert [name for name, _ in student.named_modules()] == names
    # What still fades is not judged.
    assert all(step == 0 or step >= 80 for step, _ in done.held_out)
    assert abs(done.losses[0][1]) < done.held_out[0][1]  # the losses begin near zero, as the original


def test_recovery_ends_when_nothing_is_nearer(original: Classifier, student: Classifier) -> None:
    held = batches(2, seed=1)
    wild = Distill(steps=400, learning_rate=5.0, clip=1e9, held_out=held, check_every=2, patience=3)
    done = recover(student, original, batches(), wild, show=False)
    assert done.steps < 400
    values = [value for _, value in done.held_out]
    assert len(values) - 1 - values.index(min(values)) == 3
    assert done.kept_step == done.held_out[values.index(min(values))][0]


def test_closed_form_is_kept_only_where_it_helps(original: Classifier, student: Classifier) -> None:
    with torch.no_grad():
        student.second.weight.mul_(0.5)  # which the last factor of it can undo
    before = far(student, original)
    settings = Distill(steps=1, closed_form=True, learning_rate=1e-9, held_out=batches(6, seed=1))
    done = recover(student, original, batches(30), settings, show=False)
    assert done.closed_form is not None
    assert done.closed_form["kept"]
    assert done.closed_form["after"] == done.held_out[0][1] < 0.7 * done.closed_form["before"]
    assert far(student, original) < 0.7 * before
    exact = copy.deepcopy(original)
    held = state(exact)
    done = recover(exact, original, batches(30), settings, show=False)
    assert done.closed_form is not None
    assert not done.closed_form["kept"]  # nothing can be nearer
    assert done.kept_step == 0
    assert same(held, state(exact))


def test_rates_follow_the_structure(student: Classifier) -> None:
    wanted = {
        Rates.LAYER: recovery_groups(student, lr=0.1),
        Rates.STAGE: parameter_groups(student, lr=0.1),
    }
    for rates in Rates:
        run = _Run(student, student, [], Distill(rates=rates, learning_rate=0.1), None, None, 0, None)
        found = {id(p): group["top"] for group in run.optimizer.param_groups for p in group["params"]}
        if rates is Rates.EQUAL:
            assert set(found.values()) == {0.1}
        else:
            assert found == {id(p): group["lr"] for group in wanted[rates] for p in group["params"]}
    assert len({tuple(g["lr"] for g in groups) for groups in wanted.values()}) == 2


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(10, 24, False), nn.BatchNorm1d(24), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.first(x))))


def normalised() -> tuple[Normalised, Normalised]:
    original = Normalised().train()
    for x, _ in batches(40):
        original(x)
    student = copy.deepcopy(original)
    student.first = sm.nn.StructuredLinear.from_linear(student.first, sm.LowRank(rank=2))
    return original.eval(), student.eval()


def test_batch_statistics_are_estimated_again_at_the_end() -> None:
    results = {}
    for statistics in (False, True):
        torch.manual_seed(0)
        original, student = normalised()
        with torch.no_grad():
            student.norm.running_var.mul_(9.0)  # statistics of other activations
        settings = Distill(steps=3, statistics=statistics, learning_rate=1e-6)
        done = recover(student, original, batches(20), settings, show=False)
        results[statistics] = far(student, original)
        assert (done.statistics is not None) == statistics
        if done.statistics is not None:
            assert done.statistics["kept"]
    assert results[True] < 0.9 * results[False]


def test_batch_statistics_are_learned_and_kept_with_the_best_state(tmp_path: Path) -> None:
    original, student = normalised()
    before = student.norm.running_mean.clone()
    settings = Distill(steps=20, normalise=True, save_every=0)
    recover(student, original, batches(20), settings, folder=tmp_path, show=False)
    assert not torch.equal(student.norm.running_mean, before)
    assert not student.norm.training
    _, again = normalised()
    recover(again, original, batches(20), settings, folder=tmp_path, show=False)  # a finished run is only read
    assert same(state(student), state(again))
    wild = Distill(steps=6, learning_rate=5.0, clip=1e9, normalise=True, held_out=batches(2, seed=1), check_every=2)
    _, third = normalised()
    held = state(third)
    assert recover(third, original, batches(), wild, show=False).kept_step == 0
    assert same(held, state(third))


@pytest.mark.parametrize("at", [9, 21, 33])
def test_every_way_goes_on_exactly_after_it_was_killed(tmp_path: Path, at: int) -> None:
    original, student = normalised()
    settings = Distill(
        steps=12,
        layerwise=4,
        blockwise=4,
        hidden=0.3,
        anneal=0.3,
        normalise=True,
        patience=5,
        held_out=batches(2, seed=1),
        check_every=3,
        save_every=0,
    )
    whole = copy.deepcopy(student)
    expected = recover(whole, original, shuffled(), settings, show=False)
    calls = 0

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KilledError
        return model(batch[0])

    model = copy.deepcopy(student)
    with pytest.raises(KilledError):
        recover(model, original, shuffled(), settings, forward=forward, folder=tmp_path, show=False)
    model = copy.deepcopy(student)
    result = recover(model, original, shuffled(), settings, folder=tmp_path, show=False)
    assert same(state(whole), state(model))
    assert (result.losses, result.held_out, result.kept_step) == (
        expected.losses,
        expected.held_out,
        expected.kept_step,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"blockwise": -1},
        {"hidden": math.inf},
        {"anneal": 1.0},
        {"rates": "equally"},
        {"patience": 0, "held_out": []},
        {"patience": 3},
        {"blocks": "layer.*"},
        {"anneal": 0.5, "closed_form": True},
    ],
)
def test_settings_of_all_ways_are_validated(options: dict[str, Any]) -> None:
    with pytest.raises(StructureError, match=next(iter(options))):
        Distill(**options)
