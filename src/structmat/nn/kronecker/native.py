"""Blocks as one native pass: products, biases and activations of a tile of samples without leaving the cache.

Forward the tile goes through all stages of one block, or of several one after the other; backward what is between is
made again there, and gradients of all tensors are summed on the way. Between blocks the value is kept (it is the next
one's input), inside them only if they are told to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structmat.kernels.activated import Activated, Activation, Keep, Kind, Spread, Step, Together, activated
from structmat.kernels.choice import is_usual
from structmat.kernels.library import native
from structmat.kernels.operator import run_backward_kept, run_keeping, run_rows
from structmat.kernels.text import NotNativeError
from structmat.modes import is_compiling, is_usual_backward
from structmat.nn.kronecker.activation import Activation as Function
from structmat.nn.kronecker.activation import Slopes, name_of, rectify
from structmat.nn.kronecker.recompute import gradients
from structmat.program.combinators import rename

if TYPE_CHECKING:
    from structmat.nn.kronecker.block import KroneckerBlock
    from structmat.nn.kronecker.chain import Gap, KroneckerChain

DTYPES = (torch.float32, torch.float64)

_FUNCTIONS: tuple[tuple[Callable[[Tensor], Tensor], Kind], ...] = (
    (torch.relu, Kind.RELU),
    (F.relu, Kind.RELU),
    (torch.tanh, Kind.TANH),
    (F.tanh, Kind.TANH),
    (torch.sigmoid, Kind.SIGMOID),
    (F.sigmoid, Kind.SIGMOID),
    (F.silu, Kind.SILU),
    (F.gelu, Kind.GELU),
)
_MODULES: dict[type[nn.Module], Kind] = {
    nn.Identity: Kind.IDENTITY,
    nn.ReLU: Kind.RELU,
    nn.Tanh: Kind.TANH,
    nn.Sigmoid: Kind.SIGMOID,
    nn.SiLU: Kind.SILU,
}


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see its calls, which one pass over several modules does not make."""
    before = module._forward_pre_hooks or module._backward_pre_hooks
    return bool(before or module._forward_hooks or module._backward_hooks)


def kind_of(function: Function | None) -> Kind | None:
    """The native activation that a function or module is, or None. Rectifiers are :class:`Slopes` and ``nn.PReLU`` of
    one slope."""
    if function is None:
        return Kind.IDENTITY
    if isinstance(function, Slopes):
        return Kind.RECTIFIER
    if not isinstance(function, nn.Module):
        return next((kind for known, kind in _FUNCTIONS if function is known), None)
    if type(function) is nn.GELU:
        return Kind.GELU_TANH if function.approximate == "tanh" else Kind.GELU
    if type(function) is nn.PReLU:
        return Kind.RECTIFIER if function.num_parameters == 1 else None
    return _MODULES.get(type(function))


# -------------------------------------------------------------------------------------------------------------- recipes

OWN, INNER, OUTER = -1, -2, -3
"""Where a tensor is, if not in a chain: in the block, or in the module that is its inner or outer activation."""

Place = tuple[int, str]
"""The number of a chain (or one of the above), and the name of a tensor there."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How one block runs natively.

    Args:
        inner, outer: the activations that it was made for.
        places: of its tensors.
        steps: that read the tensors by names, which are the places as text.
        followed: the same for a block that is followed by another: the outcome is kept, or what is activated last.
        reason: why there is no native way, or nothing.
    """

    inner: Function | None
    outer: Function | None
    places: tuple[Place, ...] = ()
    steps: tuple[Step, ...] = ()
    followed: tuple[Step, ...] = ()
    reason: str = ""


def _recipe(block: KroneckerBlock) -> Recipe:
    inner, outer = kind_of(block.inner), kind_of(block.outer)
    for kind, function, where in ((inner, block.inner, "inner"), (outer, block.outer, "outer")):
        if kind is None:
            return Recipe(
                block.inner, block.outer, reason=f"the {where} activation {name_of(function)} has no native kernel"
            )
    assert inner is not None
    assert outer is not None
    if outer is Kind.IDENTITY and not any(chain.gaps for chain in block.chains):
        return Recipe(block.inner, block.outer, reason="the block is linear, and runs as one product")
    places: list[Place] = []

    def tensor(place: int, name: str) -> str:
        if (place, name) not in places:
            places.append((place, name))
        return _label((place, name))

    parts = [tuple(_chain(block, number, chain, inner, tensor)) for number, chain in enumerate(block.chains)]
    features = block.out_features
    bias = None if block.bias is None else Spread(tensor(OWN, "bias"), 1, features)
    slope = Spread(tensor(OUTER, "weight"), 1, 1) if outer is Kind.RECTIFIER else None
    end: tuple[Step, ...] = ()
    if bias is not None or outer is not Kind.IDENTITY:
        end = (Activation(outer, features, bias, slope),)
    keep = (Keep(features),)
    steps: tuple[Step, ...] = parts[0] if len(parts) == 1 else (Together(tuple(parts)),)
    ends = (*end, *keep) if outer.is_by_value else (*keep, *end)
    keeps_all = not block.chains[0].recompute and outer is not Kind.IDENTITY
    try:
        activated(steps, features)
    except NotNativeError as reason:
        return Recipe(block.inner, block.outer, reason=str(reason))
    last = (*steps, *(ends if keeps_all else end))
    return Recipe(block.inner, block.outer, tuple(places), last, (*steps, *ends))


