"""Two trees mixed: networks that exchange channels where their trees agree (Cohen, Tamari and Shashua, ICLR 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError
from structmat.nn.convac.network import ConvAC
from structmat.nn.convac.semiring import Plain, Scaled, State, shift
from structmat.nn.convac.tree import ModeTree


class MixedConvAC(nn.Module):
    """Two networks over the same inputs; after the mixture levels they exchange the first half of their channels.

    The score is the sum of both. With width r it realises every network of width r / 2 on any hybrid of the two trees
    (between mixture levels, one or the other); single networks need more than ``(r/2)^(2 / (1 + 2^(1-k)))`` channels to
    follow, see :func:`structmat.nn.convac.bounds.hybrid_width`.

    Args:
        first, second: without overlaps, on trees of the same modes, with the same widths, outputs and semiring. The
            representation of the first is used.
        levels: after which channels are exchanged; the two trees must have the same sets of modes there.

    Raises:
        ShapeError: the networks do not fit together, or the trees differ at a mixture level.
    """

    def __init__(self, first: ConvAC, second: ConvAC, levels: Sequence[int]) -> None:
        super().__init__()
        same = (first.widths, first.outputs, first.channels, first.semiring, first.tree.modes, len(first.tree.levels))
        other = (
            second.widths, second.outputs, second.channels, second.semiring, second.tree.modes, len(second.tree.levels),
        )  # fmt: skip
        if same != other or first.tree.overlaps or second.tree.overlaps:
            raise ShapeError(
                f"Mixed networks agree in widths, outputs, channels, semiring and modes; got {same} and {other}."
            )
        if first.semiring != Plain() and first.semiring != Scaled():
            raise ShapeError(
                f"Mixed networks run in Plain() or Scaled(), not in {first.semiring}: their scores are added."
            )
        self.first, self.second, self.levels = first, second, tuple(sorted(levels))
        for level in self.levels:
            if not 0 <= level < len(first.tree.levels) - 1:
                raise ShapeError(f"Mixture levels lie below the root, 0..{len(first.tree.levels) - 2}; got {level}.")
            places = _matching(first.tree, second.tree, level)
            if places is None:
                raise ShapeError(
                    f"The trees have different sets of modes at level {level}: their channels can't be exchanged there."
                )
            self.register_buffer(f"match{level}", torch.tensor(places), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (batch, Y)."""
        values = x if self.first.representation is None else self.first.representation(x)
        networks = (self.first, self.second)
        logarithm = bool(getattr(self.first.representation, "logarithm", False))
        semiring = self.first.semiring
        states = [
            {-1: semiring.lift(values.permute(1, 2, 0)[:, net.get_buffer("order")], logarithm=logarithm)}
            for net in networks
        ]
        for level in range(len(self.first.tree.levels)):
            for net, found in zip(networks, states, strict=True):
                found[level] = net.pool(level, net.convolve(level, found))
            if level in self.levels:
                states[0][level], states[1][level] = self._exchange(level, states[0][level], states[1][level])
        top = len(self.first.tree.levels) - 1
        roots = [semiring.linear(net.output, found[top], None) for net, found in zip(networks, states, strict=True)]
        return (semiring.values(roots[0]) + semiring.values(roots[1])).squeeze(1).T

    def _exchange(self, level: int, first: State, second: State) -> tuple[State, State]:
        places = self.get_buffer(f"match{level}")  # the second tree's node for each of the first's
        back = places.argsort()
        half = first.value.shape[0] // 2
        one, other = _aligned(first, State(second.value[:, places], _take(second.scale, places)))
        swapped_one = State(torch.cat([other.value[:half], one.value[half:]]), one.scale)
        swapped = torch.cat([one.value[:half], other.value[half:]])
        return swapped_one, State(swapped[:, back], _take(other.scale, back))


def _take(scale: Tensor | None, places: Tensor) -> Tensor | None:
    return None if scale is None else scale[..., places, :]


def _aligned(first: State, second: State) -> tuple[State, State]:
    """The same numbers on one common scale: channels that change sides bring the exponent of their side along."""
    if first.scale is None or second.scale is None:
        return first, second
    common = torch.maximum(first.scale, second.scale)
    least = -200

    def moved(state: State) -> State:
        assert state.scale is not None
        return State(shift(state.value, (state.scale - common).clamp(min=least)), common)

    return moved(first), moved(second)


def _matching(first: ModeTree, second: ModeTree, level: int) -> list[int] | None:
    one, other = (
        [tree.masks[tree.starts[level] + n] for n in range(len(tree.levels[level]))] for tree in (first, second)
    )
    return [other.index(mask) for mask in one] if sorted(one) == sorted(other) else None
