"""Small circuits that the tests of circuits draw from."""

from __future__ import annotations

import numpy as np

from structmat.circuit import Builder, Circuit


def random_linear(seed: int, *, integers: bool = True, parameters: int = 0, wide: bool = True) -> Circuit:
    """A random linear circuit of 1 to 6 inputs, up to 25 gates of 1 to 5 terms, and 1 to 5 outputs."""
    rng = np.random.default_rng(seed)
    builder = Builder(int(rng.integers(1, 7)))
    own = builder.parameter("theta", rng.integers(-3, 4, parameters)) if parameters else np.zeros(0, np.int64)
    for _ in range(int(rng.integers(0, 26))):
        terms = int(rng.integers(1, 6)) if wide else int(rng.integers(1, 3))
        operands = rng.integers(0, builder.nodes, terms)
        weights = rng.choice([-3, -2, -1, 1, 1, 2], terms) if integers else rng.standard_normal(terms)
        trained = np.where(rng.random(terms) < 0.3, rng.integers(0, parameters, terms), -1) if parameters else -1
        builder.sum(operands, weights, parameters=trained)
    assert own.size == parameters
    return builder.build(rng.integers(0, builder.nodes, int(rng.integers(1, 6))))


def random_polynomial(
    seed: int, *, outputs: int | None = None, parameters: int = 0, divisions: bool = False
) -> Circuit:
    """A random circuit with constants, sums and products, and quotients by sums that are rarely zero if asked for."""
    rng = np.random.default_rng(seed)
    builder = Builder(int(rng.integers(1, 6)))
    if parameters:
        builder.parameter("theta", rng.integers(1, 5, parameters))
        builder.parameter_nodes(rng.integers(0, parameters, 2))
    builder.constant(rng.integers(-3, 4, 2))
    for _ in range(int(rng.integers(1, 15))):
        fan_in = int(rng.integers(1, 5))
        operands = rng.integers(0, builder.nodes, fan_in)
        chosen = rng.random()
        if chosen < 0.5:
            trained = np.where(rng.random(fan_in) < 0.3, rng.integers(0, parameters, fan_in), -1) if parameters else -1
            builder.sum(operands, rng.choice([-2, -1, 1, 3], fan_in), parameters=trained)
        elif chosen < 0.85 or not divisions:
            builder.product(operands[:3])
        else:
            away = builder.sum([operands[0], builder.constant([1000])[0]], [1, 1])
            builder.quotient(operands[-1], away)
    count = int(rng.integers(1, 4)) if outputs is None else outputs
    return builder.build(rng.integers(max(0, builder.nodes - 6), builder.nodes, count))


def hadamard(levels: int) -> Circuit:
    """The Sylvester-Hadamard matrix of size ``2^levels``, gate by gate."""
    size = 1 << levels
    builder = Builder(size)
    x = builder.inputs
    for level in range(levels):
        pairs = x.reshape(-1, 2, 1 << level)
        both = np.stack([pairs[:, 0], pairs[:, 1]], axis=-1)
        x = np.stack([builder.sums(both), builder.sums(both, [1, -1])], axis=1).ravel()
    return builder.build(x)


def fft(levels: int) -> Circuit:
    """The discrete Fourier transform of size ``2^levels``, radix 2, twiddles folded into the weights."""
    size = 1 << levels
    builder = Builder(size)
    order = np.zeros(1, np.int64)
    for _ in range(levels):
        order = np.concatenate([2 * order, 2 * order + 1])
    x = builder.inputs[order]
    for level in range(levels):
        span = 1 << level
        pairs = x.reshape(-1, 2, span)
        both = np.stack([pairs[:, 0], pairs[:, 1]], axis=-1)[:, None]
        twiddle = np.exp(-1j * np.pi * np.arange(span) / span)
        weights = np.ones((2, span, 2), complex)
        weights[0, :, 1], weights[1, :, 1] = twiddle, -twiddle
        x = builder.sums(np.concatenate([both, both], axis=1), weights).ravel()
    return builder.build(x)


def up(size: int) -> tuple[int, ...]:
    """The strides of a butterfly matrix: 1, 2, .., size / 2."""
    return tuple(1 << level for level in range(size.bit_length() - 1))
