"""``nn.Embedding``: rows of a table; a tied output head holds the same table and gets the same structure."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from structmat.compression.layers.base import Content, Described, Layer, Load
from structmat.compression.timing import LAYER_SECONDS, interleaved, layer_microseconds
from structmat.errors import ModelError
from structmat.matrix import StructuredMatrix
from structmat.nn.embedding import StructuredEmbedding, has_fast_rows, refusal
from structmat.nn.linear import StructuredLinear
from structmat.program import build, cost, lookup_cost
from structmat.structure import Shape, Structure
from structmat.structures.dense import Dense


@dataclass(frozen=True)
class Table:
    """What the cost of an embedding depends on: how many output heads hold its table too."""

    heads: int = 0


@final
class EmbeddingLayer(Layer):
    """A table (num_embeddings, embedding_dim), kept unless asked for by name. Its rows are looked up; heads that are
    tied to it multiply by it."""

    kinds = ("Embedding",)
    looks_up = True

    def kind(self, module: nn.Module) -> str | None:
        return "Embedding" if isinstance(module, nn.Embedding) else None

    def is_structured(self, module: nn.Module) -> bool:
        return isinstance(module, StructuredEmbedding)

    def refusal(self, module: nn.Module) -> str | None:
        return refusal(cast(nn.Embedding, module))

    def doubt(self, module: nn.Module) -> str | None:
        return "an embedding: rows of a table, compressed where it is asked for by its name"

    def declines(self, site: Described, structure: Structure) -> str | None:
        if isinstance(structure, Dense) or has_fast_rows(build(structure, site.shape)):
            return None
        return "single rows of it can't be taken fast"

    def shape(self, module: nn.Module) -> tuple[int, Shape]:
        rows, width = cast(Tensor, module.weight).shape
        return 1, (rows, width)

    def matrices(self, module: nn.Module) -> Tensor:
        return cast(Tensor, module.weight).detach().unsqueeze(0)

    def assign(self, module: nn.Module, matrices: Tensor) -> None:
        with torch.no_grad():
            cast(Tensor, module.weight).copy_(matrices[0])

    def rows(self, module: nn.Module, x: Tensor) -> Iterator[Tensor]:
        yield x.reshape(1, -1)

    def output_rows(self, module: nn.Module, y: Tensor) -> Tensor:
        return y.reshape(1, -1, y.shape[-1])

    def build(self, module: nn.Module, matrices: Sequence[StructuredMatrix]) -> nn.Module:
        return StructuredEmbedding.from_matrix(matrices[0], cast(nn.Embedding, module).padding_idx)

    def tied(self, layer: nn.Module, head: nn.Module) -> nn.Module:
        """The structured head that holds the tensors of a structured embedding, with the bias of a dense head."""
        embedding = _structured(layer)
        made = StructuredLinear.from_matrix(embedding.matrix, cast(Tensor | None, head.bias))
        embedding.tie(made)
        return made

    def empty(self, module: nn.Module, structure: Structure, dtype: torch.dtype, **more: Any) -> nn.Module:
        like = cast(nn.Embedding | StructuredEmbedding, module)
        return StructuredEmbedding(
            like.num_embeddings, like.embedding_dim, like.padding_idx, structure=structure, device="meta", dtype=dtype
        )

    def content(self, module: nn.Module) -> Content:
        layer = _structured(module)
        return Content(layer.structure, (layer.num_embeddings, layer.embedding_dim), 1, layer.matrix.dtype)

    def to_dense(self, module: nn.Module) -> nn.Module:
        layer = _structured(module)
        made = layer.to_embedding()
        made.weight.requires_grad_(any(p.requires_grad for p in layer.parameters()))
        return made

    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module:
        return _structured(module).freeze(rows)

    def detail(self, module: nn.Module) -> Hashable:
        return Table()

    def flops(self, site: Described, structure: Structure, load: Load) -> float:
        program = build(structure, site.shape)
        taken = 0 if isinstance(structure, Dense) else 2 * lookup_cost(program).macs
        multiplied = cost(program).flops if cast(Table, site.detail).heads else 0
        return taken * load.lookups + multiplied * load.rows

    def microseconds(self, site: Described, structure: Structure, load: Load, samples: int) -> float:
        total = _lookup_microseconds(structure, site.shape, max(1, round(load.lookups * samples)))
        if cast(Table, site.detail).heads:
            total += layer_microseconds(structure, site.shape, max(1, round(load.rows * samples)))
        return total


@lru_cache(maxsize=16384)
def _lookup_microseconds(structure: Structure, shape: Shape, rows: int) -> float:
    """The time of so many lookups in a float32 table on the CPU; as
    :func:`structmat.compression.timing.layer_microseconds`."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(shape[0], (rows,), generator=generator)
    dense = nn.Embedding(*shape)
    with torch.inference_mode():
        if isinstance(structure, Dense):
            first, second = interleaved(lambda: dense(index), lambda: dense(index), seconds=LAYER_SECONDS)
            return 1e6 * statistics.median(first + second)
        layer = StructuredEmbedding(*shape, structure=structure, generator=generator)
        first, second = interleaved(lambda: dense(index), lambda: layer(index), seconds=LAYER_SECONDS)
        ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return ratio * _lookup_microseconds(Dense(), shape, rows)


def _structured(module: nn.Module) -> StructuredEmbedding:
    if not isinstance(module, StructuredEmbedding):
        raise ModelError(f"A {type(module).__name__} is no structured embedding.")
    return module
