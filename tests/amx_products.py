"""Products in matrix registers that have one right outcome: of small integers, whose sums in float32 are exact."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from structmat.kernels import native, operator
from structmat.kernels.choice import runs_by_pairs
from structmat.kernels.text import Text, text_of
from structmat.program import Contraction, Program, Sum, reference, tensor_sizes


def multiply(program: Program, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """By the native kernels."""
    text = text_of(program)
    assert isinstance(text, Text)
    return operator.run(x, operator.arguments(text, tensors, None), text.plain)


def integers(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-3, 4, size, generator=generator).bfloat16()


def expected(contraction: Contraction, tensors: dict[str, Tensor], x: Tensor, before: Tensor | float) -> Tensor:
    """Exact, and rounded once."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    return (reference.apply(contraction, wide, x.double()) + before).bfloat16()


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from([(1, 1), (2, 1), (1, 3), (1, 40)]),
    st.integers(1, 70) | st.sampled_from([16, 32, 48]),
    st.integers(1, 70) | st.sampled_from([16, 32, 64, 300]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([16, 17, 32, 75, 130]),
    st.integers(0, 10**6),
)
def check_integers(
    outer: tuple[int, int], b: int, c: int, flags: tuple[bool, bool, bool], rows: int, seed: int
) -> None:
    """Of one contraction, and of the sum of two, whose second is added to the rounded outcome of the first."""
    assert native().multiplies_matrices
    assume((b, c) != (2, 2))  # they have a kernel of their own, in float32
    (a, d), generator = outer, torch.Generator().manual_seed(seed)
    one, two = Contraction("v", a, b, c, d, *flags), Contraction("w", a, b, c, d, *flags)
    program = Sum((one, two))
    assert runs_by_pairs(program)
    tensors = {name: integers((size,), generator) for name, size in tensor_sizes(program).items()}
    x = integers((rows, program.in_features), generator)
    first = expected(one, tensors, x, 0.0)
    assert torch.equal(multiply(one, tensors, x), first)
    assert torch.equal(multiply(program, tensors, x), expected(two, tensors, x, first.double()))


def check_what_is_beyond() -> None:
    """Padding multiplies nothing: infinite numbers reach the outcome that they belong to, and no other."""
    program = Contraction("w", 2, 17, 33, 1)
    generator = torch.Generator().manual_seed(0)
    tensors = {"w": integers((2, 17, 33), generator)}
    x = integers((40, 66), generator)
    clean = multiply(program, tensors, x)
    tensors["w"][0, 16, 32] = torch.inf
    x[:, 32] = 1
    x[7, 33] = torch.nan
    found = multiply(program, tensors, x)
    assert found[:, 16].isposinf().all()
    assert found[7, 17:].isnan().all()
    found[:, :17], found[7, 17:] = clean[:, :17], clean[7, 17:]
    assert torch.equal(found, clean)


def report() -> str:
    """For a process of its own: which instruction set passed."""
    check_integers()
    check_what_is_beyond()
    return native().instruction_set
