"""Learning windows under a budget: projection on it, training, checkpoints, forms (C10, C13, C21, C22)."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import structmat as sm
from structmat.errors import BudgetError, ModelError, ShapeError, StructureError
from structmat.learn.order import reorder_hidden
from structmat.learn.widths import fit_exactly, project_widths, raise_widths, soft_threshold
from structmat.learn.windows import WindowLearner, hardened
from structmat.nn import FusedLinear, MatrixConv2d, StructuredLinear, WindowedLinear
from structmat.projection.masks import quantized_mask
from structmat.projection.windows import Terms


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------- the proximal step


@given(x=st.floats(-3, 3), amount=st.floats(0, 2))
def test_learned_C10_soft_threshold_is_the_proximal_map(x: float, amount: float) -> None:
    def objective(y: Tensor) -> Tensor:
        return amount * y.abs() + (y - x).square() / 2

    found = soft_threshold(torch.tensor([x], dtype=torch.float64), amount)
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    assert float(objective(found)) <= float(objective(grid).min()) + 1e-12


def test_learned_C10_clipping_comes_after_the_threshold() -> None:
    """Shrinking 1.2 by 0.3 is 0.9, not 0.7: a width that a step has carried past the end is first pulled back."""
    widths = torch.tensor([1.2, 0.1, 0.5], dtype=torch.float64)
    assert soft_threshold(widths, 0.3).clamp(0, 1).tolist() == pytest.approx([0.9, 0.0, 0.2])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), share=st.floats(0.05, 1.2))
def test_learned_C10_the_projection_is_the_nearest_point(seed: int, share: float) -> None:
    g = generator(seed)
    widths = [torch.rand(n, generator=g, dtype=torch.float64) * 1.4 - 0.2 for n in (3, 5)]
    prices = [3.0, 1.0]
    budget = share * sum(p * float(w.clamp(0, 1).sum()) for p, w in zip(prices, widths, strict=True)) + 1e-3
    clipped = [w.clamp(0, 1) for w in widths]
    found = project_widths(widths, prices, budget)
    cost = sum(p * float(w.sum()) for p, w in zip(prices, found, strict=True))
    assert cost <= budget + 1e-9
    # The optimality conditions of the quadratic program: a shift in proportion to the price wherever not clipped.
    shifts = {
        round(float((c - f) / p), 8)
        for p, c, w in zip(prices, clipped, found, strict=True)
        for c, f in zip(c, w, strict=True)
        if f > 0
    }
    assert len(shifts) <= 1
    mu = max(shifts, default=0.0)
    for p, c, f in zip(prices, clipped, found, strict=True):
        torch.testing.assert_close(f, soft_threshold(c, mu * p).clamp(0, 1) if shifts else f, rtol=0, atol=1e-6)
    if sum(p * float(c.sum()) for p, c in zip(prices, clipped, strict=True)) > budget:
        assert cost == pytest.approx(budget, rel=1e-6)
    again = project_widths(found, prices, budget)
    for a, b in zip(again, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_learned_C10_against_random_search() -> None:
    g = generator(10)
    widths = [torch.rand(3, generator=g, dtype=torch.float64), torch.rand(2, generator=g, dtype=torch.float64)]
    prices, budget = [2.0, 5.0], 3.0
    found = torch.cat(project_widths(widths, prices, budget))
    flat, price = torch.cat(widths), torch.tensor([2.0] * 3 + [5.0] * 2, dtype=torch.float64)
    others = torch.rand(200_000, 5, generator=g, dtype=torch.float64)
    others = others[(others @ price) <= budget]
    assert float((found - flat).norm()) <= float((others - flat).norm(dim=1).min()) + 1e-9


def test_floors_keep_layers_alive() -> None:
    widths = [torch.full((4,), 0.1, dtype=torch.float64), torch.full((4,), 0.9, dtype=torch.float64)]
    free = project_widths(widths, [1.0, 1.0], 1.0)
    assert float(free[0].sum()) == 0
    kept = project_widths(widths, [1.0, 1.0], 1.0, floors=[0.2, 0.2])
    assert float(kept[0].sum()) == pytest.approx(0.2, abs=1e-9)
    assert float(kept[1].sum()) == pytest.approx(0.8, abs=1e-9)
    with pytest.raises(BudgetError, match="floors of the layers hold"):
        project_widths(widths, [1.0, 1.0], 0.1, floors=[0.2, 0.2])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), share=st.floats(0.5, 3.0), capped=st.booleans())
def test_rising_widths_reach_the_budget_by_one_shift(seed: int, share: float, capped: bool) -> None:
    """Widths of 0 stay, none passes 1, no group its top, and what is not clipped rose by one multiple of its price."""
    g = generator(seed)
    widths = [(torch.rand(n, generator=g, dtype=torch.float64) - 0.2).clamp(min=0) for n in (6, 4)]
    prices = [3.0, 1.0]
    before = [p * float(w.sum()) for p, w in zip(prices, widths, strict=True)]
    budget = share * sum(before)
    tops = [1.2 * b for b in before] if capped else [float("inf")] * 2
    found = raise_widths(widths, prices, budget, tops)
    after = [p * float(w.sum()) for p, w in zip(prices, found, strict=True)]
    alive = [int((w > 0).sum()) for w in widths]
    reachable = sum(min(p * n, top) for p, n, top in zip(prices, alive, tops, strict=True))
    assert sum(after) == pytest.approx(max(sum(before), min(budget, reachable)), rel=1e-6)
    shifts = []
    for p, w, f, cost, top in zip(prices, widths, found, after, tops, strict=True):
        assert bool((f[w == 0] == 0).all())
        assert float(f.max()) <= 1
        assert cost <= top + 1e-6
        free = (w > 0) & (f < 1)
        rises = ((f - w)[free] / p).tolist()
        assert max(rises, default=0.0) - min(rises, default=0.0) < 1e-9 <= min(rises, default=0.0) + 2e-9
        if cost < top - 1e-6 and rises:
            shifts.append(rises[0])
    assert max(shifts, default=0.0) - min(shifts, default=0.0) < 1e-9


@pytest.mark.parametrize("budget", [40, 57, 200, 999])
def test_exact_budgets_in_whole_numbers(budget: int) -> None:
    layers = [WindowedLinear(24, 16, terms=9, width=0.7, generator=generator(i)) for i in range(3)]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.widths.copy_(torch.rand(2, 9, generator=generator(i)))
    before = sum(layer.cost for layer in layers)
    fit_exactly(layers, budget)
    total = sum(layer.cost for layer in layers)
    assert min(before, 0.99 * budget - 1) <= total <= budget


# ---------------------------------------------------------------------------------------------------- the layer


def dense_mask_layer(layer: WindowedLinear) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's matrix from masks written out, and the leaves it was made of."""
    leaves = {
        name: getattr(layer, name).detach().clone().requires_grad_()
        for name in ("left", "right", "widths", "locations")
    }
    sides = []
    for side, (name, size) in enumerate((("left", layer.out_features), ("right", layer.in_features))):
        mask = quantized_mask(leaves["widths"][side] * size, leaves["locations"][side] * size, size, layer.sigmas[side])
        sides.append(leaves[name].view(-1, size) * mask)
    return sides[0].T @ sides[1], leaves


