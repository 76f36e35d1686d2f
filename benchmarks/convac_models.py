"""The trained networks of the studies of convolutional arithmetic circuits, and what they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, NAdam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.convac_data import Images, masks
from benchmarks.study import track
from structmat.nn import ConvAC, ModeTree, TensorialMixture
from structmat.nn.convac.initialize import fit_mixture
from structmat.nn.convac.representation import GaussianRepresentation, Patches
from structmat.nn.convac.semiring import Plain
from structmat.nn.convac.training import (
    Classifier,
    classifier,
    constant_then_linear,
    discriminative_optimizer,
    fit,
    generative_optimizer,
    marginalize,
)

BATCH = 128
PATCHES_FITTED = 40_000


def sampled_patches(patches: Tensor, generator: torch.Generator, count: int = PATCHES_FITTED) -> Tensor:
    """Random complete patches (count, size) of (images, size, N)."""
    flat = patches.transpose(1, 2).flatten(0, 1)
    complete = flat[~flat.isnan().any(1)]
    return complete[torch.randint(len(complete), (count,), generator=generator)]


# ---------------------------------------------------------------------------------------------------- generative


def mixture(train: Images, kind: str, seed: int, *, hidden: bool = False) -> tuple[TensorialMixture, Patches]:
    """The published mixtures for MNIST: ``"deep"`` (GHT) or ``"shallow"`` (GCP), their leaves fitted to patches.

    ``hidden``: marginalise half of the locations after the first level in training.
    """
    generator = torch.Generator().manual_seed(seed)
    cut = Patches(2, padding=2) if kind == "deep" else Patches(4, padding=2)
    fitted = sampled_patches(cut(train.x[:10_000]), generator)
    channels = 32 if kind == "deep" else 200
    leaves = GaussianRepresentation.from_mixture(fit_mixture(fitted, channels, generator=generator))
    if kind == "deep":
        chance = (0.5,) if hidden else ()
        tree = ModeTree.square(16, 16)
        model = TensorialMixture(
            leaves, tree, (64, 128, 256, 512), 10, hidden_marginalization=chance, generator=generator
        )
    else:
        # One product of mixtures for each class: ten terms, and a weight from each class to its own one at most.
        model = TensorialMixture(
            leaves, ModeTree.square(8, 8).truncated(1), 10, 10, sharing="unshared", generator=generator
        )
        with torch.no_grad():
            model.network.output.weights.weight.copy_(20 * torch.eye(10))
        model.network.output.weights.weight.requires_grad_(False)
    return model, cut


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Nadam 0.975": lambda p: NAdam(p, lr=0.03, betas=(0.975, 0.999), eps=1e-16),
    "Nadam 0.975, constant momentum": lambda p: NAdam(p, lr=0.03, betas=(0.975, 0.999), eps=1e-16, momentum_decay=0.0),
    "Adam 0.9": lambda p: Adam(p, lr=0.03, betas=(0.9, 0.999)),
    "Adam 0.975": lambda p: Adam(p, lr=0.03, betas=(0.975, 0.999)),
}
"""What might train mixtures; the first is published, the third the library's default."""


def train_mixture(
    model: TensorialMixture, cut: Patches, train: Images, steps: int, seed: int, *, generative: float = 0.01,
    how: str | None = None, rate: float = 0.03, missing: float | None = None,
) -> list[float]:  # fmt: skip
    """By gradient; the losses.

    ``how``: one of :data:`OPTIMIZERS` in place of the library's; ``rate``: of the latter. ``missing``: the share of
    pixels that are marginalised, by default the library's: drawn anew, uniformly, for each image.
    """
    optimizer, schedule = generative_optimizer(model, steps, rate=rate)
    if how is not None:
        optimizer = OPTIMIZERS[how]([p for p in model.parameters() if p.requires_grad])
        schedule = LambdaLR(optimizer, constant_then_linear(steps))
    generator = torch.Generator().manual_seed(seed + 1)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return model.loss(cut(marginalize(x, missing, generator=generator)), y, generative=generative)

    batches = track(train.batches(steps, BATCH, seed), steps, f"training, {steps} steps")
    return fit(model, loss, batches, optimizer, schedule, clip=None)