def _label(place: Place, number: int = 0) -> str:
    return f"{number}:{place[0]}:{place[1]}"


def _chain(
    block: KroneckerBlock, number: int, chain: KroneckerChain, kind: Kind, tensor: Callable[[int, str], str]
) -> list[Step]:
    steps: list[Step] = []
    for gap, program in itertools.zip_longest(chain.gaps, chain.programs):
        steps.append(rename(program, lambda name: tensor(number, name)))
        if gap is None:
            break
        bias = slope = None
        if getattr(chain, f"bias{gap.place}", None) is not None:
            bias = _spread(tensor(number, f"bias{gap.place}"), gap, getattr(chain, f"bias{gap.place}"))
        if isinstance(block.inner, Slopes):
            slope = _spread(tensor(number, f"slope{gap.place}"), gap, getattr(chain, f"slope{gap.place}"))
        elif kind is Kind.RECTIFIER:
            slope = Spread(tensor(INNER, "weight"), 1, 1)
        if bias is None and kind is Kind.IDENTITY:
            continue
        own: list[Step] = [Activation(kind, gap.numel, bias, slope)]
        if not chain.recompute:
            own.insert(len(own) if kind.is_by_value else 0, Keep(gap.numel))
        steps += own
    return steps


def _spread(name: str, gap: Gap, tensor: Tensor) -> Spread:
    """Which numbers of a tensor of a shape of :meth:`Gap.along` belong to the rows of a gap."""
    shape = tuple(tensor.shape)
    varies = [axis for axis, size in enumerate(shape) if size > 1]
    inner = math.prod(gap.sizes[varies[-1] + 1 :]) if varies else 1
    return Spread(name, inner, tensor.numel())


# ------------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True, eq=False)
class Fused:
    """Several blocks one after the other, as one program.

    Args:
        recipes: of the blocks.
        text: of the program; None if there is none.
        places: of its tensors in the order of the text, each with the number of its block.
        reason: why there is none.
    """

    recipes: tuple[Recipe, ...]
    text: Activated | None
    places: tuple[tuple[int, int, str], ...] = ()
    reason: str = ""

    def serves(self, blocks: Sequence[KroneckerBlock]) -> bool:
        """Whether the blocks still have the activations that this was made for."""
        return all(r.inner is b.inner and r.outer is b.outer for r, b in zip(self.recipes, blocks, strict=True))


def fused(blocks: Sequence[KroneckerBlock]) -> Fused:
    """Blocks that fit together as one program, or the reason why they are none."""
    recipes = tuple(_recipe(block) for block in blocks)
    for recipe in recipes:
        if recipe.reason:
            return Fused(recipes, None, reason=recipe.reason)
    steps: list[Step] = []
    by_name: dict[str, tuple[int, int, str]] = {}
    for number, recipe in enumerate(recipes):
        is_last = number == len(recipes) - 1
        steps += [_renumbered(step, number) for step in (recipe.steps if is_last else recipe.followed)]
        by_name |= {_label(place, number): (number, *place) for place in recipe.places}
    text = activated(steps, blocks[-1].out_features)
    return Fused(recipes, text, tuple(by_name[name] for name in text.names))


def _renumbered(step: Step, number: int) -> Step:
    def name(old: str) -> str:
        return f"{number}{old[old.index(':') :]}"

    def spread(old: Spread | None) -> Spread | None:
        return None if old is None else Spread(name(old.name), old.inner, old.count)

    if isinstance(step, Keep):
        return step
    if isinstance(step, Activation):
        return Activation(step.kind, step.size, spread(step.bias), spread(step.slope))
    if isinstance(step, Together):
        return Together(tuple(tuple(_renumbered(one, number) for one in part) for part in step.parts))
    return rename(step, name)


