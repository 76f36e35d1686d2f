"""Every family, on odd shapes, held to the contract that third parties run on theirs.

This is also the conformance check of the circuits note (``Families``): products with the matrix and its transpose,
gradients, counts, to_dense, saved state, odd sizes, batch shapes, dtypes, non-contiguous and empty inputs.
"""

from __future__ import annotations

import market
import pytest

import structmat as sm
from structmat.structure import Shape, Structure
from structmat.testing import CHECKS, Case, check_structure, values

CHEAP = tuple(group for group in CHECKS if group not in ("compile", "inductor", "export", "onnx"))
LARGE: Shape = (768, 3072)
SAMPLE: Shape = (12, 10)


def name(value: object) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value).replace("/", "-")


@pytest.mark.parametrize(("structure", "shape"), market.cases(), ids=name)
def test_circuits_Families_contract(structure: Structure, shape: Shape) -> None:
    report = check_structure(structure, shape, groups=CHEAP)
    assert len(report.passed) + len(report.skipped) == sum(len(CHECKS[group]) for group in CHEAP)


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "shape"), market.other_cases(), ids=name)
def test_circuits_Families_contract_of_the_others(structure: Structure, shape: Shape) -> None:
    check_structure(structure, shape, groups=CHEAP)


@pytest.mark.parametrize(("structure", "shape"), market.one_a_family(LARGE), ids=name)
def test_circuits_Families_large(structure: Structure, shape: Shape) -> None:
    case = Case(structure, shape)
    for check in (*CHECKS["counts"], values.check_linearity, values.check_adjoint, values.check_dtypes):
        check(case)


@pytest.mark.parametrize(("structure", "shape"), market.one_a_family((1, 7), (13, 17)), ids=name)
def test_compile(structure: Structure, shape: Shape) -> None:
    check_structure(structure, shape, groups=("compile",))


def a_few() -> list[tuple[Structure, Shape]]:
    """Families between them with all kinds of stages that networks are usually made of: the others are slow."""
    few = (sm.LowRank, sm.Butterfly, sm.Sparse, sm.GBLR)
    return [(s, shape) for s, shape in market.one_a_family(SAMPLE, others=False) if isinstance(s, few)]


@pytest.mark.parametrize(("structure", "shape"), a_few(), ids=name)
def test_inductor(structure: Structure, shape: Shape) -> None:
    check_structure(structure, shape, groups=("inductor",))


@pytest.mark.parametrize(("structure", "shape"), market.one_a_family(SAMPLE, others=False), ids=name)
@pytest.mark.parametrize("group", ["export", "onnx"])
def test_graphs(structure: Structure, shape: Shape, group: str) -> None:
    report = check_structure(structure, shape, groups=(group,))
    for reason in report.skipped.values():
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "shape"), market.cases(), ids=name)
@pytest.mark.parametrize("group", ["inductor", "export"])
def test_graphs_everywhere(structure: Structure, shape: Shape, group: str) -> None:
    report = check_structure(structure, shape, groups=(group,))
    for reason in report.skipped.values():
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "shape"), market.one_a_family(SAMPLE), ids=name)
def test_onnx_of_every_family(structure: Structure, shape: Shape) -> None:
    report = check_structure(structure, shape, groups=("onnx",))
    for reason in report.skipped.values():
        pytest.skip(reason)


@pytest.mark.parametrize("family", sm.families().values(), ids=lambda family: family.__name__)
def test_every_family_is_on_the_market(family: type[Structure]) -> None:
    for shape in market.SMALL_SHAPES:
        if min(shape) >= 8 and (family.by_default or shape == (16, 16)):  # some are square, or for powers of two
            assert market.proposals(family, shape), f"{family.__name__} proposes nothing for {shape}"