@pytest.mark.parametrize(("out", "inputs"), [(13, 17), (16, 16), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("sigma", [0.5, 3.0, float("inf")])
def test_learned_C13_the_layer_is_its_masks(out: int, inputs: int, rows: int, sigma: float) -> None:
    """Values and all gradients, for few rows (factors in turn) and many (the matrix is made)."""
    layer = WindowedLinear(inputs, out, terms=12, dtype=torch.float64, generator=generator(1)).double()
    with torch.no_grad():
        layer.widths.copy_(torch.rand(2, 12, generator=generator(2)))
    layer.sigmas = (sigma, sigma)
    x = torch.randn(rows, inputs, generator=generator(3), dtype=torch.float64)
    probe = torch.randn(rows, out, generator=generator(4), dtype=torch.float64)
    y = layer(x)
    (y * probe).sum().backward()
    matrix, leaves = dense_mask_layer(layer)
    assert layer.bias is not None
    torch.testing.assert_close(y, x @ matrix.T + layer.bias, rtol=1e-12, atol=1e-12)
    ((x @ matrix.T) * probe).sum().backward()
    for name, leaf in leaves.items():
        grad = getattr(layer, name).grad
        assert grad is not None
        assert leaf.grad is not None
        if name in ("left", "right"):
            torch.testing.assert_close(grad, leaf.grad, rtol=1e-10, atol=1e-10)
        elif sigma == float("inf") or sigma == 0.5:  # these kernels reach everywhere
            torch.testing.assert_close(grad, leaf.grad, rtol=1e-8, atol=1e-8)
        else:  # beyond the reach of an edge its kernel is cut off, below 1 % of its peak
            torch.testing.assert_close(grad, leaf.grad, rtol=0.1, atol=0.05 * float(leaf.grad.abs().max()))
    torch.testing.assert_close(layer.harden()(x), y, rtol=1e-12, atol=1e-12)


def test_learned_C13_compacting_changes_nothing_near_the_windows() -> None:
    layer = WindowedLinear(60, 50, terms=9, width=0.2, dtype=torch.float64, generator=generator(5)).double()
    with torch.no_grad():
        layer.widths[0, 3] = 0.0
    layer.sigmas = (30.0, 30.0)
    x = torch.randn(4, 60, generator=generator(6), dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    outcomes = []
    for _ in range(2):
        optimizer.zero_grad()
        layer.widths.grad = layer.locations.grad = None
        y = layer(x)
        y.square().sum().backward()
        assert layer.widths.grad is not None
        assert layer.locations.grad is not None
        outcomes.append((y.detach(), layer.widths.grad.clone(), layer.locations.grad.clone()))
        if layer.terms == 9:
            optimizer.step()
            before, y = layer.to_terms().cropped(), layer(x).detach()
            layer.compact(20, optimizer)
            assert layer.terms == 8
            assert layer.left.numel() < 9 * 50
            assert optimizer.state[layer.left]["exp_avg"].shape == layer.left.shape
            torch.testing.assert_close(layer.to_terms().cropped().dense(), before.dense(), rtol=0, atol=0)
            torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    optimizer.step()
    assert outcomes[1][1].shape == (2, 8)
    assert bool(torch.isfinite(outcomes[1][1]).all())


def test_compacted_gradients_are_those_of_the_whole() -> None:
    whole = WindowedLinear(60, 50, terms=6, width=0.2, dtype=torch.float64, generator=generator(5)).double()
    whole.sigmas = (30.0, 30.0)
    part = copy.deepcopy(whole)
    part.compact(24)
    x = torch.randn(4, 60, generator=generator(6), dtype=torch.float64)
    for layer in (whole, part):
        layer(x).square().sum().backward()
    for name in ("widths", "locations"):
        torch.testing.assert_close(getattr(part, name).grad, getattr(whole, name).grad, rtol=1e-8, atol=1e-8)
    back = part.to_terms()
    torch.testing.assert_close(back.cropped().dense(), whole.to_terms().cropped().dense(), rtol=0, atol=0)


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize(
    "settings_", [{}, {"stride": 2, "padding": 1}, {"dilation": (2, 1), "padding": (2, 0), "stride": (1, 3)}]
)
def test_learned_C13_convolutions(taps: bool, settings_: dict[str, Any]) -> None:
    torch.manual_seed(13)
    conv = nn.Conv2d(5, 7, (3, 2), **settings_).double()
    x = torch.randn(2, 5, 9, 8, generator=generator(), dtype=torch.float64)
    plain = MatrixConv2d.from_conv(conv, taps=taps)
    torch.testing.assert_close(plain(x), conv(x), rtol=1e-12, atol=1e-12)
    count, width = (6, 5) if taps else (1, 30)

    def windows(linear: nn.Linear) -> nn.Module:
        assert linear.in_features == width
        return StructuredLinear.from_linear(linear, sm.GBLR(4), sweeps=2)

    made = MatrixConv2d.from_conv(conv, windows, taps=taps)
    assert len(made.matrices) == count
    dense = [layer.matrix.to_dense() for layer in made.matrices]  # type: ignore[operator,union-attr]
    kernel = torch.stack(dense) if taps else dense[0].view(7, 6, 5).transpose(0, 1)
    kernel = kernel.view(3, 2, 7, 5).permute(2, 3, 0, 1)
    wanted = nn.functional.conv2d(x, kernel, conv.bias, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
    torch.testing.assert_close(made(x), wanted, rtol=1e-11, atol=1e-11)


def test_convolutions_and_fused_layers_refuse() -> None:
    with pytest.raises(ModelError, match="groups=2"):
        MatrixConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ShapeError, match="4 taps is one matrix or 4"):
        MatrixConv2d([nn.Linear(2, 2)] * 3, 2, 2, (2, 2))
    with pytest.raises(ShapeError, match="larger than the padded input"):
        MatrixConv2d.from_conv(nn.Conv2d(2, 2, 3))(torch.zeros(1, 2, 2, 2))
    with pytest.raises(ShapeError, match="10 outputs are not 3 equal parts"):
        FusedLinear.from_linear(nn.Linear(4, 10), 3)
    with pytest.raises(ShapeError, match="9 in all"):
        FusedLinear.from_linear(nn.Linear(4, 10), [4, 5])


def test_a_fused_projection_taken_apart() -> None:
    linear = nn.Linear(6, 12)
    x = torch.randn(3, 6)
    apart = FusedLinear.from_linear(linear, 3)
    torch.testing.assert_close(apart(x), linear(x))
    model = nn.Sequential(apart)
    learner = WindowLearner(model, 0.5, 10)
    assert set(learner.layers) == {"0.parts.0", "0.parts.1", "0.parts.2"}


def test_reordering_hidden_units_changes_nothing_and_helps_windows() -> None:
    g = generator(25)
    first, second = nn.Linear(48, 64).double(), nn.Linear(64, 40).double()
    shuffle = torch.randperm(64, generator=g)
    with torch.no_grad():  # blocks of hidden units, shuffled
        blocks = torch.block_diag(*[torch.randn(16, 12, generator=g, dtype=torch.float64) for _ in range(4)])
        first.weight.copy_(blocks[shuffle])
    x = torch.randn(5, 48, generator=g, dtype=torch.float64)
    before = second(torch.relu(first(x))).detach()
    structure = sm.GBLR(48, 48 * 16, 48)
    shuffled = sm.project(first.weight, structure).error
    order = reorder_hidden(first, second)
    assert sorted(order.tolist()) == list(range(64))
    torch.testing.assert_close(second(torch.relu(first(x))), before, rtol=1e-12, atol=1e-12)
    assert sm.project(first.weight, structure).error < 0.5 * shuffled
    with pytest.raises(ShapeError, match="64 outputs, the second 9 inputs"):
        reorder_hidden(first, nn.Linear(9, 2))


# ------------------------------------------------------------------------------------------------------ starts


def test_starting_from_weights_is_exact_with_all_terms() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(20, 12).double()
    layer = WindowedLinear.from_linear(linear, terms=12)
    x = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-11, atol=1e-11)
    assert layer.cost == 12 * 32
    half = WindowedLinear.from_linear(linear, terms=12, budget=0.5)
    assert 0.45 * 240 <= half.cost <= 0.5 * 240
    error = float((half.matrix - linear.weight.detach()).norm() / linear.weight.detach().norm())
    assert error <= sm.project(linear.weight, sm.LowRank(3)).error
    dead = (half.windows()[:, [1, 3]] == 0).all(1)
    assert not bool(dead.any()), "a term without both widths could never come back"


def test_random_starts_have_the_variance_of_a_dense_layer() -> None:
    total = 0.0
    for seed in range(40):
        layer = WindowedLinear(96, 80, False, terms=40, generator=generator(seed))
        total += float(layer.matrix.square().sum()) / 80
    assert total / 40 == pytest.approx(1 / 3, rel=0.1)


# -------------------------------------------------------------------------------------------------- the learner


def planted(seed: int, size: int = 64, count: int = 8) -> Terms:
    """Windows of widths 8 to 24 at random places, contents Gaussian."""
    g = generator(seed)
    windows = torch.stack(
        [
            torch.randint(0, size, (count,), generator=g),
            torch.randint(8, 25, (count,), generator=g),
            torch.randint(0, size, (count,), generator=g),
            torch.randint(8, 25, (count,), generator=g),
        ],
        1,
    )
    return Terms(torch.randn(count, size, generator=g), torch.randn(count, size, generator=g), windows).cropped()


def student(seed: int, steps: int, *, frozen: bool = False) -> tuple[float, float, int, int]:
    """Error of a student of the planted windows at their own cost, that of the best low rank, and both costs."""
    teacher = planted(seed)
    weight, cost = teacher.dense(), sum(teacher.totals)
    size = weight.shape[0]
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    learner = WindowLearner(
        model, cost / size**2, steps, start="random", terms=0.5, frozen=frozen, floor=0.0, seed=seed
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = generator(seed + 100)
    for _ in range(steps):
        x = torch.randn(128, size, generator=g)
        loss = (model(x) - x @ weight.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        learner.step()
    learner.harden()
    layer = model[0]
    assert isinstance(layer, StructuredLinear)
    found = layer.matrix.to_dense().detach()
    best = sm.project(weight, sm.LowRank(max(1, cost // (2 * size)))).error
    return float((found - weight).norm() / weight.norm()), best, layer.matrix.num_parameters, cost


@pytest.mark.parametrize("seed", [0, 1])
def test_learned_C21_planted_windows_are_learned(seed: int) -> None:
    error, low_rank, spent, cost = student(seed, 800)
    frozen, *_ = student(seed, 200, frozen=True)
    assert 0.99 * cost <= spent <= cost
    assert error < 0.6 * low_rank
    assert error < 0.6 * frozen


@pytest.mark.slow
def test_learned_C21_at_full_length() -> None:
    wins = 0
    for seed in range(5):
        error, low_rank, spent, cost = student(seed, 1500)
        frozen, *_ = student(seed, 1500, frozen=True)
        assert 0.99 * cost <= spent <= cost
        wins += error < 0.6 * min(low_rank, frozen)
    assert wins >= 4


def network() -> nn.Sequential:
    torch.manual_seed(22)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 4))


def data(step: int) -> tuple[Tensor, Tensor]:
    g = generator(step)
    x = torch.randn(32, 24, generator=g)
    return x, torch.stack([x[:, :6].sum(1), x[:, 6:12].sum(1), x[:, 12:18].sum(1), x[:, 18:].sum(1)], 1)


class Run:
    """A training loop: the three lines are marked."""

    def __init__(self, steps: int, compacting: bool = False, **options: Any) -> None:
        self.model = network()
        self.learner = WindowLearner(self.model, 0.3, steps, exclude=["4"], seed=3, **options)  # one
        groups = sm.parameter_groups(self.model, lr=3e-3, weight_decay=0.1)
        self.optimizer = torch.optim.AdamW(groups)
        self.compacting = compacting
        self.loss = 0.0

    def go(self, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = data(step)
            loss = (self.model(x) - y).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.learner.step(self.optimizer if self.compacting else None)  # two
            self.loss = float(loss.detach())


@pytest.mark.parametrize("compacting", [False, True])
def test_learned_C22_resuming_changes_nothing(compacting: bool) -> None:
    """Two runs with the same seed, and one that was stopped in the middle of the annealing, end bit by bit alike."""
    whole, again = Run(60, compacting), Run(60, compacting)
    whole.go(0, 60)
    again.go(0, 60)
    stopped = Run(60, compacting)
    stopped.go(0, 25)
    file = io.BytesIO()
    torch.save([stopped.model.state_dict(), stopped.optimizer.state_dict(), stopped.learner.state_dict()], file)
    file.seek(0)
    model_state, optimizer_state, learner_state = torch.load(file)
    resumed = Run(60, compacting)
    resumed.learner.load_state_dict(learner_state)
    resumed.model.load_state_dict(model_state)
    resumed.optimizer.load_state_dict(optimizer_state)
    resumed.go(25, 60)
    for other in (again, resumed):
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(other.model.state_dict()[name], tensor), name
        assert [s.step for s in other.learner.history] == [s.step for s in whole.learner.history]
        for a, b in zip(other.learner.history, whole.learner.history, strict=True):
            assert all(torch.equal(a.windows[n], b.windows[n]) for n in a.windows)
    begun = Run(60, compacting).learner
    assert begun.cost == pytest.approx(sum(whole.learner.initial.values()), rel=0.02)
    assert whole.learner.cost < begun.cost


@pytest.mark.parametrize(
    "options",
    [{}, {"frozen": True}, {"spread": 1.0}, {"spread": float("inf")}, {"start": "random"}, {"start": "projected"}],
)
def test_a_loop_with_three_lines_ends_within_the_budget(options: dict[str, Any]) -> None:
    run = Run(80, **options)
    dense = 24 * 40 + 40 * 16
    run.go(0, 80)
    before = run.model(data(0)[0]).detach()
    run.learner.harden()  # three
    compact = hardened(run.model)
    assert set(compact) == {"0", "2"}
    spent = sum(layer.matrix.num_parameters for layer in compact.values())
    assert 0.99 * 0.3 * dense - 2 <= spent <= 0.3 * dense
    torch.testing.assert_close(run.model(data(0)[0]), before, rtol=1e-4, atol=1e-4)
    floor = min(layer.matrix.num_parameters / (layer.in_features * layer.out_features) for layer in compact.values())
    assert floor >= 0.015
    assert max(run.learner.moved().values()) <= 0.5
    first, last = (run.learner.history[i].windows["0"][:, [0, 2]] for i in (0, -1))
    assert torch.equal(first, last) == bool(options.get("frozen"))
    shares = [layer.matrix.num_parameters / (layer.in_features * layer.out_features) for layer in compact.values()]
    if options.get("frozen") or options.get("spread") == 1.0:
        assert max(shares) - min(shares) < 0.02
    elif "spread" not in options:
        assert max(shares) <= 2.02 * 0.3
        assert min(shares) >= 0.3 / 2.02 - 0.01
    assert isinstance(run.model[4], nn.Linear)


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_a_loss_that_wants_narrow_windows_still_spends_the_budget(spread: float) -> None:
    """The targets are zeros, so every gradient asks for narrower windows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 40))
    learner = WindowLearner(model, 0.3, 60, start="random", rate=0.1, spread=spread, seed=0)
    g = generator()
    for _ in range(60):
        model(torch.randn(32, 40, generator=g)).square().mean().backward()
        learner.step()
    learner.harden()
    held = sum(layer.matrix.num_parameters for layer in hardened(model).values())
    assert 0.99 * 0.3 * 2 * 40 * 32 <= held <= 0.3 * 2 * 40 * 32


def test_a_collapse_that_nobody_asked_for_does_not_happen() -> None:
    """A layer whose outputs are ignored keeps its floor, and the other gets the rest."""
    model = nn.ModuleDict({"used": nn.Linear(32, 32), "ignored": nn.Linear(32, 32)})
    learner = WindowLearner(model, 0.2, 60, floor=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(60):
        x = torch.randn(16, 32, generator=generator(step))
        loss = (model["used"](x) - x).square().mean() + 1e-9 * model["ignored"](x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.step()
    costs = {name: layer.cost for name, layer in learner.layers.items()}
    assert min(costs.values()) >= 0.04 * 1024
    assert sum(costs.values()) <= 0.2 * 2048


def test_user_optimizers_do_not_touch_windows() -> None:
    layer = WindowedLinear(8, 8)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"left", "right", "bias"}
    assert {"widths", "locations", "arcs"} <= set(layer.state_dict())
    before = layer.widths.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=0.5)
    layer(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.widths, before)
    twin = copy.deepcopy(layer)
    twin.double()(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    assert twin.widths.grad is not None


def test_parameter_groups_know_windowed_layers() -> None:
    model = nn.Sequential(WindowedLinear(64, 64, terms=32, width=0.5))
    groups = {g["role"]: g for g in sm.parameter_groups(model, lr=1e-3, weight_decay=0.1)}
    assert all(g["weight_decay"] == 0.0 for g in groups.values())
    rates = sorted(g["lr"] for role, g in groups.items() if role.startswith("structured"))
    assert rates == pytest.approx([1e-3, 2e-3])  # 1 / (2 * width) and in / (terms * width) / 2


def test_bad_options() -> None:
    for options, kind, words in (
        ({"budget": 0.01}, BudgetError, "above the floor"),
        ({"budget": 0.5, "start": "zero"}, StructureError, "is none of"),
        ({"budget": 0.5, "anneal": 0.0}, StructureError, "anneal above 0"),
        ({"budget": 0.5, "layers": ["9"]}, ModelError, "'9' is no nn.Linear"),
        ({"budget": 0.5, "exclude": ["0", "2", "4"]}, ModelError, "no nn.Linear to replace"),
    ):
        with pytest.raises(kind, match=words):
            WindowLearner(network(), steps=10, **options)  # type: ignore[arg-type]
    with pytest.raises(StructureError, match="at least one term"):
        WindowedLinear(4, 4, terms=0)
    with pytest.raises(ShapeError, match="last axis must hold"):
        WindowedLinear(4, 4)(torch.zeros(2, 5))
    learner = WindowLearner(network(), 0.3, 10)
    state = learner.state_dict()
    with pytest.raises(ModelError, match="checkpoint is of 3 layers"):
        WindowLearner(network(), 0.4, 10).load_state_dict(state)


def test_a_single_layer_is_not_replaced_in_place() -> None:
    with pytest.raises(ModelError, match="itself is an nn"):
        WindowLearner(nn.Linear(16, 16), 0.5, 10)
