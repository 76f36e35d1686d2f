"""A structured matrix as a value: structure, shape and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from structmat.errors import ShapeError, StructureError
from structmat.kernels import apply, apply_columns
from structmat.program import Cost, Program, build, cost, transpose
from structmat.program.dense import dense
from structmat.program.padding import padding_factor
from structmat.structure import Shape, Structure, allows_complex, check_shape, resolve, specs

if TYPE_CHECKING:
    from structmat.circuit import Circuit


class StructuredMatrix:
    """A member of a family, of shape ``(out_features, in_features)``; immutable.

    ``S @ x`` and ``x @ S`` multiply as ``torch.matmul``; ``S.T`` is the transpose, reading the same tensors.

    Args:
        structure: the family; fractions are resolved for the shape.
        shape: of the matrix (before transposition).
        tensors: by the structure's own names, learned and fixed.
        transposed: whether this value stands for the transpose.
        dtype: of the matrix, for structures without tensors of numbers (permutations); PyTorch's default if None.

    Raises:
        ShapeError: the structure refuses the shape, or a tensor is missing, unknown or of the wrong shape.
    """

    __slots__ = ("_dtype", "_shape", "_transposed", "structure", "tensors")

    structure: Structure
    tensors: Mapping[str, Tensor]

    def __init__(
        self,
        structure: Structure,
        shape: Shape,
        tensors: Mapping[str, Tensor],
        *,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._shape = check_shape(shape)
        self.structure = resolve(structure, self._shape)
        expected = specs(self.structure, self._shape)
        if set(tensors) != set(expected):
            raise ShapeError(f"{self.structure} has the tensors {sorted(expected)}; got {sorted(tensors)}.")
        for name, spec in expected.items():
            if tuple(tensors[name].shape) != spec.shape:
                raise ShapeError(
                    f"{name} of {self.structure} at shape {self._shape} has shape {spec.shape}; "
                    f"got {tuple(tensors[name].shape)}."
                )
        self.tensors = MappingProxyType(dict(tensors))
        self._transposed = transposed
        self._dtype = dtype

    @classmethod
    def random(
        cls,
        structure: Structure,
        shape: Shape,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A member drawn by the family's own initialisation: the output variance of a dense layer's."""
        tensors = draw(structure, shape, generator=generator, dtype=dtype, device=device)
        return cls(structure, shape, tensors, dtype=dtype)

    @property
    def shape(self) -> Shape:
        """``(out_features, in_features)``."""
        return (self._shape[1], self._shape[0]) if self._transposed else self._shape

    @property
    def is_transposed(self) -> bool:
        """Whether this value stands for the transpose of a member."""
        return self._transposed

    def check_member(self) -> None:
        """Raise unless this value is a member of its family, whose tensors a layer can own.

        Raises:
            StructureError: it is a transpose.
        """
        if self._transposed:
            raise StructureError(
                f"{self.structure} of shape {self.shape} is given transposed, which is in general no member of the "
                "family. Give matrix.T, or project matrix.to_dense() on the family."
            )

    @property
    def T(self) -> StructuredMatrix:
        """The transpose (not conjugated). ``S.T.T`` has the program of ``S``."""
        other = not self._transposed
        return StructuredMatrix(self.structure, self._shape, self.tensors, transposed=other, dtype=self._dtype)

    @property
    def program(self) -> Program:
        """The linear circuit that runs, at block granularity."""
        program = build(self.structure, self._shape)
        return transpose(program) if self._transposed else program

    @property
    def cost(self) -> Cost:
        """Operations and depth of one product with a vector."""
        return cost(self.program, complex_weights=self.dtype.is_complex)

    @property
    def num_parameters(self) -> int:
        """Learned numbers; a complex one counts as two, indices do not count."""
        learned = [self.tensors[name] for name, spec in specs(self.structure, self._shape).items() if spec.learned]
        return sum(t.numel() * (2 if t.is_complex() else 1) for t in learned)

    @property
    def flops(self) -> int:
        """Multiplications plus additions of one product with a vector, in real arithmetic."""
        return self.cost.flops

    @property
    def macs(self) -> int:
        """Multiply-adds of one product with a vector."""
        return self.cost.macs

    @property
    def depth(self) -> int:
        """Levels of gates ``alpha * g + beta * h`` in the circuit."""
        return self.cost.depth

    @property
    def dtype(self) -> torch.dtype:
        """Of the learned tensors."""
        dtypes = [t.dtype for t in self.tensors.values() if t.is_floating_point() or t.is_complex()]
        return dtypes[0] if dtypes else self._dtype or torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where the tensors are; the CPU if there are none."""
        for tensor in self.tensors.values():
            return tensor.device
        return torch.device("cpu")

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> StructuredMatrix:
        """A copy with the learned tensors in another dtype, or all tensors on another device."""
        moved = {
            name: t.to(device=device, dtype=dtype if t.is_floating_point() or t.is_complex() else None)
            for name, t in self.tensors.items()
        }
        kept = dtype or self._dtype
        return StructuredMatrix(self.structure, self._shape, moved, transposed=self._transposed, dtype=kept)

    def circuit(self) -> Circuit:
        """The matrix gate by gate: ``circuit().multiplications`` and ``additions`` are those of :attr:`cost`.

        The parameters are the entries of the learned tensors. See :func:`structmat.program.circuit.to_circuit`.
        """
        from structmat.program.circuit import to_circuit  # SciPy's sparse matrices are not needed before

        return to_circuit(self.program, self.tensors)

    def solve(self, b: Tensor) -> Tensor:
        """``x`` with ``S x = b``, for a square matrix and ``b`` (n,) or (n, k).

        By the family's own structure where it has one to solve with, else with the dense matrix;
        :func:`structmat.displacement.solve` says which, and how well. No gradients flow through it.

        Raises:
            ShapeError: the matrix is not square, or ``b`` does not fit it.
            DataError: the matrix is singular to working precision.
        """
        from structmat.displacement.solve import solve  # of a higher layer

        return solve(self, b).x

    def to_dense(self) -> Tensor:
        """The matrix written out, (out_features, in_features)."""
        return dense(self.program, self.tensors, self.dtype, self.device)

    def __matmul__(self, x: Tensor) -> Tensor:
        return matmul(self, x)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """``x @ S``: rows times the matrix, ``x`` of shape (..., out_features)."""
        if not isinstance(x, Tensor):
            return NotImplemented
        return apply(transpose(self.program), self.tensors, x)

    def __repr__(self) -> str:
        share = self.num_parameters / (self.shape[0] * self.shape[1])
        return (
            f"StructuredMatrix({self.structure}{'.T' if self._transposed else ''}, shape={self.shape}, "
            f"dtype={self.dtype}, {self.num_parameters} parameters = {share:.1%} of dense)"
        )


def matmul(matrix: StructuredMatrix, x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``matrix @ x`` as ``torch.matmul``: ``x`` of shape (in,) or (..., in, columns).

    Args:
        matrix: the left operand, (out_features, in_features).
        x: a vector or (a batch of) matrices whose columns are multiplied.
        out: where to write the result, of its exact shape; no copy is made if it has the dtype of ``x`` and is
            contiguous or the transpose of a contiguous matrix.

    Raises:
        ShapeError: the axis that is contracted, or ``out``, does not have the right size.
    """
    if x.dim() == 0 or x.shape[-1 if x.dim() == 1 else -2] != matrix.shape[1]:
        raise ShapeError(
            f"A matrix of shape {matrix.shape} multiplies vectors ({matrix.shape[1]},) or columns "
            f"(..., {matrix.shape[1]}, k); got shape {tuple(x.shape)}."
        )
    shape = x.shape[: max(0, x.dim() - 2)] + matrix.shape[:1] + (x.shape[-1:] if x.dim() > 1 else ())
    if out is not None and out.shape != shape:
        raise ShapeError(f"out has shape {tuple(out.shape)}; the result has shape {tuple(shape)}.")
    if x.dim() > 1:
        return apply_columns(matrix.program, matrix.tensors, x, out=out)
    result = apply(matrix.program, matrix.tensors, x)
    return result if out is None else out.copy_(result)


def draw(
    structure: Structure,
    shape: Shape,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Fresh tensors of a structure; drawn on the CPU, so that a seed means the same matrix on every device.

    Raises:
        ShapeError: the structure refuses the shape.
        StructureError: the dtype is complex and the structure is real.
    """
    dtype = dtype or torch.get_default_dtype()
    if dtype.is_complex and not allows_complex(structure):
        raise StructureError(f"{structure} has real tensors and can't be drawn in {dtype}. Use a floating dtype.")
    where = torch.device(device) if device is not None else torch.get_default_device()
    declared = specs(structure, shape)
    if where.type == "meta":
        return {name: torch.empty(s.shape, dtype=s.dtype or dtype, device=where) for name, s in declared.items()}
    factor, scaled = padding_factor(structure, shape)
    tensors = {}
    for name, spec in declared.items():
        drawn = spec.init.draw(spec.shape, generator=generator, dtype=spec.dtype or dtype, device=where)
        tensors[name] = _owned(drawn * factor if name in scaled else drawn)
    return tensors


def _owned(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: a view of a larger one is saved and exported with all of it."""
    filled = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if filled and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