@torch.no_grad()
def mixture_figures(
    model: TensorialMixture, cut: Patches, test: Images, seed: int, chosen: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Accuracy in per cent and the mean log-likelihood of what is observed, for each mask or for the chosen ones."""
    model.eval()

    def classify(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        scores = model(cut(torch.where(seen, x, math.nan)))
        return scores.argmax(1), scores.logsumexp(1) - math.log(10)

    return under_masks(classify, test, seed, chosen)


def under_masks(
    classify: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    test: Images,
    seed: int,
    chosen: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    """``classify(images, observed)`` gives classes and a number that is averaged."""
    accuracy, number = dict[str, float](), dict[str, float]()
    for name, seen in masks(len(test.x), seed):
        if chosen is not None and name not in chosen:
            continue
        right, total = 0, 0.0
        for x, y, s in zip(test.x.split(500), test.y.split(500), seen.split(500), strict=True):
            found, value = classify(x, s)
            right, total = right + int((found == y).sum()), total + float(value.sum())
        accuracy[name], number[name] = 100 * right / len(test.x), total / len(test.x)
    return {"accuracy": accuracy, "log_likelihood": number}


# ----------------------------------------------------------------------------------------------------- baselines


def convnet() -> nn.Module:
    """Two layers of 5 x 5 kernels and one hidden layer: about as many parameters as the deep shared network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 60), nn.ReLU(), nn.Linear(60, 10),
    )  # fmt: skip


def train_classifier(model: nn.Module, prepare: Callable[[Tensor], Tensor], train: Images, steps: int, seed: int,
                     *, rate: float = 3e-3) -> list[float]:  # fmt: skip
    """Cross-entropy with the library's default schedule; the losses."""
    optimizer, schedule = discriminative_optimizer(model, steps, rate=rate)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(prepare(x)), y)

    batches = track(train.batches(steps, BATCH, seed), steps, f"training, {steps} steps")
    return fit(model, loss, batches, optimizer, schedule)


@torch.no_grad()
def accuracy(model: nn.Module, prepare: Callable[[Tensor], Tensor], test: Images) -> float:
    """In per cent."""
    model.eval()
    parts = zip(test.x.split(500), test.y.split(500), strict=True)
    return 100 * sum(int((model(prepare(x)).argmax(1) == y).sum()) for x, y in parts) / len(test.x)


@torch.no_grad()
def imputed_figures(model: nn.Module, train: Images, test: Images, how: str, seed: int) -> dict[str, dict[str, float]]:
    """A classifier of whole images where missing pixels get the background or the mean of training images."""
    model.eval()
    value = torch.tensor(-0.5) if how == "background" else train.x.mean(0)

    def classify(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        found = model(torch.where(seen, x, value)).argmax(1)
        return found, torch.zeros(len(x))

    return under_masks(classify, test, seed)


@torch.no_grad()
def neighbor_figures(train: Images, test: Images, seed: int, neighbors: int = 5) -> dict[str, dict[str, float]]:
    """The majority of the nearest training images, by the squared distance over observed pixels."""
    known, labels = train.x.flatten(1), F.one_hot(train.y, 10)
    squares = known.square()

    def classify(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        shown = seen.flatten(1).float()
        distance = shown @ squares.T - 2 * (x.flatten(1) * shown) @ known.T
        nearest = distance.topk(neighbors, largest=False).indices
        return labels[nearest].sum(1).argmax(1), torch.zeros(len(x))

    return under_masks(classify, test, seed)


# ------------------------------------------------------------------------------------------------ discriminative

DISCRIMINATIVE: dict[str, dict[str, Any]] = {
    "deep, shared": {"widths": (32, 64, 128, 256), "sharing": "shared"},
    "deep, unshared": {"widths": (16, 32, 64, 128), "sharing": "unshared"},
    "CP, unshared": {"widths": 64, "sharing": "unshared", "levels": 1},
    "CP, shared": {"widths": 256, "sharing": "shared", "levels": 1},
}


def circuit_classifier(train: Images, name: str, seed: int) -> tuple[Classifier, Callable[[Tensor], Tensor]]:
    """4 x 4 patches at steps of 2, 16 x 16 of them, 32 Gaussians, windows of 2 x 2."""
    generator = torch.Generator().manual_seed(seed)
    cut = Patches(4, 2, padding=3, fill=-0.5)
    options = dict(DISCRIMINATIVE[name])
    tree = ModeTree.square(16, 16)
    tree = tree.truncated(options.pop("levels", len(tree.levels)))
    patches = sampled_patches(cut(train.x[:5000]), generator)
    return classifier(patches, tree, classes=10, generator=generator, **options), cut


def rectifier_classifier(train: Images, seed: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network of the deep shared circuit's shape with ReLU and maximum in the place of products."""
    model, cut = circuit_classifier(train, "deep, shared", seed)
    generator = torch.Generator().manual_seed(seed)
    network = ConvAC(
        model.network.representation, model.network.tree, (32, 64, 128, 256), 10, activation="relu", pooling="max",
        semiring=Plain(), generator=generator,
    )  # fmt: skip
    return network, cut


def epochs(train: Images, count: float) -> int:
    """Steps."""
    return round(count * (len(train.x) // BATCH))


def seeds(count: int) -> Iterator[int]:
    """Of a study."""
    return iter(range(count))
