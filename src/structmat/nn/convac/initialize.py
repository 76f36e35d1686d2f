"""Starts of representations: k-means and Gaussian mixtures on patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.errors import DataError

CHUNK = 4096
"""Patches that are compared with all centroids at a time."""


@dataclass(frozen=True)
class Mixture:
    """Diagonal Gaussians: ``means`` and ``variances`` (M, size), ``weights`` (M,) that sum to one."""

    means: Tensor
    variances: Tensor
    weights: Tensor

    def log_density(self, patches: Tensor) -> Tensor:
        """Joint log density with each component, (count, M)."""
        precision = 1 / self.variances
        square = patches.square() @ precision.T - 2 * patches @ (precision * self.means).T
        square = square + (precision * self.means.square()).sum(1)
        constant = self.weights.clamp(min=1e-30).log() - 0.5 * (2 * math.pi * self.variances).log().sum(1)
        return constant - 0.5 * square


def kmeans(patches: Tensor, count: int, *, steps: int = 20, generator: torch.Generator | None = None) -> Tensor:
    """Centroids (count, size) of patches (number, size): Lloyd's algorithm from a k-means++ start.

    A centroid that loses all patches moves to the patch that is worst represented.

    Raises:
        DataError: fewer distinct patches than centroids, or values that are not finite.
    """
    _check(patches, count)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    first = int(torch.randint(len(patches), (1,), generator=generator))
    centroids = [patches[first]]
    nearest = (patches - centroids[0]).square().sum(1)
    for _ in range(count - 1):
        if not float(nearest.max()) > 0:
            raise DataError(
                f"The patches have {len(centroids)} distinct values, fewer than the {count} centroids asked."
            )
        chosen = int(torch.multinomial(nearest.double(), 1, generator=generator))
        centroids.append(patches[chosen])
        nearest = torch.minimum(nearest, (patches - patches[chosen]).square().sum(1))
    found = torch.stack(centroids)
    for _ in range(steps):
        distance, owner = nearest_centroid(patches, found)
        sizes = torch.bincount(owner, minlength=count)
        sums = torch.zeros_like(found).index_add_(0, owner, patches)
        moved = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], found)
        for empty in (sizes == 0).nonzero().flatten().tolist():
            worst = int(distance.argmax())
            moved[empty], distance[worst] = patches[worst], 0.0
        if torch.equal(moved, found):
            break
        found = moved
    return found


def nearest_centroid(patches: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance (number,) and index (number,) of the nearest centroid."""
    results = []
    for chunk in patches.split(CHUNK):
        square = centroids.square().sum(1) - 2 * chunk @ centroids.T
        least, owner = square.min(1)
        results.append(((least + chunk.square().sum(1)).clamp(min=0), owner))
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


def fit_mixture(
    patches: Tensor,
    count: int,
    *,
    steps: int = 15,
    kmeans_steps: int = 8,
    floor: float = 1e-4,
    generator: torch.Generator | None = None,
) -> Mixture:
    """A diagonal Gaussian mixture of patches (number, size), by expectation-maximisation from k-means.

    Args:
        patches: without missing values.
        count: components M.
        steps: of expectation-maximisation.
        kmeans_steps: of the start.
        floor: added to variances, so that constant background pixels do not get infinite density.

    Raises:
        DataError: as :func:`kmeans`.
    """
    means = kmeans(patches, count, steps=kmeans_steps, generator=generator)
    owner = nearest_centroid(patches, means)[1]
    mixture = _maximize(patches, torch.nn.functional.one_hot(owner, count).to(patches.dtype), floor)
    for _ in range(steps):
        mixture = _maximize(patches, mixture.log_density(patches).softmax(1), floor)
    return mixture


def _maximize(patches: Tensor, share: Tensor, floor: float) -> Mixture:
    total = share.sum(0).clamp(min=1e-10)
    means = share.T @ patches / total[:, None]
    variances = (share.T @ patches.square() / total[:, None] - means.square()).clamp(min=0) + floor
    return Mixture(means, variances, total / total.sum())


def nearest_precision(patches: Tensor, means: Tensor) -> float:
    """The common coefficient ``1 / (2 mean squared distance to the nearest mean)`` of ``exp(-b |x - mu|^2)``.

    The start of Gaussian representations of classifiers: a typical patch then has value exp(-1/2) at its own mean.
    """
    distance = float(nearest_centroid(patches, means)[0].mean())
    if not distance > 0:
        raise DataError("All patches equal their nearest mean, so that no width can be found. Use fewer means.")
    return 1 / (2 * distance)


def _check(patches: Tensor, count: int) -> None:
    if patches.dim() != 2 or not bool(patches.isfinite().all()):
        raise DataError(
            f"Patches must be finite and of shape (number, size); got {tuple(patches.shape)}"
            f"{' with NaN or infinite values' if patches.dim() == 2 else ''}. Leave out patches with missing values."
        )
    if not 1 <= count <= len(patches):
        raise DataError(f"{len(patches)} patches can't have {count} centroids.")
