"""A classifier that shrugs at missing pixels.

    python docs/tutorials/convac_missing_pixels.py

A tensorial mixture is trained once, on the small digits of scikit-learn, and tested with more and more pixels missing,
beside a classifier of the same tree that is given the background in place of what is missing. Seconds on one core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import structmat as sm
from structmat.nn.convac import (
    GaussianRepresentation,
    Patches,
    classifier,
    discriminative_optimizer,
    fit,
    fit_mixture,
    generative_optimizer,
    marginalize,
)

STEPS = 300
TREE = sm.nn.ModeTree.square(4, 4)
CUT = Patches(2)


def main() -> dict[float, tuple[float, float]]:
    """Accuracies of the mixture and of the classifier by the share of missing pixels."""
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:1400], order[1400:]
    pieces = CUT(images[train]).transpose(1, 2).flatten(0, 1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(STEPS):
            chosen = train[torch.randint(len(train), (64,), generator=generator)]
            yield CUT(images[chosen]), labels[chosen]

    # Densities of patches, then a distribution over their hidden labels; training hides a random share of the pixels.
    leaves = GaussianRepresentation.from_mixture(fit_mixture(pieces, 16, floor=1e-3, generator=generator))
    mixture = sm.nn.TensorialMixture(leaves, TREE, (32, 64), 10, generator=generator)
    optimizer, schedule = generative_optimizer(mixture, STEPS)
    fit(
        mixture,
        lambda b: mixture.loss(marginalize(b[0], generator=generator), b[1]),
        batches(),
        optimizer,
        schedule,
        clip=None,
    )
    mixture.eval()

    usual = classifier(pieces, TREE, (32, 64), 10, channels=16, sharing="unshared", generator=generator)
    optimizer, schedule = discriminative_optimizer(usual, STEPS, rate=0.01)
    fit(usual, lambda b: F.cross_entropy(usual(b[0]), b[1]), batches(), optimizer, schedule)
    usual.eval()

    found, x, y = {}, images[test], labels[test]
    print("missing  mixture  classifier of images with background in the place of missing pixels")
    for share in (0.0, 0.25, 0.5, 0.75):
        seen = torch.rand(x.shape, generator=generator) >= share
        exact = mixture.classify(CUT(torch.where(seen, x, math.nan)))
        filled = usual(CUT(torch.where(seen, x, -0.5))).argmax(1)
        found[share] = tuple(100 * float((guess == y).float().mean()) for guess in (exact, filled))
        print(f"{share:6.0%}  {found[share][0]:6.1f} %  {found[share][1]:6.1f} %")

    hidden = CUT(torch.where(torch.rand(x.shape, generator=generator) >= 0.5, x, math.nan))
    error = (CUT.assemble(mixture.impute(hidden).detach(), 8, 8) - x).square().mean().sqrt()
    mean = (images[train].mean(0) - x).square().mean().sqrt()
    print(f"imputed pixels: root mean squared error {error:.2f}; with the mean image it is {mean:.2f}")
    return found


if __name__ == "__main__":
    main()
