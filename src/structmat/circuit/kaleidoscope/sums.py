"""Sums of kaleidoscope matrices: the widths add, the size grows by four.

Source: Dao et al., "Kaleidoscope" (arXiv 2012.14966), the appendix on sums. Four blocks hold the input, the work, free
space and the total so far; the strides above a block's size copy the input and accumulate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.circuit.kaleidoscope.matrix import Kaleidoscope
from structmat.circuit.kaleidoscope.product import ButterflyProduct
from structmat.circuit.kaleidoscope.stage import Stage
from structmat.errors import CircuitError

_COPY = ((1, 0), (1, 0))
"""The second of a pair becomes the first."""
_TAKE_SECOND = ((0, 1), (0, 1))
_ADD_AND_CLEAR = ((0, 0), (1, 1))
_ADD = ((1, 1), (0, 1))


def total(terms: Sequence[Kaleidoscope]) -> Kaleidoscope:
    """The sum of matrices of one shape, of width the sum of the widths, in four times the largest size.

    Raises:
        CircuitError: there are no terms, one has width 0, or the shapes differ.
    """
    if not terms:
        raise CircuitError("A sum of no kaleidoscope matrices has no shape. Give at least one term.")
    shapes = {(term.out_features, term.in_features) for term in terms}
    if len(shapes) > 1 or any(term.width == 0 for term in terms):
        raise CircuitError(f"Terms have one shape and a width of at least 1; got shapes {sorted(shapes)}.")
    block = max(term.size for term in terms)
    stages: list[Stage] = []
    for number, term in enumerate(terms):
        inner = term.expanded(block)
        half = len(inner.product.stages) // (2 * inner.width)
        for width in range(inner.width):
            first, second = (
                [_on_second_block(s) for s in inner.product.stages[(2 * width + k) * half : (2 * width + k + 1) * half]]
                for k in range(2)
            )
            begins, ends = width == 0, width == inner.width - 1
            last = number == len(terms) - 1
            stages.append(_outer(block))
            stages.append(_inner(block, _COPY if begins else None, None))
            stages += first + second
            if ends and last:
                stages.append(_inner(block, _TAKE_SECOND, _TAKE_SECOND))
                stages.append(_outer(block, first=_ADD))
            else:
                stages.append(_inner(block, None, None))
                stages.append(_outer(block, second=_ADD_AND_CLEAR if ends else None))
    return Kaleidoscope(ButterflyProduct(4 * block, tuple(stages)), terms[0].in_features, terms[0].out_features)


_Block = tuple[tuple[int, int], tuple[int, int]] | None


def _on_second_block(stage: Stage) -> Stage:
    """The stage on the second of four blocks, the identity on the others."""
    blocks = stage.shape[0]
    weight = Stage.identity(4 * stage.size, stage.stride).weight.astype(stage.weight.dtype)
    weight[blocks : 2 * blocks] = stage.weight
    return Stage.of(weight)


def _inner(block: int, lower: _Block, upper: _Block) -> Stage:
    """One 2 x 2 block for all pairs of the first and second block, one for the third and fourth."""
    weight = Stage.identity(4 * block, block).weight
    for which, twiddle in enumerate((lower, upper)):
        if twiddle is not None:
            weight[which] = np.array(twiddle)[:, :, None]
    return Stage.of(weight)


def _outer(block: int, first: _Block = None, second: _Block = None) -> Stage:
    """One 2 x 2 block for all pairs of the first and third block, one for the second and fourth."""
    weight = Stage.identity(4 * block, 2 * block).weight
    for which, twiddle in enumerate((first, second)):
        if twiddle is not None:
            weight[0, :, :, which * block : (which + 1) * block] = np.array(twiddle)[:, :, None]
    return Stage.of(weight)
