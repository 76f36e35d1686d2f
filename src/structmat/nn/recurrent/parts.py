"""What a layer makes of the inputs of all times, a few of them after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from structmat.kernels import convolved, repeated_into, tuning
from structmat.kernels.operator import FEW_ROWS
from structmat.nn.recurrent.hooks import is_hooked
from structmat.nn.recurrent.source import source

AT_ONCE = 1 << 19
"""Numbers that are made at once. What is made of all times would leave the caches before it is read, and take memory
that the system has to give and clear at each call, often for a fifth of its time."""


def in_parts(layer: nn.Module, x: Tensor, *, backwards: bool) -> Iterator[tuple[slice, Tensor]]:
    """Some times and the outputs of a layer for them, until all were there; no gradient is recorded.

    Args:
        layer: of any kind; it is called once for all times where it must be called as a module.
        x: its inputs (times, rows, inputs).
        backwards: whether the last times come first.

    Yields:
        Outputs (some times, rows, outputs), in memory that the next ones overwrite.
    """
    times, rows = x.shape[:2]
    wide = getattr(layer, "out_features", 0)
    few = max(AT_ONCE // max(1, rows * wide), 2 * -(-FEW_ROWS // max(1, rows)))
    product = _product(layer, x) if times > few else None
    if product is None:
        yield slice(0, times), layer(x)
        return
    memory = x.new_empty(few * rows, wide)
    count = -(-times // few)
    for number in reversed(range(count)) if backwards else range(count):
        now = slice(number * times // count, (number + 1) * times // count)  # each more than half of the largest
        given = x[now].reshape(-1, x.shape[-1])
        gates = memory[: len(given)]
        product(given, gates)
        yield now, gates.unflatten(0, (-1, rows))


def _product(layer: nn.Module, x: Tensor) -> Callable[[Tensor, Tensor], object] | None:
    """A layer as a function that writes into memory; None where there is none."""
    if is_hooked(layer) or not x.is_cpu:
        return None
    found = source(layer, x[..., 0].numel(), tuning.name_of, tuple(tuning.Way))
    if found is None or convolved(found[0]) is not None:
        return None
    program, tensors, bias = found
    return repeated_into(program, tensors, x, bias)
