"""A frozen layer asks about its tensors once: whatever changes between two calls is noticed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.errors import ShapeError
from structmat.kernels.quick import Standing
from structmat.nn import StructuredLinear


def frozen(structure: sm.Structure, shape: tuple[int, int] = (24, 40)) -> tuple[nn.Module, Tensor]:
    """A frozen layer and what it multiplies by."""
    generator = torch.Generator().manual_seed(0)
    layer = StructuredLinear(shape[1], shape[0], structure=structure, generator=generator)
    return layer.freeze(1), layer.to_linear().weight.detach()


def called(layer: nn.Module, x: Tensor) -> Tensor:
    """Twice, so that the second call is one that asks little."""
    with torch.no_grad():
        layer(x)
        result: Tensor = layer(x)
    return result


STRUCTURES = [sm.LowRank(3), sm.Monarch(4, 0.5), sm.GBLR(0.4), sm.Butterfly()]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 9])
def test_the_second_call_gives_what_the_first_gave(structure: sm.Structure, rows: int) -> None:
    layer, weight = frozen(structure, (32, 32))
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = layer(x), layer(x)
    torch.testing.assert_close(first, x @ weight.T + layer.bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_new_tensors_are_noticed() -> None:
    layer, weight = frozen(sm.LowRank(3))
    x = torch.randn(2, 40)
    called(layer, x)
    name = next(n for n, b in layer.named_buffers() if n != "bias")
    with torch.no_grad():
        setattr(layer, name, 2 * layer.get_buffer(name))
    torch.testing.assert_close(called(layer, x), 2 * x @ weight.T + layer.bias, rtol=1e-4, atol=1e-5)
    replaced = {n: torch.zeros_like(b) for n, b in layer.named_buffers()}
    with torch.no_grad():
        assert torch.func.functional_call(layer, replaced, (x,)).abs().max() == 0
    torch.testing.assert_close(called(layer, x), 2 * x @ weight.T + layer.bias, rtol=1e-4, atol=1e-5)


def test_numbers_written_in_place_are_read() -> None:
    layer, _ = frozen(sm.LowRank(3))
    x = torch.randn(2, 40)
    called(layer, x)
    layer.load_state_dict({n: torch.zeros_like(b) for n, b in layer.state_dict().items()})
    assert called(layer, x).abs().max() == 0


def test_another_dtype_is_noticed() -> None:
    layer, weight = frozen(sm.LowRank(3))
    x = torch.randn(2, 40)
    called(layer, x)
    wide = called(layer.double(), x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, x.double() @ weight.double().T + layer.bias)


def test_rows_of_another_width_are_refused_after_a_call() -> None:
    layer, _ = frozen(sm.LowRank(3))
    called(layer, torch.randn(2, 40))
    with pytest.raises(ShapeError, match="40"), torch.no_grad():
        layer(torch.randn(4, 20))


def test_gradients_of_the_input_are_recorded_after_a_call_without() -> None:
    layer, weight = frozen(sm.LowRank(3))
    x = torch.randn(9, 40)
    called(layer, x)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(9, 40), rtol=1e-4, atol=1e-5)


def test_a_forced_backend_is_kept_to_after_a_call() -> None:
    layer, weight = frozen(sm.LowRank(3))
    x = torch.randn(2, 40)
    called(layer, x)
    with sm.backend("reference"):
        torch.testing.assert_close(called(layer, x), x @ weight.T + layer.bias, rtol=1e-4, atol=1e-5)


def test_vmap_after_a_call() -> None:
    layer, weight = frozen(sm.LowRank(3))
    x = torch.randn(5, 2, 40)
    called(layer, x[0])
    with torch.no_grad():
        found = torch.func.vmap(layer)(x)
    torch.testing.assert_close(found, x @ weight.T + layer.bias, rtol=1e-4, atol=1e-5)


def test_copies_ask_for_themselves() -> None:
    layer, _ = frozen(sm.LowRank(3))
    x = torch.randn(2, 40)
    expected = called(layer, x)
    twin = copy.deepcopy(layer)
    for other in (twin, pickle.loads(pickle.dumps(layer))):  # ours, just written
        torch.testing.assert_close(called(other, x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for buffer in twin.buffers():
            buffer.zero_()
    assert called(twin, x).abs().max() == 0
    torch.testing.assert_close(called(layer, x), expected, rtol=0, atol=0)


def test_old_tensors_are_not_held() -> None:
    layer, _ = frozen(sm.LowRank(3))
    called(layer, torch.randn(2, 40))
    layer.to("meta")
    layer(torch.randn(2, 40, device="meta"))
    held = [part for part in vars(layer).values() if isinstance(part, Standing)]
    assert held
    assert all(part.known is None for part in held)
