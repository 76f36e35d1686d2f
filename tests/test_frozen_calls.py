"""A frozen layer asks about its tensors once: whatever changes between two calls is noticed."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.errors import ShapeError
from structmat.kernels import standing
from structmat.kernels.standing import Standing
from structmat.nn import StructuredLinear
from structmat.nn.linear import FrozenLinear


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


STRUCTURES = [sm.LowRank(3), sm.Monarch(4, 0.5), sm.GBLR(0.4), sm.Butterfly(), sm.Sparse(0.05)]


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


@pytest.mark.parametrize(
    "structure", [sm.GBLR(0.4), sm.Sparse(0.05), sm.Product(sm.LowRank(2), sm.Permutation())], ids=str
)
@pytest.mark.parametrize("way", ["state dict", "in place", "data"])
def test_other_places_in_the_same_tensors_are_noticed(structure: sm.Structure, way: str) -> None:
    layer, _ = frozen(structure, (32, 32))
    other = StructuredLinear(32, 32, structure=structure, generator=torch.Generator().manual_seed(5)).freeze(1)
    x = torch.randn(3, 32)
    called(layer, x)
    for name, buffer in layer.named_buffers():
        new = other.get_buffer(name)
        assert buffer.shape == new.shape
        if way == "in place":
            buffer.copy_(new)
        elif way == "data":
            buffer.data = new.clone()
    if way == "state dict":
        layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(called(layer, x), called(other, x), rtol=0, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_tensors_may_move_to_shared_memory(structure: sm.Structure) -> None:
    layer, _ = frozen(structure)
    x = torch.randn(2, 40)
    expected = called(layer, x)
    layer.share_memory()
    torch.testing.assert_close(called(layer, x), expected, rtol=0, atol=0)


def test_values_of_a_transposed_sparse_matrix_are_read_anew() -> None:
    """They are sorted once."""
    matrix = sm.StructuredMatrix.random(sm.Sparse(0.05), (20, 30), generator=torch.Generator().manual_seed(0)).T
    layer = FrozenLinear(matrix.program, dict(matrix.tensors), None)
    x = torch.randn(2, 20)
    expected = called(layer, x)
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.mul_(2)
    torch.testing.assert_close(called(layer, x), 2 * expected)


def test_layers_that_were_frozen_in_inference_mode_may_be_written_to() -> None:
    with torch.inference_mode():
        layer = StructuredLinear(32, 32, structure=sm.Sparse(0.05)).freeze(1)
        x = torch.randn(2, 32)
        expected = called(layer, x)
        index = next(b for b in layer.buffers() if b.dtype == torch.int64)
        index.copy_((index.flip(0) + 7) % 1024)
        found = called(layer, x)
    assert not torch.allclose(found, expected)
    torch.testing.assert_close(found, layer(x))


def test_prepared_tensors_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    stand, multiply, fall = operator_calls()
    monkeypatch.setattr(standing, "standing", lambda: (stand, multiply, numbers.append))
    layer, _ = frozen(sm.LowRank(3))
    x = torch.randn(2, 40)
    called(layer, x)
    held = next(part for part in vars(layer).values() if isinstance(part, Standing))
    assert held.known is not None
    number = held.known.number
    assert number is not None
    assert multiply(x, number).shape == (2, 24)
    assert numbers == []
    layer.to("meta")
    layer(torch.randn(2, 40, device="meta"))
    assert numbers == [number]
    fall(number)
    with pytest.raises(ValueError, match="there is no such product"):
        multiply(x, number)


def operator_calls() -> Any:
    found = standing.standing()
    if found is None:
        pytest.skip("there are no operators of the native backend")
    return found


@pytest.mark.parametrize("fault", ["dtype", "rows", "width", "tensors", "place"])
def test_standing_products_refuse_what_does_not_fit(fault: str) -> None:
    stand, multiply, _ = operator_calls()
    weight = torch.randn(6, 4)
    words, given = "rows 6 contract 1 6 4 1 0 0 0 0", [weight]
    if fault == "tensors":
        given = [weight, weight]
    elif fault == "place":
        words, given = "rows 4 permute 4 0 0", [torch.tensor([0, 1, 2, 4])]
    if fault in ("tensors", "place"):
        with pytest.raises(ValueError, match="structmat: "):
            stand(given, words)
        return
    number = stand(given, words)
    x = {"dtype": torch.randn(2, 4).double(), "rows": torch.randn(8, 4), "width": torch.randn(2, 5)}[fault]
    with pytest.raises(ValueError, match="structmat: "):
        multiply(x, number)


def test_threads_may_call_at_once_while_tensors_are_replaced() -> None:
    layer, _ = frozen(sm.Sparse(0.05), (300, 300))
    x = torch.randn(1, 300)
    with torch.no_grad():
        expected = layer(x)

    def call(_: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(layer(x), expected) for _ in range(200))

    def replace(_: int) -> bool:
        for _ in range(50):
            for name, buffer in list(layer.named_buffers()):
                setattr(layer, name, buffer.clone())
        return True

    with ThreadPoolExecutor(3) as pool:
        outcomes = [pool.submit(call, 0), pool.submit(call, 1), pool.submit(replace, 0)]
        assert all(outcome.result() for outcome in outcomes)
