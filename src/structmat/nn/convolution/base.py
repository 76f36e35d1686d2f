"""What convolutions with structured kernels share, of any dimension and direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError, StructureError
from structmat.matrix import StructuredMatrix, draw
from structmat.modes import is_compiling
from structmat.nn.convolution.calls import simple
from structmat.nn.convolution.forms import KernelForm
from structmat.nn.convolution.frozen import FrozenConvolution
from structmat.nn.convolution.geometry import PADDING_MODES, Geometry, as_sizes, places
from structmat.nn.convolution.plan import Axis, Plan, is_lowered, lower, unfolded
from structmat.nn.convolution.run import PATCH_NUMBERS, Run, multiply_adds
from structmat.nn.convolution.text import lines
from structmat.nn.convolution.unfolding import Unfolding
from structmat.program import Program, build, cost, table
from structmat.projection.project import DEFAULT_SWEEPS, project
from structmat.structure import Shape, Structure, resolve, specs

KERNEL_ROWS = 4
"""A kernel whose product would need patches is written out for a call of so many places for each output channel: for
fewer, patches take less than the kernel (measured on the CPU from 16 to 256 channels, 3 x 3)."""

KERNEL_MACS = 32
"""And only if multiplying by it takes at most so many times the multiply-adds of its structure."""

Order = tuple[int, ...]
"""A permutation of the axes (channels, *kernel), as of ``torch.permute``: how the unfolded index runs over them."""


Conv = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d
DenseConv = TypeVar("DenseConv", bound=Conv)


class StructuredConvolution(nn.Module, Generic[DenseConv]):
    """What the four layers share; see :class:`structmat.nn.convolution.layer.StructuredConv2d`."""

    dense_class: ClassVar[type[Conv]]
    """The layer of PyTorch with this interface."""

    dims: ClassVar[int]
    is_transposed: ClassVar[bool] = False

    structure: Structure
    bias: nn.Parameter | None

    def _build(
        self,
        in_channels: int,
        out_channels: int,
        geometry: Geometry,
        padding: int | str | Sequence[int],
        groups: int,
        bias: bool,
        structure: Structure | KernelForm,
        order: Sequence[int] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        if groups < 1 or in_channels < 1 or out_channels < 1 or in_channels % groups or out_channels % groups:
            raise ShapeError(
                f"{in_channels} channels to {out_channels} are not {groups} equal groups. Use a common divisor."
            )
        if geometry.mode not in PADDING_MODES:
            raise ShapeError(f"padding_mode={geometry.mode!r} is none of {', '.join(PADDING_MODES)}.")
        dtype = dtype or torch.get_default_dtype()
        if dtype.is_complex:
            raise StructureError(f"A structured convolution has real tensors, not {dtype}. Use a floating dtype.")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = geometry.kernel, geometry.stride, geometry.dilation
        self.padding = padding if isinstance(padding, str) else as_sizes(padding, self.dims, "padding", 0)
        self.padding_mode, self.output_padding = geometry.mode, geometry.output_padding
        self._geometry = geometry
        shape = (out_channels // groups, in_channels // groups * geometry.taps)
        if isinstance(structure, KernelForm):
            if order is not None:
                raise StructureError(f"{structure} brings its own order; got order={tuple(order)}. Leave it out.")
            structure, order = structure.unfolded(shape[0], in_channels // groups, geometry.kernel)
        self.axis_order = tuple(range(1 + self.dims)) if order is None else tuple(order)
        axes = tuple(range(1 + self.dims))
        if sorted(self.axis_order) != list(axes):
            raise StructureError(f"order={self.axis_order} is no permutation of the axes (channels, *kernel), {axes}.")
        self._unfolding = Unfolding(
            (in_channels // groups, *geometry.kernel), groups, self.axis_order, self.is_transposed
        )
        self.structure = resolve(structure, shape)
        self._shape = shape
        self._plan = _plan(self.structure, shape, geometry.kernel, self.axis_order)
        wide = shape[0] * shape[1] > KERNEL_MACS * cost(build(self.structure, shape)).macs
        self._may_write = not wide and not is_lowered(self._plan)
        self._simple = simple(self._plan, geometry.after_padding, groups)
        declared = specs(self.structure, shape)
        self._names = tuple(declared)
        drawn = [
            draw(self.structure, shape, generator=generator, dtype=dtype, device=device)
            for _ in range(groups if device is None or torch.device(device).type != "meta" else 1)
        ]
        for name, spec in declared.items():
            tensor = drawn[0][name]
            if groups > 1:
                meta = tensor.is_meta
                tensor = tensor.new_empty(groups, *tensor.shape) if meta else torch.stack([d[name] for d in drawn])
            if spec.learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        if bias:
            where = drawn[0][self._names[0]].device if self._names else device
            values = torch.empty(out_channels, device=where, dtype=dtype)
            if not values.is_meta:
                bound = shape[1] ** -0.5
                cpu = torch.empty(out_channels, dtype=torch.promote_types(dtype, torch.float32))
                values.copy_(cpu.uniform_(-bound, bound, generator=generator))
            self.bias = nn.Parameter(values)
        else:
            self.register_parameter("bias", None)

    # ------------------------------------------------------------------------------------------------------ running

    def _run(self, x: Tensor, geometry: Geometry) -> Tensor:
        dims = self.dims
        if x.dim() not in (1 + dims, 2 + dims) or x.shape[-1 - dims] != self.in_channels:
            raise ShapeError(
                f"The input has shape {tuple(x.shape)}; the layer takes (batch, {self.in_channels}, "
                f"{', '.join(('height', 'width')[2 - dims :])}), with or without the batch."
            )
        if x.dim() == 1 + dims:
            return self._run(x.unsqueeze(0), geometry)[0]
        geometry.check(x.shape[2:])
        if self._simple is not None:
            return self._simple({name: getattr(self, name) for name in self._names}, geometry.padded(x), self.bias)
        if self._writes_kernel(x, geometry):
            return self._by_kernel(x, geometry)
        tensors = self._stacked()
        bias: Tensor | None = self.bias
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        return Run(geometry.after_padding, self.groups, tensors)(self._plan, geometry.padded(x), bias)

    def _writes_kernel(self, x: Tensor, geometry: Geometry) -> bool:
        """Whether patches would have to be written out, and writing the kernel out takes less."""
        if not self._may_write or is_compiling():  # compilers do not trace how a matrix is written out
            return False
        return x.shape[0] * places(geometry.out_sizes(x.shape[2:])) >= KERNEL_ROWS * self._shape[0]

    def _by_kernel(self, x: Tensor, geometry: Geometry) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            kernel = self._unfolding.kernels([matrix.to_dense() for matrix in self.matrices]).flatten(0, 1)
        bias: Tensor | None = self.bias
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, kernel, bias = x.to(dtype), kernel.to(dtype), None if bias is None else bias.to(dtype)
        return geometry.after_padding.convolve(geometry.padded(x), kernel, bias, self.groups, range(self.dims))

    def _stacked(self) -> dict[str, Tensor]:
        """The tensors with a leading axis of groups."""
        held = {name: getattr(self, name) for name in self._names}
        return held if self.groups > 1 else {name: tensor.unsqueeze(0) for name, tensor in held.items()}

    # ----------------------------------------------------------------------------------------------------- matrices

    @property
    def unfolded_shape(self) -> Shape:
        """Of the unfolded kernel of one group: (out_channels / groups, in_channels / groups * taps)."""
        return self._shape

    @property
    def program(self) -> Program:
        """What one group multiplies a patch by, as a linear circuit."""
        return build(self.structure, self._shape)

    @property
    def matrices(self) -> tuple[StructuredMatrix, ...]:
        """The unfolded kernel of each group, (out / groups, in / groups * taps), sharing the layer's parameters."""
        held = self._stacked()
        return tuple(
            StructuredMatrix(self.structure, self._shape, {name: tensor[group] for name, tensor in held.items()})
            for group in range(self.groups)
        )

    @property
    def matrix(self) -> StructuredMatrix:
        """The unfolded kernel of a layer with one group.

        Raises:
            StructureError: there are several.
        """
        if self.groups > 1:
            raise StructureError(f"The layer has {self.groups} groups, each with a matrix of its own. Use matrices.")
        return self.matrices[0]

    @property
    def kernel(self) -> Tensor:
        """The kernel written out, shaped as the weight of the dense layer."""
        return self._unfolding.fold([matrix.to_dense() for matrix in self.matrices])

    def load(self, matrices: Sequence[StructuredMatrix], bias: Tensor | None) -> Self:
        """Itself, with the tensors of a matrix for each group and a bias (out_channels,), where these lie."""
        like = next((t for matrix in matrices for t in matrix.tensors.values()), bias)
        if like is not None:
            self.to_empty(device=like.device)
        with torch.no_grad():
            for name in self._names:
                made = [matrix.tensors[name] for matrix in matrices]
                getattr(self, name).copy_(torch.stack(made) if self.groups > 1 else made[0])
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)
        return self

    def unfold(self, weight: Tensor) -> Tensor:
        """The weight of the dense layer as matrices (groups, out / groups, in / groups * taps)."""
        return torch.stack(self._unfolding.unfold(weight))

    def fold(self, matrices: Tensor) -> Tensor:
        """What :meth:`unfold` took apart."""
        return self._unfolding.fold(list(matrices))

    def patches(self, x: Tensor) -> Iterator[Tensor]:
        """What the matrices multiply: (groups, rows, in / groups * taps), one row for each place of the output, for a
        few images at a time, so that they are never all in memory."""
        dims, own = self.dims, self._geometry
        x = x if x.dim() == 2 + dims else x.unsqueeze(0)
        own.check(x.shape[2:])
        numbers = places(own.out_sizes(x.shape[2:])) * self.groups * self._shape[1]
        for part in x.split(max(1, PATCH_NUMBERS // max(1, numbers))):
            wide = own.after_padding.windows(own.padded(part).unflatten(1, (self.groups, -1)))
            # (images, groups, channels, *places, *kernel)
            channels = [axis + (2 if axis == 0 else 2 + dims) for axis in self.axis_order]
            rows = wide.permute(1, 0, *range(3, 3 + dims), *channels)
            yield rows.flatten(1 + 1 + dims).flatten(1, 1 + dims)

    def output_rows(self, y: Tensor) -> Tensor:
        """An output (batch, out_channels, *places), or without the batch, as (groups, rows, out / groups)."""
        y = y if y.dim() == 2 + self.dims else y.unsqueeze(0)
        rows: Tensor = y.unflatten(1, (self.groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
        return rows

    @property
    def geometry(self) -> Geometry:
        """Where it reads."""
        return self._geometry

    def out_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Places of the output for an input of these sizes."""
        return self._geometry.out_sizes(sizes)

    @classmethod
    def from_conv(
        cls,
        conv: DenseConv,
        structure: Structure | KernelForm,
        second_moment: Tensor | None = None,
        *,
        order: Sequence[int] | None = None,
        sweeps: int = DEFAULT_SWEEPS,
        seed: int = 0,
    ) -> Self:
        """The layer whose kernel is the projection of a dense layer's, group by group; see :func:`project`.

        Args:
            conv: the dense layer.
            structure: the family or the form of the kernel.
            second_moment: (n, n) of the patches that the kernel meets, ``E[x x^T]``, in the order (channels, *kernel)
                of ``F.unfold`` whatever ``order`` is; (groups, n, n) if there are several groups.
            order: of the unfolded index.
            sweeps, seed: of the fit.
        """
        made = cls.like(conv, structure, order=order)
        own = made._unfolding
        found = [
            project(matrix, made.structure, second_moment=moment, sweeps=sweeps, seed=seed).matrix
            for matrix, moment in zip(own.unfold(conv.weight), own.moments(second_moment), strict=True)
        ]
        return made.load(found, conv.bias).train(conv.training)

    @classmethod
    def like(
        cls,
        conv: DenseConv,
        structure: Structure | KernelForm,
        *,
        order: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer without values, on the meta device, of the geometry of a dense one."""
        return cls(
            **_options(conv),
            device="meta",
            dtype=conv.weight.dtype if dtype is None else dtype,
            structure=structure,
            order=order,
        )

    def to_conv(self) -> DenseConv:
        """The dense layer with the same kernel and bias."""
        kernel = self.kernel
        made = self.dense_class(**_options(self), device=kernel.device, dtype=kernel.dtype)
        with torch.no_grad():
            made.weight.copy_(kernel)
            if made.bias is not None and self.bias is not None:
                made.bias.copy_(self.bias)
        return cast(DenseConv, made.train(self.training))

    def freeze(self, rows: int | None = None) -> FrozenConvolution:
        """The layer for deployment, in evaluation mode: nothing is left to train. Where all else would write patches
        out, the kernel is held by its entries, if these are few, or whole; whole, too, where multiplying by it takes no
        more multiply-adds.

        Args:
            rows: of a typical call; convolutions run the same for all.
        """
        return FrozenConvolution(self)

    # --------------------------------------------------------------------------------------------------------- text

    def macs(self, *sizes: int) -> int:
        """Multiply-adds for one input of these sizes (height, width), as it runs or, where patches would have to be
        written out, would run on them."""
        self._geometry.check(as_sizes(sizes, self.dims, "sizes", 1))
        own = self._geometry
        wide = [n + sum(p) if own.pads_first else n for n, p in zip(sizes, own.padding, strict=True)]
        return multiply_adds(self._plan, own.after_padding, self.groups, wide)

    def dense_macs(self, *sizes: int) -> int:
        """Those of the dense layer."""
        at = sizes if self.is_transposed else self._geometry.out_sizes(sizes)
        return places(at) * self.groups * self._shape[0] * self._shape[1]

    @property
    def is_lowered(self) -> bool:
        """Whether it runs without writing patches out."""
        return is_lowered(self._plan)

    @property
    def is_chain(self) -> bool:
        """Whether it runs as two or more convolutions one after the other, which are one call without gradients."""
        return self._simple is not None and len(self._simple.steps) > 1

    def explain(self, *sizes: int) -> str:
        """What runs: the program of the unfolded kernel, the steps on maps, and with sizes the multiply-adds."""
        text = [table(self.program), "", *lines(self._plan, self._geometry, self.groups)]
        if self._may_write:
            text.append(
                f"From {KERNEL_ROWS * self._shape[0]} places a call on: a convolution by the kernel, written out anew"
            )
        if sizes:
            own, dense = self.macs(*sizes), self.dense_macs(*sizes)
            size = " x ".join(map(str, sizes))
            text.append(f"An input of {size}: {own} multiply-adds, {own / dense:.1%} of the dense layer's")
        return "\n".join(text)

    def extra_repr(self) -> str:
        learned = [name for name, spec in specs(self.structure, self._shape).items() if spec.learned]
        share = sum(getattr(self, name).numel() for name in learned) / (self._shape[0] * self._shape[1] * self.groups)
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        none = (0,) * self.dims
        for name, plain in (
            ("padding", none),
            ("dilation", (1,) * self.dims),
            ("groups", 1),
            ("padding_mode", "zeros"),
        ):
            if getattr(self, name) != plain:
                text += f", {name}={getattr(self, name)!r}"
        if any(self.output_padding):
            text += f", output_padding={self.output_padding}"
        if self.bias is None:
            text += ", bias=False"
        if self.axis_order != tuple(range(1 + self.dims)):
            text += f", order={self.axis_order}"
        return f"{text}, structure={self.structure}, {share:.1%} of dense"


@lru_cache(maxsize=1024)
def _plan(structure: Structure, shape: Shape, kernel: tuple[int, ...], order: Order) -> Plan:
    all_axes = (Axis(shape[1] // math.prod(kernel)), *(Axis(size, axis) for axis, size in enumerate(kernel)))
    axes = tuple(all_axes[position] for position in order)
    program = build(structure, shape)
    plan = lower(program, axes, len(kernel))
    # Where some patches are written out anyway, it is done once and at the start.
    return plan if is_lowered(plan) else unfolded(program, axes, len(kernel))


def _options(conv: Conv | StructuredConvolution[Any]) -> dict[str, Any]:
    """The arguments that dense and structured layers share."""
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d) or getattr(conv, "is_transposed", False):
        names.append("output_padding")
    return {**{name: getattr(conv, name) for name in names}, "bias": conv.bias is not None}
