"""Learned windows beside fixed structures at equal multiply-adds, training steps and data.

    python -m benchmarks.learned_study                       every cell that is not done and takes minutes
    python -m benchmarks.learned_study run --only P2         cells whose name contains this
    python -m benchmarks.learned_study run --all             those that take hours too
    python -m benchmarks.learned_study table                 the tables again, from what is there

What is counted is what is deployed: multiply-adds of the replaced layers, hard windows. The sweep of learning rates
(a third, once, three times the base) runs for every method at seed 0 and one budget; the rate is chosen on a validation
split of the training data, and figures are of the test split.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import structmat as sm
from benchmarks.convac_study import NOT_RUN, RESULTS, ROOT, Cell, Study, markdown, of_name, spread
from structmat.errors import ShapeError
from structmat.learn.windows import WindowLearner
from structmat.nn import StructuredLinear, WindowedLinear
from structmat.projection.windows import Terms
from structmat.structure import Structure, resolve
from structmat.windows import from_terms

DATA = ROOT.parent / "shared" / "data"
BUDGETS = (0.5, 0.3, 0.2)
SWEPT = 0.3
FACTORS = (1 / 3, 1.0, 3.0)
SEEDS = range(3)
BASE = {"P2": 1e-2, "P3": 3e-3, "P4": 1e-3, "P5": 1e-3}

FIXED: Mapping[str, Callable[[float], Structure]] = {
    "low rank": sm.LowRank,
    "block diagonal + shuffle": lambda share: sm.BlockDiagonal(math.ceil(1 / share - 1e-9)),
    "Monarch": lambda share: sm.Monarch(4, share),
    "BLAST": lambda share: sm.BLAST(4, share),
    "block tensor train": sm.BlockTensorTrain,
}
LEARNED: Mapping[str, dict[str, Any]] = {
    "GBLR frozen": {"frozen": True, "start": "random"},
    "GBLR equal": {"equal": True, "start": "random"},
    "GBLR learned": {"start": "random"},
    "GBLR learned, published start": {"start": "weights"},
}
"""Windows from scratch. The published start, the split of a dense initialisation under full windows, is one more."""

METHODS = ("dense", "dense-small", *FIXED, *LEARNED)


class Shuffled(nn.Module):
    """A structured layer whose outputs are interleaved, so that blocks mix from layer to layer."""

    def __init__(self, layer: StructuredLinear, blocks: int) -> None:
        super().__init__()
        self.layer = layer
        size = -(-layer.out_features // blocks)
        order = torch.arange(size * blocks).reshape(blocks, size).T.flatten()
        self.register_buffer("order", order[order < layer.out_features])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[..., self.order]


def structured(shape: tuple[int, int], method: str, share: float) -> Structure:
    """The largest member within the share; the smallest of its family where none is."""
    try:
        return resolve(FIXED[method](share), shape)
    except ShapeError:
        family = type(FIXED[method](share))
        return resolve(family(rank=1), shape)  # type: ignore[call-arg]


def prepared(
    model: nn.Module, names: list[str], method: str, share: float, steps: int, seed: int, **options: Any
) -> WindowLearner | None:
    """Give the named layers the method's structure, in place."""
    if method in ("dense", "dense-small"):
        return None
    if method in LEARNED:
        return WindowLearner(model, share, steps, layers=names, seed=seed, **{**LEARNED[method], **options})
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        structure = structured((linear.out_features, linear.in_features), method, share)
        made: nn.Module = StructuredLinear(
            linear.in_features, linear.out_features, linear.bias is not None, structure=structure, generator=generator
        )
        if isinstance(structure, sm.BlockDiagonal) and isinstance(made, StructuredLinear):
            made = Shuffled(made, structure.blocks)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    return None


