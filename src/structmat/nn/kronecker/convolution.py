"""Convolutions whose kernel is a sum of Kronecker products, as two convolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structmat.errors import ShapeError, StructureError
from structmat.nn.kronecker.activation import Activation, gain
from structmat.projection.kronecker import factor_pairs
from structmat.projection.project import DEFAULT_SWEEPS, Projection, project
from structmat.structures.kronecker import Kronecker, Orthogonal, factor_matrices

Kernel = tuple[int, int, int, int]
"""(outputs, inputs, height, width)."""


@dataclass(frozen=True)
class KernelSizes:
    """The sizes of the two factors of a kernel; their products are the kernel's.

    Args:
        a: (F1, C1, h1, w1) of the factor whose indices are the slow ones.
        b: (F2, C2, h2, w2).
    """

    a: Kernel
    b: Kernel

    @property
    def kernel(self) -> Kernel:
        """(F, C, h, w)."""
        f, c, h, w = (x * y for x, y in zip(self.a, self.b, strict=True))
        return (f, c, h, w)

    @property
    def parameters(self) -> int:
        """Numbers in one term."""
        return math.prod(self.a) + math.prod(self.b)

    @property
    def most(self) -> int:
        """Terms that give every kernel."""
        return min(math.prod(self.a), math.prod(self.b))

    def macs(self, first: str) -> int:
        """Multiply-adds of one term at one position, both convolutions at stride 1; ``first`` is "a" or "b"."""
        f1, c1, f2, c2 = self.a[0], self.a[1], self.b[0], self.b[1]
        if first == "b":
            return c1 * math.prod(self.b) + f2 * math.prod(self.a)
        return c2 * math.prod(self.a) + f1 * math.prod(self.b)

    @property
    def cheaper(self) -> str:
        """The factor to apply first."""
        return "b" if self.macs("b") <= self.macs("a") else "a"


def kernel_sizes(kernel: Kernel) -> KernelSizes:
    """The factors of a kernel with the fewest parameters, then the fewest multiply-adds.

    A size of 3 is prime: one of the factors is then a 1 x 1 convolution along that axis.
    """
    options = [
        KernelSizes((f[0], c[0], h[0], w[0]), (f[1], c[1], h[1], w[1]))
        for f in factor_pairs(kernel[0])
        for c in factor_pairs(kernel[1])
        for h in factor_pairs(kernel[2])
        for w in factor_pairs(kernel[3])
    ]
    return min(options, key=lambda s: (s.parameters, s.macs(s.cheaper)))


def kernel_of(a: Tensor, b: Tensor) -> Tensor:
    """The kernel (F, C, h, w) of factors (terms, F1, C1, h1, w1) and (terms, F2, C2, h2, w2), written out."""
    made = torch.einsum("tfcuv,tgdxy->fgcduxvy", a, b)
    f1, f2, c1, c2, h1, h2, w1, w2 = made.shape
    return made.reshape(f1 * f2, c1 * c2, h1 * h2, w1 * w2)


def _columns(tensor: Tensor, sizes: KernelSizes, start: int) -> Tensor:
    """Axes (C, h, w) from ``start`` on, split and put as (C1, h1, w1, C2, h2, w2), flattened."""
    split = [n for x, y in zip(sizes.a[1:], sizes.b[1:], strict=True) for n in (x, y)]
    parted = tensor.reshape(*tensor.shape[:start], *split, *tensor.shape[start + 3 :])
    order = [*range(start), *(start + i for i in (0, 2, 4, 1, 3, 5)), *range(start + 6, parted.dim())]
    return parted.permute(order).reshape(*tensor.shape[:start], -1, *tensor.shape[start + 3 :])


def nearest_kernel(
    weight: Tensor,
    sizes: KernelSizes,
    terms: int,
    *,
    second_moment: Tensor | None = None,
    sweeps: int = DEFAULT_SWEEPS,
) -> tuple[Tensor, Tensor, Projection]:
    """The nearest sum of Kronecker products to a kernel; optimal without a second moment (Hameed et al., 2021).

    As a matrix of F rows, with its columns ordered (C1, h1, w1; C2, h2, w2), a kernel is a Kronecker sum of matrices of
    sizes F1 x C1 h1 w1 and F2 x C2 h2 w2.

    Args:
        weight: (F, C, h, w).
        sizes: of the factors.
        terms: products.
        second_moment: (C h w, C h w) of the patches that the kernel meets, as ``F.unfold`` orders them.
        sweeps: for the weighted fit.

    Returns:
        The factors (terms, F1, C1, h1, w1) and (terms, F2, C2, h2, w2), balanced, and the projection with its error.

    Raises:
        ShapeError: the sizes are not those of the kernel, or there are too many terms.
    """
    if tuple(weight.shape) != sizes.kernel:
        raise ShapeError(
            f"The factors {sizes.a} and {sizes.b} make a kernel {sizes.kernel}; got {tuple(weight.shape)}."
        )
    moment = None
    if second_moment is not None:
        channels = tuple(weight.shape[1:])
        moment = _columns(second_moment.reshape(*channels, *channels), sizes, 0)
        moment = _columns(moment, sizes, 1)
    pairs = ((sizes.a[0], math.prod(sizes.a[1:])), (sizes.b[0], math.prod(sizes.b[1:])))
    found = project(_columns(weight.detach(), sizes, 1), Kronecker(terms, pairs), second_moment=moment, sweeps=sweeps)
    family = found.matrix.structure
    assert isinstance(family, Kronecker)
    a, b = factor_matrices(family, found.matrix.tensors)
    return a.reshape(-1, *sizes.a), b.reshape(-1, *sizes.b), found


class KroneckerConv2d(nn.Module):
    """A convolution whose kernel is a sum of Kronecker products; called as ``nn.Conv2d``.

    Two convolutions do it and the kernel is never formed: B (valid, stride 1) on groups of channels, then A with the
    dilation (h2, w2) and the stride; or A first. With an activation between them it is a Kronecker block at every
    position. Parameters: ``a`` (terms, F1, C1, h1, w1), ``b`` (terms, F2, C2, h2, w2), ``inner_bias``, ``bias`` (F,).
    Source: Hameed, Tahaei, Mosleh and Partovi Nia, "Convolutional neural network compression through generalized
    Kronecker product decomposition" (2021).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as for ``nn.Conv2d``, padding with
        zeros. terms: products.
        sizes: of the factors; those with the fewest parameters if not given.
        first: "a", "b", or "auto" for the fewest multiply-adds at stride 1.
        inner: an activation between the two, or None; it comes with a bias for each channel there.

    Raises:
        StructureError: too many terms.
        ShapeError: sizes that do not multiply to those of the kernel.
    """

    bias: nn.Parameter | None
    inner_bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        terms: int = 1,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        sizes: KernelSizes | None = None,
        first: str = "auto",
        inner: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        kernel = (out_channels, in_channels, *_pair(kernel_size))
        self.sizes = sizes or kernel_sizes(kernel)
        if self.sizes.kernel != kernel:
            raise ShapeError(f"The factors {self.sizes.a} and {self.sizes.b} make {self.sizes.kernel}, not {kernel}.")
        if not 1 <= terms <= self.sizes.most:
            raise StructureError(
                f"A kernel {kernel} with factors {self.sizes.a} and {self.sizes.b} has 1 to {self.sizes.most} terms; "
                f"got {terms}."
            )
        if first not in ("a", "b", "auto"):
            raise StructureError(f"first={first!r} is none of 'a', 'b' and 'auto'.")
        self.terms, self.inner = terms, inner
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)
        self.first = self.sizes.cheaper if first == "auto" else first
        where = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        last = "a" if self.first == "b" else "b"
        for name, size in (("a", self.sizes.a), ("b", self.sizes.b)):
            held = torch.empty(terms, *size, **where)  # type: ignore[arg-type]
            if not held.is_meta:
                scale = gain(inner) / terms if name == last else 1.0
                drawn = Orthogonal(scale**0.5, (0, 1, 2)).draw(
                    (terms, size[0], math.prod(size[1:])), generator=generator, dtype=held.dtype, device=held.device
                )
                held.copy_(drawn.reshape(held.shape))
            self.register_parameter(name, nn.Parameter(held))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels, **where)) if bias else None)  # type: ignore[arg-type]
        channels = (terms, *self._between())
        inside = nn.Parameter(torch.zeros(channels, **where)) if inner is not None else None  # type: ignore[arg-type]
        self.register_parameter("inner_bias", inside)

    def _between(self) -> tuple[int, int]:
        """Channels of the value between the two convolutions: (C1, F2) or (F1, C2)."""
        (f1, c1, _, _), (f2, c2, _, _) = self.sizes.a, self.sizes.b
        return (c1, f2) if self.first == "b" else (f1, c2)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_channels, height, width), or one without the batch."""
        if x.dim() == 3:
            result: Tensor = self(x[None])[0]
            return result
        (f1, c1, _, _), (f2, c2, h2, w2) = self.sizes.a, self.sizes.b
        batch, terms = x.shape[0], self.terms
        (dh, dw), (ph, pw) = self.dilation, self.padding
        x = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x
        a, b = self.get_parameter("a"), self.get_parameter("b")
        spread = (h2 * dh, w2 * dw)
        if self.first == "b":
            y = F.conv2d(x.reshape(batch * c1, c2, *x.shape[2:]), b.flatten(0, 1), dilation=self.dilation)
            y = self._activated(y.reshape(batch, c1, terms, f2, *y.shape[2:]).permute(0, 2, 1, 3, 4, 5))
            y = y.permute(0, 3, 1, 2, 4, 5).reshape(batch * f2, terms * c1, *y.shape[4:])
            y = F.conv2d(y, a.transpose(0, 1).flatten(1, 2), stride=self.stride, dilation=spread)
            y = y.reshape(batch, f2, f1, *y.shape[2:]).transpose(1, 2)
        else:
            folded = x.reshape(batch, c1, c2, *x.shape[2:]).transpose(1, 2).reshape(batch * c2, c1, *x.shape[2:])
            y = F.conv2d(folded, a.flatten(0, 1), dilation=spread)
            y = self._activated(y.reshape(batch, c2, terms, f1, *y.shape[2:]).permute(0, 2, 3, 1, 4, 5))
            y = y.permute(0, 2, 1, 3, 4, 5).reshape(batch * f1, terms * c2, *y.shape[4:])
            y = F.conv2d(y, b.transpose(0, 1).flatten(1, 2), stride=self.stride, dilation=self.dilation)
            y = y.reshape(batch, f1, f2, *y.shape[2:])
        y = y.reshape(batch, f1 * f2, *y.shape[3:])
        return y if self.bias is None else y + self.bias[:, None, None]

    def _activated(self, y: Tensor) -> Tensor:
        """Of (batch, terms, channels, channels, height, width)."""
        if self.inner is None or self.inner_bias is None:
            return y
        return self.inner(y + self.inner_bias[..., None, None])

    @property
    def weight(self) -> Tensor:
        """The kernel (F, C, h, w) of the linear part, written out."""
        return kernel_of(self.get_parameter("a"), self.get_parameter("b"))

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        terms: int,
        *,
        sizes: KernelSizes | None = None,
        second_moment: Tensor | None = None,
        sweeps: int = DEFAULT_SWEEPS,
    ) -> Self:
        """The nearest one to a convolution, see :func:`nearest_kernel`.

        Raises:
            StructureError: the convolution has groups, or pads otherwise than with zeros.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise StructureError(
                f"A Kronecker convolution has one group and pads a number of zeros; the convolution has "
                f"groups={conv.groups}, padding={conv.padding!r}, padding_mode={conv.padding_mode!r}."
            )
        height, width = conv.kernel_size
        chosen = sizes or kernel_sizes((conv.out_channels, conv.in_channels, height, width))
        a, b, _ = nearest_kernel(conv.weight, chosen, terms, second_moment=second_moment, sweeps=sweeps)
        made = cls(
            conv.in_channels,
            conv.out_channels,
            _two(conv.kernel_size),
            terms,
            stride=_two(conv.stride),
            padding=_two(conv.padding),
            dilation=_two(conv.dilation),
            bias=conv.bias is not None,
            sizes=chosen,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            made.get_parameter("a").copy_(a)
            made.get_parameter("b").copy_(b)
            if made.bias is not None and conv.bias is not None:
                made.bias.copy_(conv.bias)
        return made.train(conv.training)

    def extra_repr(self) -> str:
        f, c, h, w = self.sizes.kernel
        return (
            f"{c}, {f}, kernel_size=({h}, {w}), terms={self.terms}, stride={self.stride}, padding={self.padding}, "
            f"factors {self.sizes.a} and {self.sizes.b}, {self.first} first"
        )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    return (value[0], value[1])
