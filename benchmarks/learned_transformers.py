"""Small transformers: a language model of characters (P3) and a classifier of images (P4), with each structure."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import structmat as sm
from benchmarks import kronecker_data
from benchmarks.learned_common import (
    BASE,
    Shuffled,
    chosen,
    deployed,
    kept,
    prepared,
    project,
    train,
)
from benchmarks.real_models import DATA, require_data


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
    """A small classifier of 32 x 32 images in patches of 8."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.places = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        result: Tensor = self.head(self.norm(self.blocks(h)).mean(1))
        return result


def block_layers(model: nn.Module) -> list[str]:
    """The linear layers inside of blocks: those that are replaced."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")]


WIDTH = 128


def start_small(model: nn.Module, names: list[str]) -> None:
    """The layers that write to the residual stream begin 1 / sqrt(2 blocks) times as large, as GPT-2's do. Without it
    500 steps of the language model say more about the start than about the structure."""
    writers = [name for name in names if name.endswith((".o", ".fc2"))]
    for name in writers:
        layer = model.get_submodule(name)
        sm.nn.scale_(layer.layer if isinstance(layer, Shuffled) else layer, len(writers) ** -0.5)


def _width(method: str, share: float) -> int:
    """At which the layers of all blocks take the share of the multiply-adds, for the small dense network."""
    return 4 * round(WIDTH * share**0.5 / 4) if method == "dense-small" else WIDTH


def _share(model: nn.Module, names: list[str]) -> float:
    """Multiply-adds of the blocks' layers, of those of dense ones (12 squares of the width a block)."""
    blocks = len({name.split(".")[1] for name in names})
    return deployed(model, names) / (12 * blocks * WIDTH**2)


# ---------------------------------------------------------------------------------------- P3: a language model

P3_STEPS, P3_BATCH, CONTEXT = 500, 16, 64
P3_DECAY = 0.1
RECOVERY_STEPS = 200