def deployed(model: nn.Module, names: list[str]) -> int:
    """Multiply-adds of the named layers for one row."""
    total = 0
    for name in names:
        layer = model.get_submodule(name)
        layer = layer.layer if isinstance(layer, Shuffled) else layer
        if isinstance(layer, WindowedLinear):
            total += layer.cost
        elif isinstance(layer, StructuredLinear):
            total += layer.matrix.macs
        else:
            assert isinstance(layer, nn.Linear)
            total += layer.weight.numel()
    return total


def train(
    model: nn.Module,
    learner: WindowLearner | None,
    rate: float,
    steps: int,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    decay: float = 0.0,
    recorder: Callable[[int], None] | None = None,
) -> float:
    """AdamW, warm-up over 5 % of the steps, then a cosine; the seconds that it took."""
    optimizer = torch.optim.AdamW(sm.parameter_groups(model, lr=rate, weight_decay=decay))
    warm = max(1, steps // 20)

    def shape(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    start = time.perf_counter()
    model.train()
    for step in range(steps):
        x, y = batch(step)
        value = loss(model(x), y)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if learner is not None:
            learner.step()
        if recorder is not None:
            recorder(step)
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------- P1: planted structure


def planted(kind: str, seed: int, size: int = 64) -> Terms:
    """A matrix of windows: on a grid, off it, or of both kinds with low rank."""
    g = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=g)

    if kind == "block sparse":
        grid = torch.randperm(64, generator=g)[:6]
        rows = [[int(p) // 8 * 8, 8, int(p) % 8 * 8 + j, 1] for p in grid for j in range(8)]
        windows = torch.tensor(rows)
    elif kind == "low rank":
        windows = torch.tensor([[0, size, 0, size]]).repeat(4, 1)
    else:
        windows = torch.stack([ints(0, size, 8), ints(8, 25, 8), ints(0, size, 8), ints(8, 25, 8)], 1)
        if kind == "mixed":
            diagonal = [[8 * i, 8, 8 * i, 8] for i in range(8) for _ in range(2)]
            windows = torch.cat([windows[:4], torch.tensor([[0, size, 0, size], *diagonal])])
    left = torch.randn(len(windows), size, generator=g, dtype=torch.float64)
    right = torch.randn(len(windows), size, generator=g, dtype=torch.float64)
    return Terms(left, right, windows).cropped()


def run_projection(kind: str, seed: int) -> dict[str, Any]:
    """The projection on windows of the planted cost, beside every fixed family of at least that cost."""
    terms = planted(kind, seed)
    weight, (rows, columns) = terms.dense(), terms.totals
    found = {"GBLR": sm.project(weight, sm.GBLR(2 * terms.count, rows, columns)).error}
    for family in (sm.LowRank, sm.BlockDiagonal, sm.Monarch, sm.BLAST, sm.BlockTensorTrain, sm.Einsum, sm.Kronecker):
        members = list(family.configurations((64, 64), math.ceil(1.05 * (rows + columns))))
        if members:
            found[family.__name__] = min(sm.project(weight, member).error for member in members)
    return {"errors": found, "cost": rows + columns}


# ------------------------------------------------------------------------------------------- P2: teacher-student


def run_teacher(method: str, factor: float, seed: int, kind: str = "off-grid", steps: int = 1000) -> dict[str, Any]:
    """A student of planted windows at the teacher's own cost; its error with hard windows."""
    teacher = planted(kind, seed)
    weight, cost = teacher.dense().float(), sum(teacher.totals)
    size = weight.shape[0]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    share = cost / size**2
    options: dict[str, Any] = {"floor": 0.0} if method in LEARNED else {}
    learner = prepared(model, ["0"], method, share, steps, seed, **options)
    if method == "dense-small":
        inner = max(1, cost // (2 * size))
        model = nn.Sequential(nn.Linear(size, inner, bias=False), nn.Linear(inner, size, bias=False))
    g = torch.Generator().manual_seed(seed + 100)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(256, size, generator=g)
        return x, x @ weight.T

    # A base rate is that of a dense layer; for a bare matrix the spec's 1e-2 is used for every tensor alike.
    seconds = train(model, learner, BASE["P2"] * factor, steps, batch, lambda y, t: (y - t).square().mean())
    moved = learner.moved()["0"] if learner is not None else None
    if learner is not None:
        learner.harden()
    with torch.no_grad():
        found = model(torch.eye(size)).T
    error = float((found - weight).norm() / weight.norm())
    spent = deployed(model, ["0"]) if method != "dense-small" else 2 * size * max(1, cost // (2 * size))
    return {"error": error, "share": spent / size**2, "asked": share, "moved": moved, "training_seconds": seconds}


# ------------------------------------------------------------------------------------------------ P5: perceptron


@functools.cache
def mnist() -> dict[str, Tensor]:
    """Images as (n, 784) in -1 .. 1, labels."""
    data = np.load(DATA / "mnist" / "mnist.npz")
    found = {}
    for name in data.files:
        value = torch.from_numpy(np.asarray(data[name]))
        found[name] = (value.float().flatten(1) / 127.5 - 1) if name.startswith("x") else value.long()
    if float(found["x_train"].max()) <= -0.98:  # stored in 0 .. 1
        for name in ("x_train", "x_test"):
            found[name] = (found[name] + 1) * 255 - 1
    return found


VALIDATION = 5000
HIDDEN = 256
P5_STEPS = 400
LAYERS = ["0", "2"]


def perceptron(hidden: int) -> nn.Sequential:
    """Two hidden layers; the output layer stays dense."""
    return nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def small_width(share: float) -> int:
    """The hidden width at which the replaced layers take that share of the multiply-adds."""
    wanted = share * (784 * HIDDEN + HIDDEN**2)
    return int((-784 + math.sqrt(784**2 + 4 * wanted)) / 2)


def images(seed: int, size: int = 128) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of the training part, the same for every method."""
    data = mnist()
    count = len(data["x_train"]) - VALIDATION
    g = torch.Generator().manual_seed(1000 + seed)
    order: list[Tensor] = []

    def batch(step: int) -> tuple[Tensor, Tensor]:
        if not order:
            order.extend(torch.randperm(count, generator=g).split(size))
        which = order.pop()
        return data["x_train"][which], data["y_train"][which]

    return batch


def accuracy(model: nn.Module, part: str) -> float:
    """Percent right, on the validation or the test split."""
    data = mnist()
    x, y = (
        (data["x_train"][-VALIDATION:], data["y_train"][-VALIDATION:])
        if part == "validation"
        else (data["x_test"], data["y_test"])
    )
    model.eval()
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def run_perceptron(method: str, share: float, factor: float | None, seed: int, **options: Any) -> dict[str, Any]:
    """Train from scratch; accuracy with hard windows."""
    torch.manual_seed(seed)
    model = perceptron(small_width(share) if method == "dense-small" else HIDDEN)
    learner = prepared(model, LAYERS, method, share, P5_STEPS, seed, **options)
    rate = BASE["P5"] * (chosen("P5", method) if factor is None else factor)
    seconds = train(model, learner, rate, P5_STEPS, images(seed), F.cross_entropy, decay=0.0)
    moved = None if learner is None else learner.moved()
    if learner is not None:
        learner.harden()
    dense = 784 * HIDDEN + HIDDEN**2
    return {
        "test": accuracy(model, "test"),
        "validation": accuracy(model, "validation"),
        "share": deployed(model, LAYERS) / dense,
        "per_layer": [deployed(model, [n]) for n in LAYERS],
        "rate": rate,
        "moved": moved,
        "training_seconds": seconds,
    }


def chosen(task: str, method: str) -> float:
    """The factor of the base rate with the best validation score in the sweep; 1 where the sweep was not run."""
    found = {}
    done = STUDY.done()
    for factor in FACTORS:
        key = Cell(sweep_name(task, method, factor), lambda seed: {}, 0).key
        if key in done:
            found[factor] = done[key]["validation"]
    return max(found, key=lambda f: found[f]) if found else 1.0


def sweep_name(task: str, method: str, factor: float) -> str:
    return f"{task} sweep {method} x{factor:.2g}"


# ---------------------------------------------------------------------------------- P6: compress a trained model


def trained(seed: int) -> nn.Sequential:
    """The dense perceptron, trained."""
    torch.manual_seed(seed)
    model = perceptron(HIDDEN)
    path = ROOT / "build" / "learned_study" / f"perceptron_{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    train(model, None, BASE["P5"], P5_STEPS, images(seed), F.cross_entropy)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def run_compressed(method: str, share: float, seed: int) -> dict[str, Any]:
    """The trained dense perceptron, its layers projected; before and after 200 steps of recovery on labels."""
    model = trained(seed)
    original = accuracy(model, "test")
    learner = None
    steps = 200
    if method == "GBLR, windows moving":
        learner = WindowLearner(
            model, share, steps, layers=LAYERS, start="projected", start_budget=share, rate=2e-3, seed=seed, settle=0.1
        )
    else:
        for name in LAYERS:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            shape = (linear.out_features, linear.in_features)
            structure = sm.GBLR(share) if method == "GBLR" else structured(shape, method, share)
            setattr(model, name, StructuredLinear.from_linear(linear, structure, sweeps=8))
    before = accuracy(model, "test")
    train(model, learner, BASE["P5"] / 3, steps, images(seed + 50), F.cross_entropy)
    if learner is not None:
        learner.harden()
    dense = 784 * HIDDEN + HIDDEN**2
    return {
        "original": original,
        "before": before,
        "after": accuracy(model, "test"),
        "share": deployed(model, LAYERS) / dense,
    }


# --------------------------------------------------------------------------------------- P3, P4: transformers


class Block(nn.Module):
    """Pre-norm attention and a perceptron; queries, keys and values are layers of their own."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        h = self.norm1(x)
        q, k, v = (
            f(h).view(batch, length, self.heads, width // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return result


class CharacterGPT(nn.Module):
    """A small language model of characters."""

    def __init__(self, symbols: int, width: int = 128, depth: int = 2, context: int = 64) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(context, width)
        nn.init.normal_(self.symbols.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, 4, True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.symbols(x) + self.places.weight[: x.shape[1]]
        result: Tensor = self.head(self.norm(self.blocks(h)))
        return result


class VisionTransformer(nn.Module):
    """A small classifier of 32 x 32 images in patches of 4."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(torch.randn(64, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        result: Tensor = self.head(self.norm(self.blocks(h)).mean(1))
        return result


def block_layers(model: nn.Module) -> list[str]:
    """The linear layers inside of blocks: those that are replaced."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")]


@functools.cache
def characters() -> tuple[Tensor, int]:
    """Tiny Shakespeare as numbers, and how many characters there are."""
    text = (DATA / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    known = sorted(set(text))
    table = {c: i for i, c in enumerate(known)}
    return torch.tensor([table[c] for c in text]), len(known)


P3_STEPS, P3_BATCH, CONTEXT = 500, 16, 64


def run_gpt(method: str, share: float, factor: float | None, seed: int) -> dict[str, Any]:
    """Nats per character on the last tenth of the text."""
    text, symbols = characters()
    edge = len(text) * 9 // 10
    torch.manual_seed(seed)
    width = 128
    if method == "dense-small":
        width = 4 * round(128 * share**0.5 / 4)
    model: nn.Module = CharacterGPT(symbols, width)
    names = block_layers(model)
    dense = sum(model.get_submodule(n).weight.numel() for n in names) if width == 128 else 2 * 12 * 128 * 128  # type: ignore[union-attr,operator]
    learner = prepared(model, names, method, share, P3_STEPS, seed)
    g = torch.Generator().manual_seed(1000 + seed)
    cut = edge * 19 // 20

    def batch(step: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(0, cut - CONTEXT - 1, (P3_BATCH,), generator=g)
        rows = torch.stack([text[s : s + CONTEXT + 1] for s in starts])
        return rows[:, :-1], rows[:, 1:]

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    rate = BASE["P3"] * (chosen("P3", method) if factor is None else factor)
    seconds = train(model, learner, rate, P3_STEPS, batch, loss, decay=0.1)
    if learner is not None:
        learner.harden()

    def nats(first: int, last: int) -> float:
        model.eval()
        rows = text[first : first + (last - first - 1) // CONTEXT * CONTEXT + 1]
        x, y = rows[:-1].view(-1, CONTEXT)[:800], rows[1:].view(-1, CONTEXT)[:800]
        with torch.no_grad():
            return float(loss(model(x), y))

    return {
        "test": nats(edge, len(text)),
        "validation": -nats(cut, edge),  # chosen() takes the largest
        "share": deployed(model, names) / dense,
        "rate": rate,
        "training_seconds": seconds,
    }


def run_vit(method: str, share: float, seed: int) -> dict[str, Any]:
    """Percent right on CIFAR-10 after ten passes, random crops and flips."""
    files = {k: torch.from_numpy(v) for k, v in np.load(next((DATA / "cifar10").glob("*.npz"))).items()}
    x_train, x_test = (files[k].permute(0, 3, 1, 2).float() / 127.5 - 1 for k in ("x_train", "x_test"))
    y_train, y_test = files["y_train"].flatten().long(), files["y_test"].flatten().long()
    torch.manual_seed(seed)
    model: nn.Module = VisionTransformer(4 * round(128 * share**0.5 / 4) if method == "dense-small" else 128)
    names = block_layers(model)
    steps = 10 * len(x_train) // 128
    learner = prepared(model, names, method, share, steps, seed)
    g = torch.Generator().manual_seed(1000 + seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        which = torch.randint(0, len(x_train), (128,), generator=g)
        x = F.pad(x_train[which], (4, 4, 4, 4))
        i, j = torch.randint(0, 9, (2,), generator=g).tolist()
        x = x[:, :, i : i + 32, j : j + 32]
        return (x.flip(3) if int(torch.randint(0, 2, (1,), generator=g)) else x), y_train[which]

    seconds = train(model, learner, BASE["P4"], steps, batch, F.cross_entropy, decay=0.05)
    if learner is not None:
        learner.harden()
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(x_test.split(500), y_test.split(500), strict=True)
        )
    return {
        "test": 100 * right / len(x_test),
        "share": deployed(model, names) / (4 * 12 * 128 * 128),
        "training_seconds": seconds,
    }


# --------------------------------------------------------------------------------------------------- the costs


def best_time(run: Callable[[], object], seconds: float = 0.6) -> float:
    """The least of repeated times after one more."""
    run()
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def run_step_cost(seed: int) -> dict[str, Any]:
    """A step of training at n = 1024, batch 256, n / 2 terms: full windows, then at shares of the dense cost."""
    torch.manual_seed(seed)
    n, rows = 1024, 256
    x = torch.randn(rows, n)

    def step_of(model: nn.Module, learner: WindowLearner | None) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

        def step() -> None:
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if learner is not None:
                learner.step()

        step.optimizer = optimizer  # type: ignore[attr-defined]
        return step

    def numbers(model: nn.Module, step: Any) -> int:
        """Numbers kept between steps: parameters, gradients and the optimizer's moments."""
        held = sum(p.numel() * 2 for p in model.parameters())
        return held + sum(t.numel() for s in step.optimizer.state.values() for t in s.values())

    dense = nn.Sequential(nn.Linear(n, n))
    step = step_of(dense, None)
    found: dict[str, Any] = {"dense": {"milliseconds": 1e3 * best_time(step), "numbers": numbers(dense, step)}}
    for share in (1.0, 0.5, 0.25, 0.125):
        model = nn.Sequential(nn.Linear(n, n))
        learner = WindowLearner(model, 1.0, 10**6, terms=0.5, snapshots=0, rate=1e-9)
        layer = learner.layers["0"]
        step = step_of(model, learner)
        step()
        with torch.no_grad():
            layer.widths.fill_(share)
        if share < 1:
            layer.compact(16, step.optimizer)  # type: ignore[attr-defined]
            learner._squares["0"] = torch.zeros(4, layer.terms)
        learner.step_count = 10**6 - 10**5  # the blur of the end of training
        learner._sharpen()
        found[f"windows at {share:g}"] = {
            "milliseconds": 1e3 * best_time(step),
            "numbers": numbers(model, step),
            "share": layer.cost / n**2,
        }
    return {"steps": found}


def run_speed(width: int, seed: int, n: int = 1024) -> dict[str, Any]:
    """Hardened windows of that mean width, frozen for each batch size, against the dense layer."""
    g = torch.Generator().manual_seed(seed)
    terms = n // 4 if width >= 128 else n // 2
    sizes = torch.randint(width // 2, width + width // 2 + 1, (terms, 2), generator=g)
    places = torch.randint(0, n, (terms, 2), generator=g)
    windows = torch.stack([places[:, 0], sizes[:, 0], places[:, 1], sizes[:, 1]], 1)
    contents = torch.randn(2, terms, n, generator=g)
    layer = StructuredLinear.from_matrix(from_terms(Terms(contents[0], contents[1], windows).cropped()))
    dense = layer.to_linear()
    share = layer.matrix.macs / n**2
    found = {}
    for rows in (1, 64, 1024):
        frozen = layer.freeze(rows)
        x = torch.randn(rows, n, generator=g)
        with torch.inference_mode():
            first, second = best_time(functools.partial(dense, x)), best_time(functools.partial(frozen, x))
        found[str(rows)] = {
            "dense": 1e6 * first,
            "structured": 1e6 * second,
            "ratio": second / first,
            "efficiency": share * first / second,
        }
    return {"share": share, "mean_width": float(sizes.double().mean()), "microseconds": found}


# ---------------------------------------------------------------------------------------------------- the study


def cells() -> list[Cell]:
    """In the order in which they are run."""
    found: list[Cell] = []
    for seed in SEEDS:
        for kind in ("block sparse", "mixed", "off-grid", "low rank"):
            found.append(Cell(f"P1 {kind}", functools.partial(run_projection, kind), seed))
    found.append(Cell("step cost", run_step_cost))
    found += [Cell(f"speed width {width}", functools.partial(run_speed, width)) for width in (16, 64, 128, 256)]
    for seed in SEEDS:
        for method in METHODS:
            if method != "dense":
                found.append(Cell(f"P2 {method}", functools.partial(run_teacher, method, 1.0), seed))
    for factor in FACTORS[::2]:
        for method in METHODS:
            if method != "dense":
                name = f"P2 {method} x{factor:.2g}"
                found.append(Cell(name, functools.partial(run_teacher, method, factor)))
    for factor in FACTORS:
        for method in METHODS:
            run = functools.partial(run_perceptron, method, SWEPT, factor)
            found.append(Cell(sweep_name("P5", method, factor), run))
    for seed in SEEDS:
        for share in BUDGETS:
            for method in METHODS:
                if method == "dense" and share != BUDGETS[0]:
                    continue
                run = functools.partial(run_perceptron, method, share, None)
                found.append(Cell(f"P5 {method} {share:g}", run, seed))
    for seed in SEEDS:
        for share in BUDGETS:
            for method in (*FIXED, "GBLR", "GBLR, windows moving"):
                if method == "block diagonal + shuffle":
                    continue
                found.append(Cell(f"P6 {method} {share:g}", functools.partial(run_compressed, method, share), seed))
    for factor in FACTORS:
        for method in METHODS:
            run = functools.partial(run_gpt, method, SWEPT, factor)
            found.append(Cell(sweep_name("P3", method, factor), run, extra=True))
    for seed in SEEDS:
        for share in BUDGETS:
            for method in METHODS:
                if method == "dense" and share != BUDGETS[0]:
                    continue
                run = functools.partial(run_gpt, method, share, None)
                found.append(Cell(f"P3 {method} {share:g}", run, seed, extra=True))
    for seed in SEEDS:
        for method in METHODS:
            found.append(Cell(f"P4 {method} 0.3", functools.partial(run_vit, method, 0.3), seed, extra=True))
    return found


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    """Markdown of everything."""
    lines = ["## Planted structure, by projection (relative error)", ""]
    families = ("GBLR", "LowRank", "BlockDiagonal", "Monarch", "BLAST", "BlockTensorTrain", "Einsum", "Kronecker")
    rows = []
    for kind in ("block sparse", "mixed", "off-grid", "low rank"):
        found = of_name(done, STUDY.cells, f"P1 {kind}")
        rows.append([kind, *(spread([f["errors"][k] for f in found if k in f["errors"]], ".3g") for k in families)])
    lines += [*markdown(("planted", *families), rows), ""]
    lines += ["Every family may take 5 % more than the planted cost, GBLR takes that cost exactly.", ""]
    lines += ["## Teacher and student (P2): relative error with hard windows", ""]
    rows = []
    for method in METHODS[1:]:
        found = of_name(done, STUDY.cells, f"P2 {method}")
        others = [of_name(done, STUDY.cells, f"P2 {method} x{f:.2g}") for f in FACTORS[::2]]
        moved = [f["moved"] for f in found if f["moved"] is not None]
        rows.append(
            [
                method,
                spread([f["error"] for f in found], ".3f"),
                spread([f["share"] for f in found], ".3f"),
                *(spread([f["error"] for f in o], ".3f") for o in others),
                spread(moved, ".3f") if moved else "—",
                spread([f["training_seconds"] for f in found], ".1f"),
            ]
        )
    head = ("method", "error", "share of dense", "rate / 3 (seed 0)", "rate x 3 (seed 0)", "moved", "seconds")
    lines += [*markdown(head, rows), ""]
    lines += ["## Perceptron on MNIST (P5): percent right on the test split", ""]
    rows = []
    for method in METHODS:
        row = [method]
        for share in BUDGETS:
            found = of_name(done, STUDY.cells, f"P5 {method} {share:g}")
            if method == "dense" and share != BUDGETS[0]:
                row.append("—")
                continue
            took = f" ({statistics.fmean(f['share'] for f in found):.3f})" if found else ""
            row.append(spread([f["test"] for f in found]) + took)
        swept = [of_name(done, STUDY.cells, sweep_name("P5", method, f)) for f in FACTORS]
        row.append(", ".join(spread([f["validation"] for f in s]) for s in swept))
        found = of_name(done, STUDY.cells, f"P5 {method} {BUDGETS[0]:g}")
        row.append(spread([f["training_seconds"] for f in found], ".1f"))
        rows.append(row)
    head = ("method", *(f"{b:.0%}" for b in BUDGETS), "validation at rates / 3, x 1, x 3 (30 %, seed 0)", "seconds")
    lines += [*markdown(head, rows), ""]
    lines += [
        "In brackets the share of the dense multiply-adds that is deployed. The rate is the best of the sweep.",
        "",
    ]
    lines += ["## The trained perceptron compressed (P6): before and after 200 steps of recovery", ""]
    rows = []
    for method in (*FIXED, "GBLR", "GBLR, windows moving"):
        if method == "block diagonal + shuffle":
            continue
        row = [method]
        for share in BUDGETS:
            found = of_name(done, STUDY.cells, f"P6 {method} {share:g}")
            pair = [spread([f[k] for f in found]) for k in ("before", "after")]
            row.append(" → ".join(pair) if found else NOT_RUN)
        rows.append(row)
    lines += [*markdown(("method", *(f"{b:.0%}" for b in BUDGETS)), rows), ""]
    lines += ["## Character GPT (P3): nats per character", ""]
    rows = []
    for method in METHODS:
        row = [method]
        for share in BUDGETS:
            found = of_name(done, STUDY.cells, f"P3 {method} {share:g}")
            row.append(spread([f["test"] for f in found], ".3f"))
        swept = [of_name(done, STUDY.cells, sweep_name("P3", method, f)) for f in FACTORS]
        row.append(", ".join(spread([-f["validation"] for f in s], ".3f") for s in swept))
        rows.append(row)
    lines += [*markdown(("method", *(f"{b:.0%}" for b in BUDGETS), "validation in the sweep"), rows), ""]
    lines += ["## Vision transformer on CIFAR-10 (P4), 30 %", ""]
    rows = [[method, spread([f["test"] for f in of_name(done, STUDY.cells, f"P4 {method} 0.3")])] for method in METHODS]
    lines += [*markdown(("method", "percent right"), rows), ""]
    lines += ["## A step of training, n = 1024, batch 256, 512 terms", ""]
    found = of_name(done, STUDY.cells, "step cost")
    if found:
        steps = found[0]["steps"]
        base = steps["dense"]
        rows = [
            [
                name,
                f"{s['milliseconds']:.1f}",
                f"{s['milliseconds'] / base['milliseconds']:.2f}",
                f"{s['numbers'] / base['numbers']:.2f}",
            ]
            for name, s in steps.items()
        ]
        lines += [*markdown(("layer", "milliseconds", "of dense", "numbers kept, of dense"), rows), ""]
    else:
        lines += [NOT_RUN, ""]
    lines += ["## Hardened windows, n = 1024, float32: time of the dense layer, and efficiency", ""]
    rows = []
    for width in (16, 64, 128, 256):
        for f in of_name(done, STUDY.cells, f"speed width {width}"):
            rows.append(
                [
                    str(width),
                    f"{f['share']:.3f}",
                    *(f"{t['ratio']:.2f} ({t['efficiency']:.2f})" for t in f["microseconds"].values()),
                ]
            )
    lines += markdown(("mean width", "share of dense", "batch 1", "batch 64", "batch 1024"), rows)
    lines += [
        "",
        "Time as a multiple of the dense layer's; in brackets the efficiency, share of dense by that multiple.",
    ]
    return lines


STUDY = Study("learned_study", "Learned windows beside fixed structures", cells(), tables)


def pictures() -> None:
    """Film strip, budgets and quality over cost of one run, beside the tables."""
    from structmat.learn.pictures import budget_per_layer, film_strip, quality_against_cost

    folder = RESULTS / "learned_study"
    done = STUDY.done()
    points = {
        method: [
            (statistics.fmean(f["share"] for f in found), statistics.fmean(f["test"] for f in found))
            for share in BUDGETS
            if (found := of_name(done, STUDY.cells, f"P5 {method} {share:g}"))
        ]
        for method in METHODS
    }
    if not any(points.values()):
        return
    text = quality_against_cost({m: p for m, p in points.items() if p}, "percent right on MNIST")
    (folder / "frontier.svg").write_text(text, encoding="utf-8")
    if (folder / "film.svg").exists():
        return
    torch.manual_seed(0)
    model = perceptron(HIDDEN)
    learner = prepared(model, LAYERS, "GBLR learned", 0.2, P5_STEPS, 0)
    assert learner is not None
    train(model, learner, BASE["P5"], P5_STEPS, images(0), F.cross_entropy)
    shapes = {n: layer.sizes for n, layer in learner.layers.items()}
    (folder / "film.svg").write_text(film_strip(learner.history, "0", shapes["0"]), encoding="utf-8")
    (folder / "budgets.svg").write_text(budget_per_layer(learner.history, shapes), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    STUDY.main()
    if "list" not in sys.argv:
        pictures()
