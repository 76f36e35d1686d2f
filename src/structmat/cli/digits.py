"""The demo's data and model: handwritten digits and a small transformer that reads their rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from structmat.compression.progress import Progress


@dataclass(frozen=True)
class Images:
    """``pixels`` (count, 8, 8) between 0 and 1, and ``labels`` (count,)."""

    pixels: Tensor
    labels: Tensor

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.pixels.split(size), self.labels.split(size), strict=True))


def digits(seed: int) -> tuple[Images, Images]:
    """1,297 digits to train on and 500 to test, of the 1,797 of scikit-learn (UCI optical recognition)."""
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    pixels = torch.from_numpy(data.images).float()[order] / 16
    labels = torch.from_numpy(data.target).long()[order]
    return Images(pixels[500:], labels[500:]), Images(pixels[:500], labels[:500])


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_attention(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm_mlp(x))))
        return y


class RowReader(nn.Module):
    """A transformer whose tokens are the eight rows of an image."""

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels) + self.place
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def trained(data: Images, seed: int, epochs: int = 25) -> RowReader:
    """The model after AdamW, about ten seconds on one core; the caller's random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RowReader()
        steps = list(_shuffled(data, epochs, 64))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=len(steps))
        with Progress(True) as progress:
            for pixels, labels in progress.track(steps, "train"):
                loss = F.cross_entropy(model(pixels), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def _shuffled(data: Images, epochs: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        order = torch.randperm(len(data.labels))
        for part in order.split(size):
            yield data.pixels[part], data.labels[part]


def accuracy(model: nn.Module, data: Images) -> float:
    """The share of labels that the model gets right."""
    with torch.inference_mode():
        return float((model(data.pixels).argmax(-1) == data.labels).float().mean())
