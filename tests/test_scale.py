"""Layers that start smaller or larger."""

import market
import pytest
import torch
from torch import nn

import structmat as sm
from structmat.errors import StructureError
from structmat.structure import Shape, Structure, is_matrix

SHAPE = (12, 18)

FIXED = (
    sm.OrthogonalButterfly,
    sm.Permutation,
    sm.SoftPermutation,
)
"""Families of which a multiple of a member is none."""

SCALABLE = [(s, shape) for s, shape in market.one_a_family(SHAPE) if is_matrix(s) and not isinstance(s, FIXED)]


@pytest.mark.parametrize(("structure", "shape"), SCALABLE, ids=lambda value: str(value))
def test_the_matrix_of_a_layer_of_any_family_is_multiplied(structure: Structure, shape: Shape) -> None:
    layer = sm.nn.StructuredLinear(
        shape[1],
        shape[0],
        structure=structure,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    assert layer.bias is not None
    before, bias = layer.matrix.to_dense().detach().clone(), layer.bias.detach().clone()
    sm.nn.scale_(layer, 0.25)
    torch.testing.assert_close(layer.matrix.to_dense(), before / 4)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("structure", [sm.OrthogonalButterfly(), sm.Permutation(), sm.SoftPermutation()], ids=str)
def test_a_family_without_multiples_is_refused_by_name(structure: Structure) -> None:
    layer = sm.nn.StructuredLinear(16, 16, structure=structure)
    with pytest.raises(StructureError, match=type(structure).__name__):
        sm.nn.scale_(layer, 2.0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 3),
        nn.Conv2d(2, 4, 3),
        nn.ConvTranspose1d(2, 4, 3),
        sm.nn.StructuredConv2d(4, 6, 3, structure=sm.LowRank(3)),
        sm.nn.StructuredConv2d(4, 6, 3, structure=sm.nn.CP(3)),
        sm.nn.WindowedLinear(5, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_dense_layers_convolutions_and_windows_are_multiplied_too(layer: nn.Module) -> None:
    shape = {nn.Conv2d: (2, 2, 7, 7), nn.ConvTranspose1d: (2, 2, 7), sm.nn.StructuredConv2d: (2, 4, 7, 7)}
    x = torch.randn(shape.get(type(layer), (2, 5)), generator=torch.Generator().manual_seed(1))
    layer.bias = None
    before = layer(x)
    sm.nn.scale_(layer, 0.5)
    torch.testing.assert_close(layer(x), before / 2)


def test_a_table_of_embeddings_is_multiplied() -> None:
    table = sm.nn.StructuredEmbedding(20, 8, structure=sm.LowRank(2))
    before = table(torch.arange(20))
    sm.nn.scale_(table, 0.02)
    torch.testing.assert_close(table(torch.arange(20)), before * 0.02)


def test_factors_that_are_no_numbers_and_other_modules_are_refused() -> None:
    with pytest.raises(StructureError, match="finite"):
        sm.nn.scale_(nn.Linear(2, 2), float("nan"))
    with pytest.raises(StructureError, match="not LayerNorm"):
        sm.nn.scale_(nn.LayerNorm(4), 0.5)
