"""The linear layer whose weight is a structured matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from structmat.errors import StructureError
from structmat.kernels import Standing, affine, apply, convolved, parts_form, quick, runs_native, tuning, writing_for
from structmat.matrix import StructuredMatrix, draw
from structmat.modes import is_compiling
from structmat.program import (
    Contraction,
    Fourier,
    Generated,
    Program,
    build,
    cost,
    form,
    fuse,
    stages,
    table,
)
from structmat.program.dense import dense
from structmat.projection.project import DEFAULT_SWEEPS, project
from structmat.structure import Structure, is_matrix, resolve, specs
from structmat.transforms.recognized import fourier_program


class StructuredLinear(nn.Module):
    """``y = S x + b`` with ``S`` a member of ``structure``; called as ``nn.Linear``.

    The tensors are ordinary parameters and buffers under the structure's own names. Complex weights are stored as
    real parameters with a last axis of 2, so that optimizers and mixed precision treat them rightly.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bias: whether to add a learned vector (out_features,).
        structure: the family; fractions are resolved for the shape.
        device, dtype: of the parameters; ``meta`` and complex dtypes are allowed.
        generator: source of randomness of the initialisation, which has the output variance of ``nn.Linear``'s.

    Raises:
        ShapeError: the structure refuses the shape.
        StructureError: it is a matrix only at the start.
    """

    in_features: int
    out_features: int
    structure: Structure
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        structure: Structure,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self.structure = resolve(structure, shape)
        if not is_matrix(self.structure):
            raise StructureError(
                f"{self.structure} is a matrix only at the start, and a layer of it is not linear. Compress a model "
                "with it, or take a family."
            )
        self._program = build(self.structure, shape)
        self._quick = quick(self._program)
        dtype = dtype or torch.get_default_dtype()
        self._complex, self._dtype = dtype.is_complex, dtype
        self._names = tuple(specs(self.structure, shape))
        drawn = draw(self.structure, shape, generator=generator, dtype=dtype, device=device)
        for name, spec in specs(self.structure, shape).items():
            if spec.learned:
                self.register_parameter(name, nn.Parameter(self._stored(drawn[name])))
            else:
                self.register_buffer(name, drawn[name])
        if bias:
            bound = in_features**-0.5
            where = drawn[self._names[0]].device if self._names else device
            values = torch.empty(out_features, device=where, dtype=dtype)
            if values.device.type != "meta":
                real = torch.empty(self._stored(values).shape, dtype=self._stored(values).dtype)
                values = self._loaded(real.uniform_(-bound, bound, generator=generator).to(values.device))
            self.bias = nn.Parameter(self._stored(values))
        else:
            self.register_parameter("bias", None)

    def _stored(self, tensor: Tensor) -> Tensor:
        return torch.view_as_real(tensor).clone() if tensor.is_complex() else tensor

    def _loaded(self, tensor: Tensor) -> Tensor:
        return torch.view_as_complex(tensor) if self._complex and tensor.is_floating_point() else tensor

    @property
    def program(self) -> Program:
        """What the layer multiplies by, as a linear circuit."""
        return self._program

    def tensors(self) -> dict[str, Tensor]:
        """The structure's tensors by name, as the program reads them (gradients flow to the parameters)."""
        return {name: self._loaded(getattr(self, name)) for name in self._names}

    def forward(self, input: Tensor) -> Tensor:
        """Rows (..., in_features) to (..., out_features)."""
        if not self._complex and not is_compiling():
            found = self._quick(input, self._parameters, self._buffers)
            if found is not None:
                return found
        bias = None if self.bias is None else self._loaded(self.bias)
        return multiply(self._program, self.tensors(), input, bias)

    @property
    def matrix(self) -> StructuredMatrix:
        """The weight as a value that shares the layer's parameters."""
        dtype = self._dtype if self.bias is None else self._loaded(self.bias).dtype
        return StructuredMatrix(self.structure, (self.out_features, self.in_features), self.tensors(), dtype=dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        structure: Structure,
        *,
        second_moment: Tensor | None = None,
        sweeps: int = DEFAULT_SWEEPS,
        seed: int = 0,
    ) -> Self:
        """The layer whose weight is the projection of ``linear.weight`` on the structure; see :func:`project`."""
        found = project(linear.weight, structure, second_moment=second_moment, sweeps=sweeps, seed=seed)
        return cls.from_matrix(found.matrix, linear.bias)

    @classmethod
    def from_matrix(cls, matrix: StructuredMatrix, bias: Tensor | None = None) -> Self:
        """The layer that owns a copy of a structured matrix and, if given, a bias (out_features,).

        Raises:
            StructureError: the matrix is a transpose, which is in general no member of its family.
        """
        matrix.check_member()
        out_features, in_features = matrix.shape
        layer = cls(
            in_features, out_features, bias is not None, structure=matrix.structure, device="meta", dtype=matrix.dtype
        )
        layer.to_empty(device=matrix.device)
        with torch.no_grad():
            for name, tensor in matrix.tensors.items():
                getattr(layer, name).copy_(layer._stored(tensor.detach()))
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(layer._stored(bias.detach()))
        return layer

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same weight and bias."""
        with torch.no_grad():
            weight = self.matrix.to_dense()
            linear = nn.Linear(
                self.in_features, self.out_features, self.bias is not None, device=weight.device, dtype=weight.dtype
            )
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self._loaded(self.bias))
        return linear.train(self.training)

    def harden(self) -> Self:
        """The layer in which soft choices are made (:meth:`Structure.harden`); the others are copied as they are."""
        shape = (self.out_features, self.in_features)
        with torch.no_grad():
            structure, tensors = self.structure.harden(shape, self.tensors())
            matrix = StructuredMatrix(structure, shape, tensors, dtype=self.matrix.dtype)
            bias = None if self.bias is None else self._loaded(self.bias)
            return type(self).from_matrix(matrix, bias).train(self.training)

    def freeze(self, rows: int | None = None) -> FrozenLinear:
        """The layer for deployment: what runs faster put together is put together, nothing is left to train.

        A complex ``PermutedButterfly`` that still is the Fourier transform becomes PyTorch's.

        Args:
            rows: of a typical call (all leading axes together). Few rows ask for other forms than many: a sparse matrix
                with one vector is slower than the dense one, for instance. Many by default.
        """
        with torch.no_grad():
            tensors = self.tensors()
            bias = None if self.bias is None else self._loaded(self.bias).detach().clone()
            found = fourier_program(self.structure, (self.out_features, self.in_features), tensors)
            if found is not None:
                return FrozenLinear(*found, bias)
            program, made = fuse(self._program, tensors, writing_for(self._program, tensors, rows))
            form = parts_form(program, made, complex_in=True) if self._complex else None
            if form is not None and form.complex_out and runs_native(program, made, rows):
                parts = {name: t.detach().clone() for name, t in form.tensors(made).items()}
                shift = None if bias is None else torch.view_as_real(bias).flatten()
                return FrozenLinear(form.program, parts, shift, on_parts=True)
        return FrozenLinear(program, {name: t.detach().clone() for name, t in made.items()}, bias)

    def explain(self, batch: int = 1) -> str:
        """What runs for ``batch`` rows: the program, the form of each stage, and the operations."""
        return _explained(self._program, self.tensors(), batch, complex_weights=self._complex)

    def extra_repr(self) -> str:
        count = sum(getattr(self, n).numel() for n, s in specs(self.structure, self.matrix.shape).items() if s.learned)
        share = count / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"structure={self.structure}, {share:.1%} of dense"
        )


_KEPT_SHAPES = 1024
"""Shapes of inputs for which a frozen layer keeps what is the fastest way."""


class FrozenLinear(nn.Module):
    """A fused program with fixed tensors: what :meth:`StructuredLinear.freeze` returns. Rows as ``nn.Linear``.

    Args:
        program: what is multiplied by.
        tensors: what it reads.
        bias: added to each row, or None.
        on_parts: whether the program and the bias are real, and take complex numbers for pairs ``(re, im)``.
    """

    bias: Tensor | None
    dense: Tensor | None

    def __init__(
        self, program: Program, tensors: dict[str, Tensor], bias: Tensor | None, *, on_parts: bool = False
    ) -> None:
        super().__init__()
        parts = 2 if on_parts else 1
        self.in_features, self.out_features = program.in_features // parts, program.out_features // parts
        self._on_parts = on_parts
        self.program = program
        self._standing = Standing(program)
        self._convolved = convolved(program)
        self._fourier = program if isinstance(program, Fourier) else None
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.register_buffer("dense", None, persistent=False)
        self._holds_dense = False
        # Whether nothing is to be asked before the short way of standing tensors.
        self._can_be_short = not on_parts and self._convolved is None and self._fourier is None
        self._is_short = self._can_be_short
        self._denser: dict[torch.Size, bool] = {}  # whether the dense matrix is the fastest way for an input
        self._denser_for = (-1, 0)  # for which state of the measurements, and how many threads

    def hold_dense(self, hold: bool = True) -> None:
        """Hold the dense matrix too, or no longer: it is used for the numbers of rows for which :func:`structmat.tune`
        found it to be the fastest way, and is no part of what is saved."""
        self.dense = None
        if hold:
            tensors = self.tensors()
            like = next((t for t in tensors.values() if t.dtype != torch.int64), torch.empty(0))
            with torch.no_grad():
                self.dense = dense(self.program, tensors, like.dtype, like.device).contiguous()
        self._holds_dense = hold
        self._is_short = self._can_be_short and not hold

    def forward(self, input: Tensor) -> Tensor:
        """Rows (..., in_features) to (..., out_features)."""
        if self._is_short and not is_compiling():
            short = self._standing(input, self._buffers)
            return multiply(self.program, self.tensors(), input, self.bias) if short is None else short
        if self._fourier is not None and input.is_complex() and input.numel() > 0 and not self._holds_dense:
            transform = torch.fft.ifft if self._fourier.inverse else torch.fft.fft
            found: Tensor = transform(input)
            bias = self._buffers["bias"]  # a module attribute takes 0.4 of the 7 microseconds of such a call
            return found if bias is None else found + bias
        if self._on_parts:
            wide = input if input.is_complex() else torch.complex(input, torch.zeros_like(input))
            input = torch.view_as_real(wide.resolve_conj()).flatten(-2)
        y = self._product(input)
        return torch.view_as_complex(y.contiguous().unflatten(-1, (-1, 2))) if self._on_parts else y

    def _product(self, x: Tensor) -> Tensor:
        compiling = is_compiling()
        if self._holds_dense and not compiling:
            if self._denser_for != (tuning.generation, torch.get_num_threads()):
                self._denser_for = tuning.generation, torch.get_num_threads()
                self._denser.clear()
            dense = self._denser.get(x.shape)
            if dense is None:
                if len(self._denser) >= _KEPT_SHAPES:
                    self._denser.clear()
                dense = self._denser[x.shape] = self._is_denser(x)
            if dense and x.dtype is self._buffers["dense"].dtype and x.is_cpu:  # type: ignore[union-attr]
                return functional.linear(x, self._buffers["dense"], self._buffers["bias"])  # type: ignore[arg-type]
        if not compiling:
            if self._convolved is not None:
                weight = self._buffers[self._convolved.stage.weight]
                found = None if weight is None else self._convolved(x, weight, self._buffers["bias"])
                if found is not None:
                    return found
            found = self._standing(x, self._buffers)
            if found is not None:
                return found
        return multiply(self.program, self.tensors(), x, self.bias)

    def tensors(self) -> dict[str, Tensor]:
        """What the program reads, by name."""
        return {name: getattr(self, name) for name in self._names}

    def explain(self, batch: int = 1) -> str:
        """What runs for ``batch`` rows, as :meth:`StructuredLinear.explain` says it."""
        tensors = self.tensors()
        said = _explained(self.program, tensors, batch, complex_weights=any(t.is_complex() for t in tensors.values()))
        if self._holds_dense:
            said += "\nThe dense matrix is held too, for the numbers of rows for which it was measured to be faster."
        return said

    def _is_denser(self, x: Tensor) -> bool:
        """Whether the dense matrix was measured to be the fastest way for so many rows."""
        if self.dense is None or x.dim() == 0 or x.shape[-1] != self.program.in_features:
            return False
        name = tuning.name_of(self.program, self.dense.dtype)
        return tuning.best(name, x.numel() // self.program.in_features, tuple(tuning.Way)) is tuning.Way.DENSE

    def extra_repr(self) -> str:
        patterns = [s.pattern if isinstance(s, Contraction) else str(s) for s in stages(self.program)]
        return f"in_features={self.in_features}, out_features={self.out_features}, stages={patterns}"


def _explained(program: Program, tensors: Mapping[str, Tensor], batch: int, *, complex_weights: bool) -> str:
    """What ``explain`` of a layer returns."""
    lines = [table(program), ""]
    ways = {False: "Without gradients", True: "With gradients"}
    ran = {w: runs_native(program, tensors, batch, recorded=w) for w in ways}
    for recorded, when in ways.items():
        if ran[recorded]:
            passes = "in one pass over tiles of the batch" + (" in each direction" if recorded else "")
            lines.append(f"{when}: native backend, all stages {passes}.")
    if any(ran.values()):
        others = [when.lower() for recorded, when in ways.items() if not ran[recorded]]
        lines.append(f"{' and '.join([*others, 'in compiled graphs']).capitalize()}:")
    for number, stage in enumerate(stages(program), 1):
        lines.append(f"{number}. {stage}: reference backend, {form(stage).value}")
    amount = cost(program, complex_weights=complex_weights)
    lines.append(f"{batch} rows: {batch * amount.flops} FLOPs, {batch * amount.macs} multiply-adds")
    return "\n".join(lines)


def multiply(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """``S x + b``, in the dtype of autocast where it is on."""
    kind = x.device.type
    # The meta device knows no autocast, and asking it is an error.
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.is_floating_point():
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
        # What a matrix is a function of stays as it is: nodes that differ by little must not become equal.
        kept = {name for stage in stages(program) if isinstance(stage, Generated) for name in stage.weights}
        tensors = {n: t.to(dtype) if t.is_floating_point() and n not in kept else t for n, t in tensors.items()}
        bias = bias.to(dtype) if bias is not None and bias.is_floating_point() else bias
    return apply(program, tensors, x) if bias is None else affine(program, tensors, x, bias)