@functools.cache
def characters() -> tuple[Tensor, int]:
    """Tiny Shakespeare as numbers, and how many characters there are."""
    require_data()
    text = (DATA / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    known = sorted(set(text))
    table = {c: i for i, c in enumerate(known)}
    return torch.tensor([table[c] for c in text]), len(known)


def parts() -> tuple[Tensor, Tensor, Tensor]:
    """To train on, to choose rates on, and the last tenth to judge by."""
    text, _ = characters()
    edge = len(text) * 9 // 10
    cut = edge * 19 // 20
    return text[:cut], text[cut:edge], text[edge:]


def excerpts(seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of the training part: characters and the ones that follow, the same for every method."""
    text = parts()[0]
    generator = torch.Generator().manual_seed(seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(0, len(text) - CONTEXT - 1, (P3_BATCH,), generator=generator)
        rows = torch.stack([text[s : s + CONTEXT + 1] for s in starts])
        return rows[:, :-1], rows[:, 1:]

    return batch


def character_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Nats per character."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def nats(model: nn.Module, text: Tensor) -> float:
    """Per character, on the first 800 windows of a text."""
    model.eval()
    rows = text[: (len(text) - 1) // CONTEXT * CONTEXT + 1]
    x, y = rows[:-1].view(-1, CONTEXT)[:800], rows[1:].view(-1, CONTEXT)[:800]
    with torch.no_grad():
        return float(character_loss(model(x), y))


def run_gpt(method: str, share: float, factor: float | None, seed: int) -> dict[str, Any]:
    """Train from scratch; nats per character with hard windows."""
    torch.manual_seed(seed)
    model: nn.Module = CharacterGPT(characters()[1], _width(method, share))
    names = block_layers(model)
    learner = prepared(model, names, method, share, P3_STEPS, seed)
    start_small(model, names)
    rate = BASE["P3"] * (chosen("P3", method) if factor is None else factor)
    seconds = train(model, learner, rate, P3_STEPS, excerpts(1000 + seed), character_loss, decay=P3_DECAY)
    if learner is not None:
        learner.harden()
    _, validation, test = parts()
    return {
        "test": nats(model, test),
        "validation": -nats(model, validation),  # chosen() takes the largest
        "share": _share(model, names),
        "rate": rate,
        "training_seconds": seconds,
    }


def trained_gpt(seed: int) -> CharacterGPT:
    """The dense one, trained."""
    torch.manual_seed(seed)
    model = CharacterGPT(characters()[1], WIDTH)
    rate = BASE["P3"] * chosen("P3", "dense")

    def training() -> None:
        start_small(model, block_layers(model))
        train(model, None, rate, P3_STEPS, excerpts(1000 + seed), character_loss, decay=P3_DECAY)

    kept(f"characters_{seed}", model, training)
    return model


def run_gpt_compressed(method: str, share: float, seed: int) -> dict[str, Any]:
    """The trained dense one, its layers projected; before and after recovery on the text."""
    model = trained_gpt(seed)
    names = block_layers(model)
    test = parts()[2]
    original = nats(model, test)
    learner = project(model, names, method, share, RECOVERY_STEPS, seed)
    before = nats(model, test)
    train(model, learner, BASE["P3"] / 3, RECOVERY_STEPS, excerpts(2000 + seed), character_loss)
    if learner is not None:
        learner.harden()
    return {"original": original, "before": before, "after": nats(model, test), "share": _share(model, names)}


# ---------------------------------------------------------------------------------------- P4: images in patches

P4_STEPS, P4_BATCH = 2000, 128
P4_SWEEP_STEPS = 500
IMAGES, HELD_IMAGES = 50_000, 5_000
"""Of the training split; the last ones are for choosing rates."""


def crops(seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of training images in -1 .. 1, moved by up to 4 pixels and mirrored by chance."""
    data = kronecker_data.cifar10("train", IMAGES).part(0, IMAGES - HELD_IMAGES)
    generator = torch.Generator().manual_seed(seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        which = torch.randint(0, len(data), (P4_BATCH,), generator=generator)
        x = F.pad(2 * data.x[which] - 1, (4, 4, 4, 4))
        i, j = torch.randint(0, 9, (2,), generator=generator).tolist()
        x = x[:, :, i : i + 32, j : j + 32]
        return (x.flip(3) if int(torch.randint(0, 2, (1,), generator=generator)) else x), data.y[which]

    return batch


def percent_right(model: nn.Module, images: kronecker_data.Samples) -> float:
    """Of images in 0 .. 1."""
    model.eval()
    right = 0
    with torch.no_grad():
        for x, y in zip(images.x.split(500), images.y.split(500), strict=True):
            right += int((model(2 * x - 1).argmax(1) == y).sum())
    return 100 * right / len(images)


def run_vit(method: str, share: float, factor: float | None, seed: int) -> dict[str, Any]:
    """Train from scratch; percent right with hard windows. Rates are swept in a quarter of the steps."""
    torch.manual_seed(seed)
    model: nn.Module = VisionTransformer(_width(method, share))
    names = block_layers(model)
    steps = P4_STEPS if factor is None else P4_SWEEP_STEPS
    learner = prepared(model, names, method, share, steps, seed)
    start_small(model, names)
    rate = BASE["P4"] * (chosen("P4", method) if factor is None else factor)
    seconds = train(model, learner, rate, steps, crops(1000 + seed), F.cross_entropy, decay=0.05)
    if learner is not None:
        learner.harden()
    return {
        "test": percent_right(model, kronecker_data.cifar10("test")),
        "validation": percent_right(model, kronecker_data.cifar10("train", IMAGES).part(IMAGES - HELD_IMAGES, IMAGES)),
        "share": _share(model, names),
        "rate": rate,
        "steps": steps,
        "moved": None if learner is None else statistics.fmean(learner.moved().values()),
        "training_seconds": seconds,
    }
