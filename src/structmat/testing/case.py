"""What a check works on, and how large its rounding errors may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.func import jacrev

from structmat.matrix import StructuredMatrix
from structmat.nn.linear import StructuredLinear
from structmat.program import (
    Call,
    Chain,
    Complex,
    Convolution,
    Cosine,
    Derived,
    Diagonal,
    Fourier,
    Generated,
    Hadamard,
    Pairs,
    Program,
    Real,
    Stage,
    Sum,
    apply,
    cost,
    derive,
    stages,
    unsigned,
)
from structmat.program.derived import Form, derived_functions
from structmat.structure import Shape, Structure, resolve


class SkippedCheckError(Exception):
    """A check can't run here or has nothing to say; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """A structure at a shape, and a seed from which every random number of its checks is drawn."""

    structure: Structure
    shape: Shape
    seed: int = 0

    @cached_property
    def resolved(self) -> Structure:
        return resolve(self.structure, self.shape)

    @cached_property
    def matrix(self) -> StructuredMatrix:
        """A random member in float64."""
        return self.member(torch.float64)

    def member(self, dtype: torch.dtype, *, draw: int = 0) -> StructuredMatrix:
        """The random member number ``draw``."""
        return StructuredMatrix.random(self.structure, self.shape, generator=self.generator(draw), dtype=dtype)

    def layer(self, dtype: torch.dtype, *, draw: int = 0, bias: bool = True) -> StructuredLinear:
        out_features, in_features = self.shape
        return StructuredLinear(
            in_features, out_features, bias, structure=self.structure, dtype=dtype, generator=self.generator(draw)
        )

    def generator(self, draw: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(1000003 * self.seed + draw)

    def rows(self, *batch: int, dtype: torch.dtype, draw: int = 1) -> Tensor:
        """Gaussian input rows (\\*batch, in_features)."""
        return self.gaussian(*batch, self.shape[1], dtype=dtype, draw=draw)

    def gaussian(self, *sizes: int, dtype: torch.dtype, draw: int = 1) -> Tensor:
        return torch.randn(sizes, generator=self.generator(draw), dtype=dtype)

    def require(self, holds: bool, message: str) -> None:
        """Raise an AssertionError that names the structure and the shape unless ``holds``."""
        if not holds:
            raise AssertionError(f"{self.structure} at shape {self.shape}: {message}")

    def compare(self, what: str, got: Tensor, expected: Tensor, allowed: Tensor | float) -> None:
        """Require equal shapes, finite values and differences of at most ``allowed``, entry by entry."""
        self.require(
            got.shape == expected.shape, f"{what} has shape {tuple(got.shape)} instead of {tuple(expected.shape)}."
        )
        if got.numel() == 0:
            return
        self.require(bool(torch.isfinite(got).all()), f"{what} has entries that are NaN or infinite.")
        wide = torch.complex128 if got.is_complex() or expected.is_complex() else torch.float64
        difference = (got.detach().to(wide) - expected.detach().to(wide)).abs()
        limit = torch.as_tensor(allowed, dtype=torch.float64).broadcast_to(difference.shape)
        excess = difference - limit
        if bool((excess > 0).any()):
            worst = int(excess.argmax())
            found, explained = float(difference.flatten()[worst]), float(limit.flatten()[worst])
            self.require(
                False,
                f"{what} is wrong in {int((excess > 0).sum())} of {got.numel()} entries: the worst differs by "
                f"{found:.3g} where rounding explains {explained:.3g}.",
            )


# --------------------------------------------------------------------------------------------------- rounding errors


def roundings(program: Program) -> int:
    """How many roundings a value passes on its way, for sums that are accumulated pairwise or wider (as BLAS does).

    Every level of gates rounds a product and a sum, every stage may store its result in a narrower dtype, and the
    constants account for the operands and the comparison.
    """
    generated = sum(stage.roundings for stage in stages(program) if isinstance(stage, Generated))
    made = sum(stage.form.roundings for stage in stages(program) if isinstance(stage, Derived))
    return 2 * cost(program).depth + len(stages(program)) + generated + made + 4


def magnitude(
    program: Program, tensors: Mapping[str, Tensor], x: Tensor, given: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The program with absolute values everywhere: what its rounding errors are proportional to.

    ``|fl(S x) - S x| <= k eps magnitude(|S|, |x|)`` with ``k`` from :func:`roundings`, the usual forward error bound
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3). It can be differentiated: its gradients bound
    the rounding errors of the gradients in the same way.

    Args:
        program: any program.
        tensors: its tensors, already absolute values in float64 (index tensors as they are).
        x: absolute values (batch, in_features) in float64.
        given: the tensors with their signs, on which the entries of a generated matrix depend; ``tensors`` if None.
    """
    given = tensors if given is None else given
    if isinstance(program, Chain):
        for step in program.steps:
            x = magnitude(step, tensors, x, given)
        return x
    if isinstance(program, Sum):
        return torch.stack([magnitude(part, tensors, x, given) for part in program.parts]).sum(0)
    if isinstance(program, Generated):
        size = _generated_size(program, tensors, given)
        return x @ (size if program.transposed else size.T)
    if isinstance(program, Convolution):
        return _convolution_size(program, tensors[program.weight], x)
    if isinstance(program, Real | Complex):
        return x
    if isinstance(program, Fourier):  # entries of modulus 1, or 1 / n
        total = x.sum(-1, keepdim=True) / (program.size if program.inverse else 1)
        return total.expand(-1, program.size)
    if isinstance(program, Hadamard):
        return x.sum(-1, keepdim=True).expand(-1, program.size)
    if isinstance(program, Cosine):  # entries of modulus at most sqrt(2 / n)
        return (x.sum(-1, keepdim=True) * math.sqrt(2 / program.size)).expand(-1, program.size)
    if isinstance(program, Pairs):
        if isinstance(program.stage, Fourier):
            total = x.sum(-1, keepdim=True) / (program.stage.size if program.stage.inverse else 1)
            return total.expand(-1, program.out_features)
        return apply(unsigned(program), tensors, x)
    if isinstance(program, Diagonal) and program.spectrum:
        return x * tensors[program.weight].sum()
    if isinstance(program, Call):  # nothing is known of the function but its matrix
        eye = torch.eye(program.in_features, dtype=x.dtype)
        return x @ apply(program, tensors, eye).abs()
    assert isinstance(program, Stage)
    return apply(program, tensors, x)


def _convolution_size(stage: Convolution, weight: Tensor, x: Tensor) -> Tensor:
    """Transforms mix all entries of a block: each output is as uncertain as the sum of all products."""
    if not stage.transform:
        free = replace(stage, twist=None if stage.twist is None else abs(stage.twist))
        return apply(free, {stage.weight: weight}, x)
    blocks = weight.reshape(stage.outputs, stage.inputs, -1).sum(-1) * max(1.0, abs(stage.twist or 1.0))
    shape = (stage.outputs, stage.height) if stage.transposed else (stage.inputs, stage.width)
    totals = x.reshape(x.shape[0], *shape).sum(-1)
    mixed = totals @ (blocks if stage.transposed else blocks.T)
    return mixed.repeat_interleave(stage.width if stage.transposed else stage.height, -1)


def _generated_size(stage: Generated, tensors: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
    """What the rounding errors of a generated matrix are proportional to: the function of the moduli of its tensors,
    but for those that enter with their sign. Where a gradient in the moduli of these is wanted, it is the sum of the
    moduli of the entries' derivatives."""
    function = stage.size or stage.function
    names = [name for name, _ in stage.tensors]
    values = [_wide(given[name].detach()) if name in stage.signed else tensors[name] for name in names]
    rest = (*(given[name] for name in stage.fixed), *stage.arguments)
    size = function(*values, *rest).abs()
    wanted = tuple(i for i, name in enumerate(names) if name in stage.signed and tensors[name].requires_grad)
    if wanted:
        fixed = [value.detach() for value in values]
        slopes = jacrev(lambda *v: function(*v, *rest), wanted)(*fixed)
        for index, slope in zip(wanted, slopes, strict=True):
            modulus = tensors[names[index]]
            size = size + (slope.abs().flatten(2) @ (modulus - modulus.detach()).flatten()[:, None])[..., 0]
    return size


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def absolute(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moduli of the learned tensors in float64; index tensors as they are."""
    return {
        name: t.detach().abs().to(torch.float64) if t.is_floating_point() or t.is_complex() else t
        for name, t in tensors.items()
    }


def allowed_error(program: Program, tensors: Mapping[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest rounding error that ``apply(program, tensors, x)`` may show in ``dtype``, entry by entry."""
    rows = x.detach().abs().to(torch.float64)
    flat = rows.reshape(-1, program.in_features)
    plain, made = derive(program, tensors)
    size = magnitude(plain, absolute(made), flat, made).reshape(*x.shape[:-1], program.out_features)
    return roundings(program) * torch.finfo(dtype).eps * size


def allowed_gradient_errors(
    program: Program, tensors: Mapping[str, Tensor], x: Tensor, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same for the gradients of ``(apply(program, tensors, x) * weights).sum()``: in ``x`` and each tensor."""
    given = [name for name, t in tensors.items() if t.is_floating_point() or t.is_complex()]
    constants, functions = roundings(program), derived_functions(program)
    program, made = derive(program, tensors)
    sizes = absolute(made)
    learned = [name for name, t in sizes.items() if t.is_floating_point()]
    for name in learned:
        sizes[name].requires_grad_()
    rows = x.detach().abs().to(torch.float64).requires_grad_()
    total = (magnitude(program, sizes, rows, made) * weights.detach().abs().to(torch.float64)).sum()
    grads = torch.autograd.grad(total, [rows, *(sizes[name] for name in learned)], materialize_grads=True)
    # Forward and backward both round, and a gradient of a tensor sums over the batch.
    scale = 2 * (constants + x.shape[0]) * torch.finfo(dtype).eps
    limits = {name: scale * g for name, g in zip(learned, grads[1:], strict=True)}
    for name, (source, form) in functions.items():
        limits[source] = limits[source] + _pulled_back(form, tensors[source], limits.pop(name))
    return scale * grads[0], {name: limits[name] for name in given}


def _pulled_back(form: Form, tensor: Tensor, limit: Tensor) -> Tensor:
    """What errors of at most ``limit`` in the gradient of ``form(tensor)`` may do to that of the tensor: ``|J|^T``."""
    value, pull = torch.func.vjp(form, tensor.detach())[:2]
    flat, total = limit.reshape(-1), torch.zeros(tensor.numel(), dtype=torch.float64)
    for rows in torch.arange(value.numel()).split(256):
        units = value.new_zeros(len(rows), value.numel())
        units[torch.arange(len(rows)), rows] = 1.0
        moved = torch.func.vmap(pull)(units.reshape(-1, *value.shape))[0]
        total += (moved.abs().to(torch.float64).reshape(len(rows), -1) * flat[rows, None]).sum(0)
    return total.reshape(tensor.shape)
