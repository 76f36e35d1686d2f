"""Rows of structured matrices: taken from the tensors, equal to those of the matrix written out."""

from __future__ import annotations

import market
import pytest
import torch
from torch import Tensor

import structmat as sm
from structmat.errors import ModelError, ShapeError, StructureError
from structmat.nn import StructuredEmbedding, StructuredLinear
from structmat.program import Contraction, build, lookup_cost, take_rows
from structmat.structure import Shape, Structure, resolve, specs

SHAPES: tuple[Shape, ...] = ((1, 7), (5, 1), (12, 10), (13, 17), (64, 16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_every_family_are_those_of_the_matrix(shape: Shape) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([[0, shape[0] - 1, shape[0] // 2], [shape[0] - 1, 0, 0]])
    for structure in market.members(shape):
        if not all(spec.dtype is None or not spec.dtype.is_complex for spec in specs(structure, shape).values()):
            continue
        matrix = sm.StructuredMatrix.random(structure, shape, generator=generator, dtype=torch.float64)
        rows = take_rows(matrix.program, matrix.tensors, index)
        torch.testing.assert_close(rows, matrix.to_dense()[index], msg=lambda m, s=structure: f"{s}: {m}")
        assert lookup_cost(matrix.program).macs >= 0


@pytest.mark.parametrize(
    ("structure", "macs"),
    [
        (sm.Dense(), 0),
        (sm.LowRank(4), 4 * 16),
        (sm.TensorTrain(3, 2, (8, 8), (4, 4)), 3 * 4 * 4),
        (sm.Kronecker(2, ((8, 4), (8, 4))), 2 * 4 * 4),
        (sm.BlockDiagonal(4), 0),
        (sm.Sum(sm.LowRank(2), sm.BlockDiagonal(4)), 2 * 16),
        (sm.Monarch((4, 16), 1), 16),
    ],
    ids=str,
)
def test_a_row_takes_what_its_slices_take(structure: Structure, macs: int) -> None:
    """By hand, for a table of 64 rows of 16 numbers."""
    found = lookup_cost(build(resolve(structure, (64, 16)), (64, 16)))
    assert found.macs == macs
    assert found.widest <= 32


def test_sparse_rows_are_slow_and_said_to_be() -> None:
    table = StructuredEmbedding(64, 16, structure=sm.Sparse(density=0.2))
    assert not table.is_fast
    assert "unit vectors of 64 numbers" in table.explain()
    assert StructuredEmbedding(64, 16, structure=sm.LowRank(2)).is_fast


def test_gradients_are_those_of_the_table() -> None:
    for structure in (sm.LowRank(3), sm.TensorTrain(2), sm.BLAST(2, 3), sm.Monarch(4, 1), sm.SparsePlusLowRank(1, 0.1)):
        table = StructuredEmbedding(24, 8, structure=structure, dtype=torch.float64)
        index = torch.randint(24, (5, 4), generator=torch.Generator().manual_seed(0))
        parameters = list(table.parameters())
        found = torch.autograd.grad(table(index).square().sum(), parameters)
        wanted = torch.autograd.grad(table.matrix.to_dense()[index].square().sum(), parameters)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most numbers of any tensor that an operation returns."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not func.is_view:
            self.most = max(self.most, found.numel())
        return found


@pytest.mark.parametrize(
    "structure", [sm.LowRank(4), sm.TensorTrain(4), sm.Monarch((4, 16), 2), sm.Kronecker(2)], ids=str
)
def test_no_lookup_writes_the_table_out(structure: Structure) -> None:
    table = StructuredEmbedding(4096, 64, structure=structure)
    index = torch.arange(0, 4096, 512)
    with torch.no_grad(), Largest() as mode:
        y = table(index)
    assert y.shape == (8, 64)
    assert mode.most <= 4096 * 64 / 16, "eight rows and what they are made of"


def test_an_embedding_has_the_interface_of_pytorch_s() -> None:
    dense = torch.nn.Embedding(20, 6, padding_idx=-3)
    table = StructuredEmbedding.from_embedding(dense, sm.LowRank(6))
    assert table.padding_idx == dense.padding_idx == 17
    index = torch.tensor([[1, 17], [19, 0]], dtype=torch.int32)
    torch.testing.assert_close(table(index), dense(index), rtol=1e-4, atol=1e-5)
    assert not table(index)[0, 1].any()
    gradients = torch.autograd.grad(table(torch.tensor([17, 17])).sum(), list(table.parameters()))
    assert not any(gradient.any() for gradient in gradients)
    back = table.to_embedding()
    torch.testing.assert_close(back(index), table(index))
    assert table(torch.zeros(0, dtype=torch.long)).shape == (0, 6)
    frozen = table.freeze()
    assert torch.equal(frozen(index), table(index))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_fresh_tables_have_entries_of_variance_one() -> None:
    for structure in (sm.LowRank(8), sm.Monarch(4, 2), sm.TensorTrain(4)):
        tables = [StructuredEmbedding(256, 32, structure=structure).matrix.to_dense() for _ in range(4)]
        assert 0.7 < torch.stack(tables).var().item() < 1.4


def test_what_an_embedding_can_not_do_is_refused() -> None:
    table = StructuredEmbedding(20, 6, 0, structure=sm.LowRank(2))
    with pytest.raises(ShapeError, match="not all among 20"):
        table(torch.tensor([3, 20]))
    with pytest.raises(ShapeError, match="integer"):
        table(torch.tensor([1.0]))
    with pytest.raises(ShapeError, match="padding_idx"):
        StructuredEmbedding(20, 6, 20, structure=sm.LowRank(2))
    with pytest.raises(StructureError, match="real"):
        StructuredEmbedding(20, 6, structure=sm.LowRank(2), dtype=torch.complex64)
    for options, message in (
        ({"max_norm": 1.0}, "max_norm"),
        ({"sparse": True}, "sparse"),
        ({"scale_grad_by_freq": True}, "scale_grad"),
    ):
        with pytest.raises(ModelError, match=message):
            StructuredEmbedding.from_embedding(torch.nn.Embedding(20, 6, **options), sm.LowRank(2))  # type: ignore[arg-type]
    full = torch.nn.Embedding.from_pretrained(torch.ones(20, 6), padding_idx=2)
    with pytest.raises(ModelError, match="padding_idx=2 is not zero"):
        StructuredEmbedding.from_embedding(full, sm.LowRank(2))


def test_a_tied_head_holds_the_same_tensors() -> None:
    table = StructuredEmbedding(20, 6, structure=sm.LowRank(3))
    head = StructuredLinear(6, 20, structure=sm.LowRank(3))
    table.tie(head)
    x = torch.randn(2, 6)
    torch.testing.assert_close(head(x), x @ table.matrix.to_dense().T + head.bias)
    (head(table(torch.tensor([1, 2]))).sum()).backward()
    assert all(p.grad is not None for p in table.parameters())
    with pytest.raises(ModelError, match="tied"):
        table.tie(StructuredLinear(6, 20, structure=sm.LowRank(2)))


def test_a_contraction_with_dense_axes_on_both_sides() -> None:
    """Chosen and dense axes in each of the three parts, shared and not."""
    generator = torch.Generator().manual_seed(1)
    for shared_a in (False, True):
        for shared_d in (False, True):
            second = Contraction("w", 2, 3, 2, 4, shared_a, shared_d)
            first = Contraction("v", 4, 4, 2, 1)
            program = sm.program.Chain((first, second))
            tensors = {
                "v": torch.randn(4, 4, 2, 1, generator=generator, dtype=torch.float64),
                "w": torch.randn(second.stored_shape, generator=generator, dtype=torch.float64),
            }
            eye = torch.eye(8, dtype=torch.float64)
            wanted = sm.program.apply(program, tensors, eye).T
            torch.testing.assert_close(take_rows(program, tensors, torch.arange(24)), wanted)
