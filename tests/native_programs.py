"""Random programs of all stages that the native backend runs, with tensors for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import hypothesis.strategies as st
import torch
from torch import Tensor

from structmat.program import (
    Chain,
    Contraction,
    Crop,
    Diagonal,
    Interpolation,
    Pad,
    Pairs,
    Permute,
    Program,
    Shuffle,
    Sparse,
    Sum,
    Windowed,
    stages,
    tensor_sizes,
)


def sizes(most: int = 9) -> st.SearchStrategy[int]:
    return st.integers(1, most)


@st.composite
def contraction(draw_: st.DrawFn, features: int, name: str) -> Contraction:
    """A contraction that reads so many numbers."""
    divisors = [a for a in range(1, features + 1) if features % a == 0]
    a = draw_(st.sampled_from(divisors))
    rest = features // a
    d = draw_(st.sampled_from([k for k in range(1, rest + 1) if rest % k == 0]))
    shared_a, shared_d, transposed = (draw_(st.booleans()) for _ in range(3))
    return Contraction(name, a, draw_(sizes() | sizes(40)), rest // d, d, shared_a, shared_d, transposed)


def programs(depth: int = 2) -> st.SearchStrategy[Program]:
    """Chains and sums of all stages that have native kernels, each stage with tensors of its own."""
    return _programs(depth=depth).map(lambda program: _numbered(program, itertools.count()))


def _numbered(program: Program, numbers: Iterator[int]) -> Program:
    if isinstance(program, Chain):
        return Chain(tuple(_numbered(step, numbers) for step in program.steps))
    if isinstance(program, Sum):
        return Sum(tuple(_numbered(part, numbers) for part in program.parts))
    number = next(numbers)
    return program.rename(lambda name: f"{number}{name}")


@st.composite
def _programs(draw_: st.DrawFn, features: int | None = None, depth: int = 2) -> Program:
    features = draw_(st.integers(1, 40) | st.sampled_from([64, 96, 256])) if features is None else features
    name = "t"
    kind = draw_(st.sampled_from(["contraction", "diagonal", "permute", "shuffle", "sparse", "interpolation", "pad",
                                  "crop", "windowed", "radix", *(["chain", "sum"] * 2 if depth else [])]))  # fmt: skip
    if kind == "chain":
        steps: list[Program] = []
        for _ in range(draw_(st.integers(1, 4))):
            steps.append(draw_(_programs(features, depth - 1)))
            features = steps[-1].out_features
        return Chain(tuple(steps))
    if kind == "sum":
        first = draw_(_programs(features, depth - 1))
        parts = [first]
        for number in range(draw_(st.integers(0, 2))):
            width = draw_(sizes())
            parts.append(
                Chain(
                    (
                        Contraction(f"{name}r{number}", 1, width, features, 1),
                        Contraction(f"{name}l{number}", 1, first.out_features, width, 1),
                    )
                )
            )
        return Sum(tuple(parts))
    base = draw_(st.sampled_from([2, 4]))
    if kind == "radix" and features % base == 0:
        run: list[Program] = []
        d, upwards = 1, draw_(st.booleans())
        while features % (base * d) == 0:
            transposed = draw_(st.booleans())
            run.append(Contraction(f"{name}_{d}", features // (base * d), base, base, d, transposed=transposed))
            d *= base
        return Chain(tuple(run if upwards else reversed(run)))
    if kind == "diagonal":
        return Diagonal(name, features)
    if kind == "permute":
        return Permute(name, features, inverse=draw_(st.booleans()))
    if kind == "shuffle":
        divisor = draw_(st.sampled_from([k for k in range(1, features + 1) if features % k == 0]))
        axes = draw_(st.sampled_from([(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)]))
        return Shuffle((divisor, features // divisor, 1), axes)
    if kind == "sparse":
        height, transposed = draw_(sizes(30)), draw_(st.booleans())
        shape = (features, height) if transposed else (height, features)
        return Sparse(name, f"{name}p", *shape, draw_(st.integers(1, height * features)), transposed)
    if kind == "interpolation" and features > 1:
        if draw_(st.booleans()):
            return Interpolation(name, f"{name}p", features, features + draw_(sizes()), transposed=True)
        return Interpolation(name, f"{name}p", draw_(st.integers(1, features - 1)), features)
    if kind == "pad":
        before, after = draw_(st.integers(0, 3)), draw_(st.integers(0, 3))
        return Pad(features, features + before + after, before)
    if kind == "crop":
        before = draw_(st.integers(0, features - 1))
        return Crop(features, draw_(st.integers(1, features - before)), before)
    if kind == "windowed":
        terms, other, transposed = draw_(sizes(4)), draw_(sizes(20)), draw_(st.booleans())
        height, width = (features, other) if transposed else (other, features)
        totals = [draw_(st.lists(st.integers(0, size), min_size=terms, max_size=terms)) for size in (height, width)]
        held = f"{name}w{'_'.join(map(str, totals[0]))}x{'_'.join(map(str, totals[1]))}"
        return Windowed(f"{name}l", f"{name}r", held, height, width, terms, sum(totals[0]), sum(totals[1]), transposed)
    return draw_(contraction(features, name))


def tensors_of(program: Program, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Weights that keep the size of what they multiply: float16 ends at 65504."""
    generator = torch.Generator().manual_seed(seed)
    sums = {name: float(max(stage.pattern[1:3])) for stage in stages(program) if isinstance(stage, Contraction)
            for name in stage.weights}  # fmt: skip
    sums |= {stage.values: stage.capacity / stage.height for stage in stages(program) if isinstance(stage, Sparse)}
    made = {
        name: (torch.randn(size, generator=generator, dtype=torch.float64) / max(1.0, sums.get(name, 1.0)) ** 0.5).to(
            dtype
        )
        for name, size in tensor_sizes(program).items()
    }
    for outer in stages(program):
        stage = outer.stage if isinstance(outer, Pairs) else outer
        if isinstance(stage, Permute):
            made[stage.index] = torch.randperm(stage.size, generator=generator)
        elif isinstance(stage, Interpolation):
            made[stage.places] = torch.randperm(stage.size, generator=generator)
        elif isinstance(stage, Sparse):
            places = torch.randint(stage.height * stage.width, (stage.capacity,), generator=generator)
            made[stage.places] = places.sort().values if seed % 2 else places  # with repetitions; sorted, or not
        elif isinstance(stage, Windowed):
            rows, columns = (
                [int(w) for w in part.split("_")] for part in stage.windows[stage.windows.index("w") + 1 :].split("x")
            )
            starts = [torch.randint(size, (stage.terms,), generator=generator) for size in (stage.height, stage.width)]
            made[stage.windows] = torch.stack([starts[0], torch.tensor(rows), starts[1], torch.tensor(columns)], 1)
    return made
