"""The embedding whose table is a structured matrix, of which single rows are taken."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from structmat.errors import ModelError, ShapeError, StructureError
from structmat.matrix import StructuredMatrix, draw
from structmat.modes import is_traced
from structmat.program import Program, build, lookup_cost, table, take_rows
from structmat.program.scaling import scaling_cut
from structmat.projection.project import DEFAULT_SWEEPS, project
from structmat.structure import DENSE_GAIN, Structure, resolve, specs


class StructuredEmbedding(nn.Module):
    """``nn.Embedding`` whose table (num_embeddings, embedding_dim) is a member of ``structure``.

    A row is taken from the tensors (:mod:`structmat.program.lookup`), and the table is never written out: of
    ``LowRank(r)`` a row of one factor times the other, of a tensor train a slice of each core. Families whose rows
    can't be taken so (sparse matrices, Fourier transforms) multiply a unit vector for each position and are slow:
    :meth:`lookup_macs` says what a row takes, :attr:`is_fast` which of the two it is.

    The tensors are ordinary parameters and buffers under the structure's own names. An output head with the same table
    is a :class:`StructuredLinear` of this structure and shape; :meth:`tie` lets it hold the same tensors.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: numbers in each.
        padding_idx: a position whose outputs are zero, and which gets no gradient; negative ones count from the end.
        structure: the family; fractions are resolved for the table.
        device, dtype: of the tensors.
        generator: source of randomness of the initialisation, whose entries have variance 1 as ``nn.Embedding``'s.

    Raises:
        ShapeError: the structure refuses the shape, or ``padding_idx`` is no position.
        StructureError: the dtype is complex.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        structure: Structure,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if dtype.is_complex:
            raise StructureError(f"A structured embedding has real tensors, not {dtype}. Use a floating dtype.")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ShapeError(f"padding_idx={padding_idx} is none of the {num_embeddings} positions.")
        shape = (num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.structure = resolve(structure, shape)
        self._program = build(self.structure, shape)
        declared = specs(self.structure, shape)
        self._names, self._dtype = tuple(declared), dtype
        drawn = draw(self.structure, shape, generator=generator, dtype=dtype, device=device)
        # Structures are drawn with the output variance of a dense layer: 1/3 over the length of a row an entry.
        scaled = scaling_cut(self._program) or frozenset()
        factor = (embedding_dim / DENSE_GAIN) ** 0.5
        for name, spec in declared.items():
            tensor = drawn[name] * factor if name in scaled else drawn[name]
            if spec.learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @property
    def program(self) -> Program:
        """What the table is, as a linear circuit."""
        return self._program

    def tensors(self) -> dict[str, Tensor]:
        """The structure's tensors by name (gradients flow to the parameters)."""
        return {name: getattr(self, name) for name in self._names}

    @property
    def matrix(self) -> StructuredMatrix:
        """The table as a value that shares the tensors."""
        shape = (self.num_embeddings, self.embedding_dim)
        return StructuredMatrix(self.structure, shape, self.tensors(), dtype=self._dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Positions (...), integers, to rows (..., embedding_dim).

        Raises:
            ShapeError: the input is not of integers, or (on the CPU) a position is outside of the table.
        """
        if input.is_floating_point() or input.is_complex() or input.dtype == torch.bool:
            raise ShapeError(f"An embedding takes integer positions; got {input.dtype}.")
        if input.device.type == "cpu" and not is_traced() and input.numel():
            least, most = (int(bound) for bound in torch.aminmax(input))
            if least < 0 or most >= self.num_embeddings:
                raise ShapeError(f"Positions from {least} to {most} are not all among {self.num_embeddings} rows.")
        y = take_rows(self._program, self.tensors(), input.long())
        return y if self.padding_idx is None else y.masked_fill((input == self.padding_idx).unsqueeze(-1), 0)

    @property
    def lookup_macs(self) -> int:
        """Multiply-adds that one row takes; a dense table takes none."""
        return lookup_cost(self._program).macs

    @property
    def is_fast(self) -> bool:
        """Whether rows are taken without a unit vector being written out."""
        return has_fast_rows(self._program)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        structure: Structure,
        *,
        second_moment: Tensor | None = None,
        sweeps: int = DEFAULT_SWEEPS,
        seed: int = 0,
    ) -> Self:
        """The embedding whose table is the projection of a dense one's; see :func:`project`.

        Raises:
            ModelError: the dense embedding does what a structured one can't, see :func:`refusal`.
        """
        reason = refusal(embedding)
        if reason is not None:
            raise ModelError(f"The embedding can't be structured: {reason}.")
        found = project(embedding.weight, structure, second_moment=second_moment, sweeps=sweeps, seed=seed)
        return cls.from_matrix(found.matrix, embedding.padding_idx).train(embedding.training)

    @classmethod
    def from_matrix(cls, matrix: StructuredMatrix, padding_idx: int | None = None) -> Self:
        """The embedding that owns a copy of a structured matrix (num_embeddings, embedding_dim).

        Raises:
            StructureError: the matrix is a transpose, which is in general no member of its family.
        """
        matrix.check_member()
        made = cls(*matrix.shape, padding_idx, structure=matrix.structure, device="meta", dtype=matrix.dtype)
        made.to_empty(device=matrix.device)
        with torch.no_grad():
            for name, tensor in matrix.tensors.items():
                getattr(made, name).copy_(tensor)
        return made

    def to_embedding(self) -> nn.Embedding:
        """The dense embedding with the same outputs; the row at ``padding_idx`` is zero."""
        with torch.no_grad():
            weight = self.matrix.to_dense()
            made = nn.Embedding(
                self.num_embeddings, self.embedding_dim, self.padding_idx, device=weight.device, dtype=weight.dtype
            )
            made.weight.copy_(weight)
            if self.padding_idx is not None:
                made.weight[self.padding_idx] = 0
        return made.train(self.training)

    def tie(self, head: nn.Module) -> None:
        """Let a structured layer of the same structure and shape hold the tensors of this one, as a tied output head
        does.

        Raises:
            ModelError: it has another structure or shape.
        """
        shape = (getattr(head, "out_features", None), getattr(head, "in_features", None))
        own = (self.num_embeddings, self.embedding_dim)
        if (getattr(head, "structure", None), shape) != (self.structure, own):
            raise ModelError(
                f"A head that is tied to {self.structure} of shape {own} has these too; got "
                f"{getattr(head, 'structure', type(head).__name__)} of shape {shape}."
            )
        for name in self._names:
            held = head._parameters if name in self._parameters else head._buffers
            held[name] = getattr(self, name)

    def freeze(self, rows: int | None = None) -> Self:
        """A copy for deployment, in evaluation mode, which is not trained.

        Args:
            rows: of a typical call; lookups run the same for all.
        """
        return copy.deepcopy(self).requires_grad_(False).eval()

    def explain(self) -> str:
        """What the table is, and what a row takes."""
        amount = lookup_cost(self._program)
        how = "without unit vectors" if self.is_fast else f"by unit vectors of {amount.widest} numbers"
        return f"{table(self._program)}\n\nA row: {how}, {amount.macs} multiply-adds"

    def extra_repr(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        share = count / (self.num_embeddings * self.embedding_dim)
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, structure={self.structure}, {share:.1%} of dense"


def has_fast_rows(program: Program) -> bool:
    """Whether single rows of a program's matrix are taken without a unit vector of the length of its columns, or one
    that is longer than two rows, being written out."""
    return lookup_cost(program).widest <= 2 * program.in_features


def refusal(embedding: nn.Embedding) -> str | None:
    """Why a structured embedding can't take the place of a dense one, or None."""
    if type(embedding).forward is not nn.Embedding.forward:
        return f"{type(embedding).__name__} has a forward of its own"
    if embedding.max_norm is not None:
        return f"max_norm={embedding.max_norm} rescales rows of its table whenever they are read"
    if embedding.sparse:
        return "sparse=True promises gradients that are sparse tensors of a table"
    if embedding.scale_grad_by_freq:
        return "scale_grad_by_freq=True scales gradients of single rows, which a structure does not have"
    at = embedding.padding_idx
    if at is not None and not embedding.weight.is_meta and bool(embedding.weight[at].any()):
        return f"its row at padding_idx={at} is not zero, which a structured one's is"
    return None
