"""Product pooling: the product over windows of neighboring locations, in any semiring."""

from __future__ import annotations

import torch

from structmat.nn.convac.semiring import Semiring, State

LARGEST_STEP = 4
"""Factors that are multiplied before a state is rescaled: four of size 2^31 still fit into float32."""


def window_product(semiring: Semiring, state: State, window: int) -> State:
    """Product over groups of ``window`` neighbouring locations, by halving, rescaled every few factors.

    Slices are multiplied, so that the gradient of a factor is the product of the others, zeros or not.
    """
    factors = 1
    while window > 1:
        split = split_windows(state, window)
        half = window // 2
        paired = semiring.multiply(select_within(split, slice(0, half)), select_within(split, slice(half, 2 * half)))
        if window % 2:
            rest = select_within(split, slice(2 * half, window))
            paired = State(
                torch.cat([paired.value, rest.value], 2),
                None if paired.scale is None or rest.scale is None else torch.cat([paired.scale, rest.scale], -2),
            )
        window = half + window % 2
        state = join_windows(paired)
        factors *= 2
        if factors >= LARGEST_STEP and window > 1:
            state, factors = semiring.rescale(state), 1
    return semiring.rescale(state)


def split_windows(state: State, window: int) -> State:
    """(channels, windows, window, batch) from neighbouring locations."""
    value, scale = state
    shaped = None if scale is None else scale.unflatten(-2, (-1, window))
    return State(value.unflatten(1, (-1, window)), shaped)


def select_within(state: State, places: slice) -> State:
    """Positions of every window."""
    return State(state.value[:, :, places], None if state.scale is None else state.scale[..., places, :])


def join_windows(state: State) -> State:
    """Back from :func:`split_windows`."""
    return State(state.value.flatten(1, 2), None if state.scale is None else state.scale.flatten(-3, -2))
