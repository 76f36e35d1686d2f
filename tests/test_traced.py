"""``torch.jit.trace``: what is recorded holds for other numbers of rows than that it was recorded with."""

from __future__ import annotations

import pytest
import torch
from market import one_a_family
from torch import nn

import structmat as sm
from structmat.nn.kronecker.convolution import KroneckerConv2d

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

OUT, IN = 24, 20


CASES = {type(structure).__name__: (structure, shape) for structure, shape in one_a_family((OUT, IN))}


def agree(module: nn.Module, recorded: torch.Tensor, others: torch.Tensor) -> None:
    traced = torch.jit.trace(module, recorded, check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(traced(others), module(others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recorded", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("name", CASES)
def test_layers_are_traced(name: str, recorded: bool, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    structure, (height, width) = CASES[name]
    layer = sm.nn.StructuredLinear(width, height, structure=structure)
    x, others = (torch.randn(rows, width, generator=generator) for rows in (2, 33))
    with torch.set_grad_enabled(recorded):
        agree(layer, x.requires_grad_(recorded), others)


MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "frozen": (sm.nn.StructuredLinear(IN, OUT, structure=sm.Monarch(blocks=4)).freeze(2), (IN,)),
    "frozen convolution": (sm.nn.StructuredLinear(IN, OUT, structure=sm.Toeplitz()).freeze(2), (IN,)),
    "image": (sm.nn.StructuredConv2d(3, 8, 3, structure=sm.LowRank(4)), (3, 9, 9)),
    "patches": (sm.nn.StructuredConv2d(3, 8, 3, structure=sm.Sparse(0.3)), (3, 4, 4)),
    "Kronecker image": (KroneckerConv2d(4, 6, 3), (4, 9, 9)),
    "block": (sm.nn.KroneckerBlock(IN, OUT, terms=2), (IN,)),
    "network": (sm.nn.KroneckerNetwork([(4, 5), (6, 4), (2, 3)]), (IN,)),
    "circuit": (
        sm.nn.ConvAC(None, sm.nn.ModeTree.sequence(4), 3, 2, channels=3, semiring=sm.nn.convac.Plain()),
        (3, 4),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_other_modules_are_traced(name: str, generator: torch.Generator) -> None:
    module, shape = MODULES[name]
    agree(module.eval(), *(torch.rand(rows, *shape, generator=generator) for rows in (2, 5)))


@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen"])
def test_no_parts_of_a_large_batch_are_recorded(frozen: bool, generator: torch.Generator) -> None:
    """Rows that are transformed in parts, for the cache, are so only where nobody records."""
    layer = sm.nn.StructuredLinear(300, 400, structure=sm.Toeplitz())
    recorded, others = (torch.randn(rows, 300, generator=generator) for rows in (1000, 2200))
    with torch.no_grad():
        agree(layer.freeze() if frozen else layer, recorded, others)


def test_embeddings_are_traced() -> None:
    table = sm.nn.StructuredEmbedding(30, 8, structure=sm.LowRank(2))
    agree(table, torch.arange(4), torch.arange(30))