def is_available() -> bool:
    """Whether there is a native library."""
    return native().available


def _is_available_to_compilers() -> bool:
    return native().available and native().by_address is None


_to_compilers = torch.compiler.assume_constant_result(_is_available_to_compilers)


def obstacle(x: Tensor) -> str | None:
    """Why an input keeps blocks from running natively, or None."""
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        return f"the input is {x.dtype} on {x.device}"
    if is_compiling():
        usual = _to_compilers() and not torch.is_autocast_enabled("cpu")
        return None if usual else "there are no native operators, or autocast is on"
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}"
    if not is_available():
        return f"there is no native library: {native().reason}"
    if not is_usual():
        return "a backend is forced, autocast is on, or a transform of torch.func is at work"
    return None


def run(blocks: Sequence[KroneckerBlock], way: Fused, x: Tensor) -> Tensor | None:
    """The outcome for rows (..., in_features), as vectors (..., out_features), or None where that is for others.

    Args:
        blocks: of which ``way`` was made.
        way: how.
        x: the input.
    """
    if way.text is None or x.numel() == 0 or x.shape[-1] != blocks[0].in_features or obstacle(x) is not None:
        return None
    if any(watched(block) for block in blocks):
        return None
    tensors, dtype = [], x.dtype
    chains = [block.chains for block in blocks]
    for number, place, name in way.places:
        holder = chains[number][place] if place >= 0 else _holder(blocks[number], place)
        tensor = holder._parameters.get(name)
        if tensor is None:  # a buffer, or one that is computed, by a parametrization for instance
            tensor = getattr(holder, name)
        if tensor.dtype is not dtype or tensor.device.type != "cpu":
            return None
        tensors.append(tensor)
    if is_compiling():
        made: Tensor = torch.ops.structmat.activated.default(x, tensors, way.text.words)
        return made
    rows = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        y: Tensor = _Fused.apply(way, tuple(blocks), rows, *tensors)  # type: ignore[no-untyped-call]
    else:
        y = run_rows(rows, [t.contiguous() for t in tensors], way.text.words)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def watched(block: KroneckerBlock) -> bool:
    """Whether somebody wants to see the calls of a block's parts."""
    parts = (*block.chains, *(f for f in (block.inner, block.outer) if isinstance(f, nn.Module)))
    return any(has_hooks(part) for part in parts)


def _holder(block: KroneckerBlock, place: int) -> nn.Module:
    held = block if place == OWN else block.inner if place == INNER else block.outer
    assert isinstance(held, nn.Module)
    return held


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Fused, blocks: tuple[KroneckerBlock, ...], x: Tensor, *tensors: Tensor) -> Tensor:
        assert way.text is not None
        y, kept = run_keeping(x, [t.contiguous() for t in tensors], way.text.keeping)
        ctx.way, ctx.blocks = way, blocks
        ctx.save_for_backward(x, kept, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, kept, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if not is_usual_backward(grad):
            again = _Again(ctx.way, ctx.blocks)
            return None, None, *gradients(again, (x, *tensors), wanted, grad)
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        given = [t.contiguous() for t in tensors]
        nothing = x.new_empty(0)
        found = [torch.empty_like(t) if w else nothing for t, w in zip((x, *given), wanted, strict=True)]
        run_backward_kept(x, kept, grad, given, found[0], found[1:], ctx.way.text.keeping)
        return None, None, *(g if w else None for g, w in zip(found, wanted, strict=True))


@dataclass(frozen=True, eq=False)
class _Again:
    """The same in differentiable operations, of given tensors."""

    way: Fused
    blocks: tuple[KroneckerBlock, ...]

    def __call__(self, x: Tensor, given: Sequence[Tensor]) -> Tensor:
        by_place = dict(zip(self.way.places, given, strict=True))
        for number, (block, recipe) in enumerate(zip(self.blocks, self.way.recipes, strict=True)):
            own = {place: by_place[number, *place] for place in recipe.places}
            total: Tensor | None = None
            for index, chain in enumerate(block.chains):
                tensors = {name: own[index, name] for name in chain.names}
                y = chain.run_with(tensors, x, slope=_slope(recipe.inner, own, INNER))
                total = y if total is None else total + y
            assert total is not None
            if (OWN, "bias") in own:
                total = total + own[OWN, "bias"]
            slope = _slope(recipe.outer, own, OUTER)
            x = total if recipe.outer is None else recipe.outer(total) if slope is None else rectify(total, slope)
        return x


def _slope(function: Function | None, own: dict[Place, Tensor], place: int) -> Tensor | None:
    return own[place, "weight"] if isinstance(function, nn.PReLU) else None
