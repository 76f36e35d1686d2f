"""Plans that are nothing but convolutions one after the other: one native call, or one of PyTorch's a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from structmat.kernels.convolve import Along, Convolved, Steps, convolve, convolved
from structmat.nn.convolution.geometry import Geometry
from structmat.nn.convolution.plan import Convolve, Plan, channels
from structmat.nn.convolution.run import is_plain


@dataclass(frozen=True)
class Convolution:
    """A step that is one call of PyTorch's convolution.

    Its kernel is the stored weight in another shape; if the weight holds taps before channels, its axes are permuted:
    viewed as ``view``, permuted to ``order``.
    """

    weight: str
    kernel: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...] | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def simple(plan: Plan, geometry: Geometry, groups: int) -> Calls | None:
    """A plan that is nothing but such calls; None if it is not. Running these has no cost beside PyTorch's own."""
    found = []
    for step in plan:
        if not isinstance(step, Convolve) or not is_plain(step) or step.stage.transposed or geometry.transposed:
            return None
        inner = [-1 if axis.tap is None else axis.tap for axis in step.c]
        along = [axis in step.along for axis in range(geometry.dims)]
        padding = [pair if used else (0, 0) for pair, used in zip(geometry.padding, along, strict=True)]
        if any(before != after for before, after in padding):
            return None
        count = groups * (1 if step.stage.shared_a else channels(step.a))
        kernel = [size if axis in inner else 1 for axis, size in enumerate(geometry.kernel)]
        found.append(
            Convolution(
                step.stage.weight,
                (count * step.stage.b, channels(step.c), *kernel),
                (count * step.stage.b, *(axis.size for axis in step.c)),
                None
                if inner == sorted(inner)
                else (0, *(1 + i for i in sorted(range(len(inner)), key=inner.__getitem__))),
                tuple(size if used else 1 for size, used in zip(geometry.stride, along, strict=True)),
                tuple(before for before, _ in padding),
                tuple(size if used else 1 for size, used in zip(geometry.dilation, along, strict=True)),
                count,
            )
        )
    return Calls(found)


class Calls:
    """Such a plan.

    Args:
        steps: the calls.
    """

    def __init__(self, steps: Sequence[Convolution]) -> None:
        self.steps = tuple(steps)
        self._native = Steps([_native(step) for step in steps])

    def __call__(self, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """What :class:`structmat.nn.convolution.run.Run` makes of the plan and of (batch, channels, *sizes)."""
        kernels = [_kernel(step, tensors[step.weight]) for step in self.steps]
        found = convolve(self._native, kernels, x, bias)
        if found is not None:
            return found
        call = F.conv1d if len(self.steps[0].stride) == 1 else F.conv2d
        last = len(kernels) - 1
        for number, (step, kernel) in enumerate(zip(self.steps, kernels, strict=True)):
            added = bias if number == last else None
            x = call(x, kernel, added, step.stride, step.padding, step.dilation, step.groups)
        return x


def _kernel(step: Convolution, weight: Tensor) -> Tensor:
    if step.order is not None:
        weight = weight.reshape(step.view).permute(step.order)
    return weight.reshape(step.kernel)


def _native(step: Convolution) -> Convolved:
    axes = [Along(*own) for own in zip(step.kernel[2:], step.stride, step.padding, step.dilation, strict=True)]
    return convolved(step.kernel, step.groups, axes)
