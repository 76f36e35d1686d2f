"""Representation layers: patches (batch, size, N) to the values of M functions, (batch, M, N).

Rank statements need linearly independent functions: distinct Gaussians, distinct neurons and one-hot symbols are. Any
module will do that has an attribute ``channels`` (M) and, if it returns logarithms, ``logarithm = True``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structmat.errors import DataError, ShapeError
from structmat.nn.convac.initialize import Mixture


class Patches(nn.Module):
    """Images (batch, colors, height, width) to patches (batch, size, N), rows of the image first.

    Padding is missing (NaN), which probabilistic representations marginalise; other representations need a number.

    Args:
        size: side of a square patch.
        stride: step, by default ``size``: no overlaps.
        padding: on each side.
        fill: the value of the padding.
    """

    def __init__(self, size: int, stride: int | None = None, padding: int = 0, fill: float = math.nan) -> None:
        super().__init__()
        self.size, self.stride, self.padding, self.fill = size, stride or size, padding, fill
        if min(size, self.stride) < 1 or padding < 0:
            raise ShapeError(
                f"Patches need size and stride of at least 1; got {size}, {self.stride}, padding {padding}."
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along each axis of an image.

        Raises:
            ShapeError: the patches do not cover the padded image exactly.
        """
        for side in (height, width):
            if (side + 2 * self.padding - self.size) % self.stride or side + 2 * self.padding < self.size:
                raise ShapeError(
                    f"Patches of size {self.size} and stride {self.stride} do not cover an image side of {side} "
                    f"padded by {self.padding} exactly. Choose another padding."
                )
        tall, wide = ((s + 2 * self.padding - self.size) // self.stride + 1 for s in (height, width))
        return tall, wide

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        if images.dim() != 4:
            raise ShapeError(f"Images have shape (batch, colors, height, width); got {tuple(images.shape)}.")
        self.grid(*images.shape[2:])
        padded = F.pad(images, (self.padding,) * 4, value=self.fill)
        # Not F.unfold: it multiplies by ones on some devices, and NaN marks what is missing.
        windows = padded.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride)
        return windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)

    def assemble(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Images (batch, colors, height, width) from patches that do not overlap: imputed or drawn ones.

        Raises:
            ShapeError: the patches overlap, or their number is not that of such an image.
        """
        tall, wide = self.grid(height, width)
        if self.stride != self.size or patches.shape[2] != tall * wide:
            raise ShapeError(
                f"Only patches with stride = size make up images; got size {self.size}, stride {self.stride}, and "
                f"{patches.shape[2]} patches for a grid of {tall} x {wide}."
            )
        blocks = patches.reshape(len(patches), -1, self.size, self.size, tall, wide)
        padded = blocks.permute(0, 1, 4, 2, 5, 3).reshape(len(patches), -1, tall * self.size, wide * self.size)
        end = padded.shape[-1] - self.padding
        return padded[..., self.padding : padded.shape[-2] - self.padding, self.padding : end]


class GaussianRepresentation(nn.Module):
    """M diagonal Gaussians: ``log f_d(x) = sum_k -p_dk (x_k - mu_dk)^2 / 2 + (log p_dk - log 2 pi) / 2``.

    Missing coordinates (NaN) contribute nothing: the marginal density, exactly.

    Args:
        size: numbers of a patch.
        channels: M.
        normalized: densities, for generative use (True), or without the terms that do not depend on x, so that values
            lie in (0, 1].
        learned: whether means and precisions are parameters.
    """

    logarithm: ClassVar[bool] = True

    def __init__(self, size: int, channels: int, *, normalized: bool = True, learned: bool = True) -> None:
        super().__init__()
        self.channels, self.normalized = channels, normalized
        self.means = nn.Parameter(torch.randn(channels, size), requires_grad=learned)
        self.log_precisions = nn.Parameter(torch.zeros(channels, size), requires_grad=learned)

    @classmethod
    def from_mixture(
        cls, mixture: Mixture, *, normalized: bool = True, learned: bool = False
    ) -> GaussianRepresentation:
        """The components of a mixture fitted to patches; see :func:`structmat.nn.convac.initialize.fit_mixture`."""
        made = cls(mixture.means.shape[1], mixture.means.shape[0], normalized=normalized, learned=learned)
        made.means.data = mixture.means.clone()
        made.log_precisions.data = -mixture.variances.log()
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Log densities (batch, M, N)."""
        if x.dim() != 3 or x.shape[1] != self.means.shape[1]:
            raise ShapeError(f"Patches have shape (batch, {self.means.shape[1]}, N) here; got {tuple(x.shape)}.")
        seen = ~x.isnan()
        x = torch.where(seen, x, 0.0)
        observed = seen.to(x.dtype)
        precision = self.log_precisions.exp()
        # The square written out: three matrix products instead of an array of M differences a patch.
        square = (
            precision @ x.square() - 2 * (precision * self.means) @ x + (precision * self.means.square()) @ observed
        )
        if not self.normalized:
            return -0.5 * square
        constant = (self.log_precisions - math.log(2 * math.pi)) @ observed
        return 0.5 * (constant - square)

    def sample(self, components: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Patches (batch, size, N) drawn from the components (batch, N)."""
        deviation = (-0.5 * self.log_precisions).exp()
        noise = torch.randn(*components.shape, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return (self.means[components] + deviation[components] * noise).transpose(1, 2)

    def mean(self, weights: Tensor) -> Tensor:
        """Expected patches (batch, size, N) under weights of the components (batch, M, N)."""
        return torch.einsum("dk,bdn->bkn", self.means, weights)


class NeuronRepresentation(nn.Module):
    """M neurons ``sigma(w_d . x + b_d)``; with ``constant`` the first is the constant one.

    The scores are homogeneous in the functions, so that terms of lower order need a constant among them.

    Args:
        size: numbers of a patch.
        channels: M, the constant included.
        activation: sigma, ReLU by default.
        constant: whether the first function is one.
    """

    logarithm: ClassVar[bool] = False

    def __init__(self, size: int, channels: int, *, activation: nn.Module | None = None, constant: bool = True) -> None:
        super().__init__()
        if channels - constant < 1:
            raise ShapeError(f"channels={channels} leaves no neuron beside the constant. Use channels=2 or more.")
        self.channels, self.constant = channels, constant
        self.linear = nn.Linear(size, channels - constant)
        self.activation = nn.ReLU() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """Values (batch, M, N)."""
        values: Tensor = self.activation(self.linear(x.transpose(1, 2))).transpose(1, 2)
        if not self.constant:
            return values
        return torch.cat([torch.ones_like(values[:, :1]), values], 1)


class OneHot(nn.Module):
    """Symbols (batch, N), integers in 0..M-1, or -1 for a missing one, which is one in every channel.

    With ``M = 2`` these are binary pixels, ``f_0 = b`` and ``f_1 = 1 - b`` up to the order.
    """

    logarithm: ClassVar[bool] = False

    def __init__(self, channels: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.channels, self.dtype = channels, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Values (batch, M, N)."""
        if x.dim() != 2 or x.is_floating_point():
            raise ShapeError(f"Symbols are integers of shape (batch, N); got {x.dtype} of shape {tuple(x.shape)}.")
        if bool(((x < -1) | (x >= self.channels)).any()):
            raise DataError(
                f"Symbols are 0..{self.channels - 1}, or -1 for a missing one; got {int(x.min())}..{int(x.max())}."
            )
        dtype = self.dtype or torch.get_default_dtype()
        shown = F.one_hot(x.clamp(min=0), self.channels).to(dtype)
        return torch.where((x < 0).unsqueeze(-1), torch.ones((), dtype=dtype), shown).transpose(1, 2)

    def sample(self, components: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The symbols are the components (batch, N)."""
        return components

    def mean(self, weights: Tensor) -> Tensor:
        """Probabilities of the symbols, (batch, M, N)."""
        return weights


class Representation(nn.Module):
    """Any module as a representation: it maps (batch, size, N) to (batch, M, N).

    Args:
        module: the map.
        channels: M.
        logarithm: whether it returns logarithms.
    """

    def __init__(self, module: nn.Module, channels: int, *, logarithm: bool = False) -> None:
        super().__init__()
        self.module, self.channels, self.logarithm = module, channels, logarithm

    def forward(self, x: Tensor) -> Tensor:
        """Values (batch, M, N)."""
        result: Tensor = self.module(x)
        return result


def templates(representation: nn.Module, patches: Tensor, *, condition: float = 1e8) -> Tensor:
    """M templates (size, M) on which the functions are independent: k-means centroids of patches (count, size).

    Raises:
        DataError: the matrix ``f_d(z_i)`` has a condition number beyond ``condition``: the functions are dependent as
            far as these patches tell, and ranks of grid tensors would mean nothing.
    """
    from structmat.nn.convac.initialize import kmeans

    count = representation.channels
    assert isinstance(count, int)
    found = kmeans(patches, count).T
    values: Tensor = representation(found.unsqueeze(0))[0]
    matrix = values.exp() if getattr(representation, "logarithm", False) else values
    number = float(torch.linalg.cond(matrix.detach().double()))
    if not number <= condition:
        raise DataError(
            f"The {count} representation functions have condition number {number:.1e} on the centroids of the "
            "patches. Use fewer functions, or ones that are farther apart."
        )
    return found


__all__: Sequence[str] = [
    "GaussianRepresentation", "NeuronRepresentation", "OneHot", "Patches", "Representation", "templates",
]  # fmt: skip
