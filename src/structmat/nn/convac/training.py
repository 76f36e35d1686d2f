"""Settings that train by default, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from structmat.errors import DataError
from structmat.nn.convac.initialize import kmeans, nearest_precision
from structmat.nn.convac.network import ConvAC
from structmat.nn.convac.representation import GaussianRepresentation
from structmat.nn.convac.semiring import RootMeanSquare
from structmat.nn.convac.tree import ModeTree

GRADIENT_CLIP = 1.0
"""Norm of a step's gradient: products of many factors have heavy-tailed gradients, and one batch must not undo the
rest."""

WARM_UP = 100
"""Steps over which the rate of classifiers rises: Adam's variance estimates are poor at first, products amplify
errors."""


class Classifier(nn.Module):
    """A signed network with a learned temperature: scores (batch, Y) times ``exp(t)`` are logits.

    Args:
        network: with the semiring `RootMeanSquare`, so that scores are near one whatever the number of patches; the
            temperature gives the softmax back the scale that this takes away.
    """

    def __init__(self, network: ConvAC) -> None:
        super().__init__()
        self.network = network
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, Y)."""
        logits: Tensor = self.network(x) * self.log_temperature.exp()
        return logits


def classifier(
    patches: Tensor,
    tree: ModeTree,
    widths: int | tuple[int, ...],
    classes: int,
    *,
    channels: int = 32,
    background: float | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Classifier:
    """A classifier with the defaults that train.

    - Gaussians with means by k-means on patches, so that each covers data, and one more at the background, since an
      image has mostly that; one common precision, half the inverse mean squared distance to the nearest mean, so that
      a typical patch is neither covered by all nor by none; both learned.
    - Values divided by their root mean square after each product, because the scale of products is unstable.
    - Weights near averages (see :func:`averaging_`), because products of zero-mean factors vanish.

    Args:
        patches: (number, size), finite; those of standard deviation below 0.05 are left out of k-means.
        tree, widths, classes: of the network.
        channels: M, the background included.
        background: its value, ``None`` for the least one seen.
        options: of :class:`ConvAC`, such as ``sharing``.

    Raises:
        DataError: too few patches that vary.
    """
    varied = patches[patches.std(1) >= 0.05] if patches.shape[1] > 1 else patches
    if len(varied) < channels:
        raise DataError(
            f"{len(varied)} of {len(patches)} patches vary (standard deviation of at least 0.05), fewer than "
            f"{channels} channels. Give more patches, or scale pixels to a range of one."
        )
    lowest = float(patches.min()) if background is None else background
    means = torch.cat(
        [kmeans(varied, channels - 1, generator=generator), patches.new_full((1, patches.shape[1]), lowest)]
    )
    representation = GaussianRepresentation(patches.shape[1], channels, normalized=False)
    representation.means.data = means
    # exp(-b |x - mu|^2) is a Gaussian of precision 2 b.
    precision = torch.full_like(means, 2 * nearest_precision(varied, means))
    representation.log_precisions.data = precision.log()
    options.setdefault("semiring", RootMeanSquare())
    return Classifier(ConvAC(representation, tree, widths, classes, generator=generator, **options))


def discriminative_optimizer(model: nn.Module, steps: int, *, rate: float = 3e-3) -> tuple[Optimizer, LambdaLR]:
    """Adam at 3e-3 with warm-up over 100 steps, then a cosine to zero; weight decay 1e-5.

    The rate is three times the usual one, since rms normalisation makes the loss insensitive to the scale of weights;
    the end at zero is worth a point in runs of few epochs. Filters whose outputs are multiplied in windows of w > 4
    learn at ``2 / sqrt(w)`` of it: a step moves every factor, and the logarithm of a product by their sum. At the full
    rate a shallow network over 256 patches is lost after 20 steps; so it reaches 95 % on MNIST in 300.
    """
    slower = dict[int, float]()
    for network in model.modules():
        if isinstance(network, ConvAC):
            for level, maps in enumerate(network.layers):
                share = min(1.0, 2 / network.window(level) ** 0.5)
                slower |= {id(p): share for p in maps.parameters()}
    groups = dict[float, list[nn.Parameter]]()
    for parameter in model.parameters():
        groups.setdefault(slower.get(id(parameter), 1.0), []).append(parameter)
    optimizer = Adam(
        [{"params": parameters, "lr": rate * share} for share, parameters in groups.items()],
        lr=rate,
        betas=(0.9, 0.999),
        weight_decay=1e-5,
    )
    warm = min(WARM_UP, max(1, steps // 5))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return optimizer, LambdaLR(optimizer, factor)


def generative_optimizer(model: nn.Module, steps: int, *, rate: float = 0.03) -> tuple[Optimizer, LambdaLR]:
    """Adam at 0.03, constant for 80 % of the steps, then linear to zero.

    The rate must be large: weights are softmax logits, whose gradients are small (a tenth of it reaches 70 % where this
    reaches 95 % after 300 steps on MNIST; 0.05 gains half a point in so few steps, nothing in three epochs). With the
    published choice, Nadam with a first beta of 0.975, the same steps leave a mixture 2 points behind where 95 % of the
    pixels are missing (`python -m benchmarks.convac_missing`).
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = Adam(learned, lr=rate, betas=(0.9, 0.999))
    return optimizer, LambdaLR(optimizer, constant_then_linear(steps))


def constant_then_linear(steps: int) -> Callable[[int], float]:
    """Factor of the rate at a step: one for 80 % of the steps, then linear to zero."""
    constant = 0.8 * steps

    def factor(step: int) -> float:
        return 1.0 if step < constant else max(0.0, (steps - step) / max(1.0, steps - constant))

    return factor


def marginalize(
    x: Tensor, probability: float | Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Numbers made missing (NaN; -1 for symbols) at random: the dropout of these networks, for generative training.

    Never zero a factor of a product, which kills the window: what is missing gets the value one, which integrates it
    out.

    Args:
        x: (batch, ...).
        probability: of each number, or a tensor of them that broadcasts over ``x``. By default one for each instance,
            drawn uniformly, since what serves one share of missing numbers serves no other: with one half throughout a
            mixture for MNIST loses 1.3 points where 90 % of the pixels are missing, and wins nothing where none are.
        generator: of what is drawn, on the CPU.
    """
    if probability is None:
        probability = torch.rand(x.shape[:1] + (1,) * (x.ndim - 1), generator=generator).to(x.device)
    hidden = torch.rand(x.shape, generator=generator).to(x.device) < probability
    return torch.where(hidden, math.nan if x.is_floating_point() else -1, x)


def fit(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Iterable[Any],
    optimizer: Optimizer,
    schedule: LambdaLR,
    *,
    clip: float | None = GRADIENT_CLIP,
) -> list[float]:
    """One step for each batch; the losses.

    Args:
        model: whose parameters are trained, put into training mode.
        loss: of a batch.
        batches: as many as the schedule has steps.
        optimizer, schedule: from :func:`discriminative_optimizer` or :func:`generative_optimizer`.
        clip: of the gradient's norm, or ``None``.

    Raises:
        DataError: a loss is not finite.
    """
    model.train()
    losses = list[float]()
    for batch in batches:
        optimizer.zero_grad()
        value = loss(batch)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise DataError(f"The loss of step {len(losses) - 1} is {losses[-1]}. Use normalisation or a smaller rate.")
        value.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return losses
