"""Levels as one native pass: 1 x 1 convolutions, the products over windows and their rescaling on tiles of the batch.

For each window the results of its convolutions stay in the cache, are multiplied there, and only the pooled state is
written: as many times fewer numbers as a window has locations. Backward they are made again from the pooled state
below; the gradient of a factor is the product of the others, without a division, so that it is exact at zeros.
Numbers divided by their root mean square are powers of two times the plain ones on the way there: what is normalized at
the end of a window does not depend on a scale, and nor do its gradients.
Logarithms take one exponential for each number that is read and one logarithm for each that is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from structmat.kernels.choice import is_usual
from structmat.kernels.library import native
from structmat.modes import is_compiling, is_usual_backward
from structmat.nn.convac.options import Pooling
from structmat.nn.convac.semiring import (
    Log,
    Plain,
    RootMeanSquare,
    Scaled,
    Semiring,
    State,
    concatenate,
    refuse_negative,
    select,
    shift,
)
from structmat.nn.convac.windows import window_product
from structmat.nn.kronecker.native import has_hooks
from structmat.nn.kronecker.recompute import gradients

if TYPE_CHECKING:
    from structmat.nn.convac.network import ConvAC
    from structmat.nn.convac.weights import EdgeMap

DTYPES = (torch.float32, torch.float64)

_NUMBERS: dict[type[Semiring], int] = {Plain: 0, Scaled: 1, Log: 2, RootMeanSquare: 3}
"""By which the library knows a semiring."""
_LIFTS, _LOWERS = 4, 8

NOTHING = -1


@dataclass(frozen=True, eq=False)
class Layer:
    """What a native level reads.

    Args:
        semiring: how numbers are carried.
        index: integers (2, windows, window): the location that each position reads (-1: none), and its matrix.
        covers: whether every location is read.
        lifts: plain numbers are read; the semiring's lift is a part of the pass.
        lowers: plain numbers are written, by the semiring that scales.
    """

    semiring: Semiring
    index: Tensor
    covers: bool
    lifts: bool = False
    lowers: bool = False

    @property
    def kind(self) -> int:
        """The options as one number, as the library takes them."""
        return _NUMBERS[type(self.semiring)] + _LIFTS * self.lifts + _LOWERS * self.lowers


@dataclass(frozen=True, eq=False)
class Way:
    """How the levels of a network run.

    Args:
        semiring: that it was made for.
        levels: of each level its layer, or why it has none.
        output: the last convolution, or why it has none.
        lifts: whether the first level can lift plain leaves by itself: no other level reads them.
    """

    semiring: Semiring
    levels: tuple[Layer | str, ...]
    output: Layer | str
    lifts: bool

    @property
    def reason(self) -> str:
        """Why something of it is no native pass, or nothing."""
        return next((part for part in (*self.levels, self.output) if isinstance(part, str)), "")


def way_of(network: ConvAC) -> Way:
    """The layers of a network."""
    levels = tuple(_level(network, level) for level in range(len(network.tree.levels)))
    lifts = not isinstance(levels[0], str) and not isinstance(network.semiring, Plain)
    return Way(
        network.semiring, levels, _output(network), lifts and all(-1 not in sources for sources in network._sources[1:])
    )


def _level(network: ConvAC, level: int) -> Layer | str:
    if network.pooling is not Pooling.PRODUCT:
        return f"pooling is by {network.pooling.value}, not by products"
    if type(network.semiring) not in _NUMBERS:
        return f"the semiring {network.semiring} has no native kernel"
    if network._sources[level] != [level - 1]:
        return f"level {level} reads other levels than the one below"
    edge_map: EdgeMap = network.layers[level][0]  # type: ignore[index]
    if edge_map.weights.structure is not None:
        return f"weights of {edge_map.weights.structure} are not dense"
    windows = network.tree.levels[level]
    start = 0 if level == 0 else network.tree.starts[level - 1]
    locations = network.tree.modes if level == 0 else len(network.tree.levels[level - 1])
    index = torch.full((2, len(windows), len(windows[0])), NOTHING)
    for edge, slot in zip(network.tree.edges(level), edge_map.slot.index, strict=True):
        index[0, edge.window, edge.position] = edge.node - start
        index[1, edge.window, edge.position] = slot
    read = index[0][index[0] != NOTHING]
    if read.unique().numel() != read.numel():
        return f"the windows of level {level} overlap"
    return Layer(network.semiring, index, read.numel() == locations)


def _output(network: ConvAC) -> Layer | str:
    if type(network.semiring) not in _NUMBERS:
        return f"the semiring {network.semiring} has no native kernel"
    # Scores are not normalized.
    semiring = Plain() if isinstance(network.semiring, RootMeanSquare) else network.semiring
    return Layer(semiring, torch.zeros(2, 1, 1, dtype=torch.int64), True, lowers=True)


def is_available() -> bool:
    """Whether there are native operators for levels."""
    return native().available and native().by_address is None


def obstacle(x: Tensor) -> str | None:
    """Why numbers keep a network from running natively, or None."""
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        return f"the numbers are {x.dtype} on {x.device}"
    if is_compiling():
        return "compilers see PyTorch's operations"
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}"
    if not is_available():
        return f"there are no native operators: {native().reason}"
    if not is_usual():
        return "a backend is forced, autocast is on, or a transform of torch.func is at work"
    return None


def takes_plain(way: Way, values: Tensor) -> bool:
    """Whether the first level is to lift these plain values by itself.

    Raises:
        DataError: negative values in a semiring that holds none.
    """
    if not way.lifts or values.numel() == 0 or obstacle(values) is not None:
        return False
    if not way.semiring.allows_negative:
        refuse_negative(values)
    return True


def run(
    layer: Layer | str, edge_map: EdgeMap, state: State, *, lifts: bool = False, lowers: bool = False
) -> State | None:
    """The pooled state above one level, or None where that is for others.

    Args:
        layer: how.
        edge_map: the level's weights.
        state: of the locations below.
        lifts: its values are plain numbers.
        lowers: write such. The scale is then that of a number that is lost.
    """
    value, scale = state
    if isinstance(layer, str) or value.numel() == 0 or obstacle(value) is not None or has_hooks(edge_map):
        return None
    weight = edge_map.weights.dense()
    if weight.dtype is not value.dtype or weight.device.type != "cpu" or not _is_plain(weight):
        return None
    lowers = lowers and isinstance(layer.semiring, Scaled)
    if lifts != layer.lifts or lowers != layer.lowers:
        layer = Layer(layer.semiring, layer.index, layer.covers, lifts, lowers)
    x, weight = value.transpose(0, 1).contiguous(), weight.contiguous()
    held = weight.new_empty(0, dtype=torch.int64) if scale is None else scale.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        made, made_scale = _Pooled.apply(layer, x, held, weight)  # type: ignore[no-untyped-call]
    else:
        made, made_scale = _forward(layer, x, held, weight)
    return State(made.transpose(0, 1), made_scale if isinstance(layer.semiring, Scaled) else None)


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is Tensor or type(weight) is nn.Parameter


def _forward(layer: Layer, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    windows = layer.index.shape[1]
    made = x.new_empty(windows, weight.shape[1], x.shape[2])
    held = scale if isinstance(layer.semiring, Scaled) else x  # whose dtype it has
    holds = isinstance(layer.semiring, Scaled | RootMeanSquare)
    made_scale = held.new_empty((windows, x.shape[2]) if holds else (0,))
    torch.ops.structmat.pool_layer.default(x, scale, weight, layer.index, made, made_scale, layer.kind)
    return made, made_scale


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        made, made_scale = _forward(layer, x, scale, weight)
        ctx.layer = layer
        normalized = isinstance(layer.semiring, RootMeanSquare)
        ctx.save_for_backward(x, scale, weight, made if normalized else x.new_empty(0), made_scale)
        ctx.mark_non_differentiable(made_scale)
        return made, made_scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight, made, made_scale = ctx.saved_tensors
        layer: Layer = ctx.layer
        wanted = (ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        if not is_usual_backward(grad):
            found = gradients(_Again(layer, scale, made_scale), (x, weight), wanted, grad)
            return None, found[0], None, found[1]
        nothing = x.new_empty(0)
        fresh = torch.empty_like if layer.covers else torch.zeros_like
        grad_x = fresh(x) if wanted[0] else nothing
        grad_weight = torch.empty_like(weight) if wanted[1] else nothing
        torch.ops.structmat.pool_layer_backward.default(
            x, scale, weight, layer.index, made, made_scale, grad.contiguous(), grad_x, grad_weight, layer.kind
        )
        return None, grad_x if wanted[0] else None, None, grad_weight if wanted[1] else None


# ----------------------------------------------------------------------------------------- the same, differentiable


@dataclass(frozen=True, eq=False)
class _Matrices:
    """Weights of edges as the semirings take them."""

    weight: Tensor  # shape: (copies, out, in)
    child: Tensor
    slot: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(self.weight, x)

    def _multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(weight[self.slot], x.transpose(0, 1)[self.child]).transpose(0, 1)

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            top = self.weight.abs().amax()
            exponent = torch.where((top > 0) & top.isfinite(), torch.frexp(top)[1] - 1, 0)
        return self._multiply(shift(self.weight, -exponent), x), exponent

    def tropical(self, x: Tensor) -> Tensor:
        """Not here: max-product has no native level, so nothing of it is differentiated again."""
        raise AssertionError("native levels are never of the max-product semiring")


@dataclass(frozen=True, eq=False)
class _Again:
    """A level in differentiable operations, of given tensors."""

    layer: Layer
    scale: Tensor
    made_scale: Tensor

    def __call__(self, x: Tensor, given: Sequence[Tensor]) -> Tensor:
        semiring, index = self.layer.semiring, self.layer.index.flatten(1)
        value = x.transpose(0, 1)
        state = State(value, self.scale if self.scale.numel() else None)
        if self.layer.lifts:
            state = semiring.lift(value, logarithm=False)
        elif isinstance(semiring, Scaled) and state.scale is None:
            state = State(value, torch.zeros(value.shape[1:], dtype=torch.int64))
        real = index[0] != NOTHING
        child = index[0][real]
        state = semiring.linear(_Matrices(given[0], child, index[1][real]), state, child)
        if not bool(real.all()):
            order = torch.where(real, real.cumsum(0) - 1, child.numel())
            state = select(concatenate([state, semiring.unit(state, 1)]), order)
        state = window_product(semiring, state, self.layer.index.shape[2])
        if self.layer.lowers:
            return semiring.values(state).transpose(0, 1)
        if state.scale is not None:
            # What was rounded elsewhere may have its power of two elsewhere.
            state = State(shift(state.value, state.scale - self.made_scale))
        return state.value.transpose(0, 1)
