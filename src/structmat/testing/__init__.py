"""The contract that every family is held to; third parties run it on theirs.

    from structmat.testing import check_structure
    check_structure(MyFamily(rank=3), (12, 10))

Tolerances follow from the dtype and the program (see :func:`structmat.testing.case.magnitude`); none is hand-picked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from structmat.structure import Shape, Structure, check_shape
from structmat.testing import counts, fits, gradients, graphs, saving, values
from structmat.testing.case import Case, SkippedCheckError

__all__ = ["CHECKS", "Case", "Report", "SkippedCheckError", "check_structure"]

Check = Callable[[Case], None]

CHECKS: Mapping[str, tuple[Check, ...]] = MappingProxyType(
    {
        "values": (
            values.check_linearity,
            values.check_dense,
            values.check_adjoint,
            values.check_transpose,
            values.check_batch_shapes,
            values.check_non_contiguous,
            values.check_dtypes,
            values.check_complex,
            values.check_autocast,
        ),
        "counts": (counts.check_parameter_counts, counts.check_operation_counts, counts.check_program),
        "gradients": (gradients.check_gradients, gradients.check_double_backward, gradients.check_gradient_per_sample),
        "projection": (
            fits.check_projection,
            fits.check_projection_of_members,
            fits.check_weighted_projection,
            fits.check_complex_projection,
        ),
        "configurations": (fits.check_configurations,),
        "initialisation": (fits.check_initialisation,),
        "saving": (saving.check_json, saving.check_state_dict, saving.check_deepcopy, saving.check_meta_device),
        "compile": (graphs.check_compile,),
        "inductor": (graphs.check_inductor,),
        "export": (graphs.check_export,),
        "onnx": (graphs.check_onnx,),
    }
)
"""The checks by group, cheap ones first. Each takes a :class:`Case` and raises an AssertionError if it fails."""


@dataclass(frozen=True)
class Report:
    """What :func:`check_structure` did: names of the checks that passed, and of those skipped with the reason."""

    passed: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def check_structure(
    structure: Structure, shape: Shape, *, groups: Collection[str] | None = None, seed: int = 0
) -> Report:
    """Hold a structure at a shape to the contract.

    Args:
        structure: the family with its sizes, as a user would write it.
        shape: ``(out_features, in_features)``; small ones are fast and find as much.
        groups: which groups of :data:`CHECKS` to run; all if None. The groups ``inductor``, ``export`` and ``onnx``
            take seconds, all others together less than one on small shapes.
        seed: of every random number.

    Returns:
        What passed and what was skipped (no C++ compiler, no ONNX, a family of real tensors).

    Raises:
        ExceptionGroup: with one exception, usually an AssertionError, for each check that failed.
        ShapeError: the structure refuses the shape.
        KeyError: a group is unknown.
    """
    case = Case(structure, check_shape(shape), seed)
    _ = case.resolved
    passed: list[str] = []
    skipped: dict[str, str] = {}
    failures: list[Exception] = []
    for group in CHECKS if groups is None else groups:
        for check in CHECKS[group]:
            try:
                check(case)
            except SkippedCheckError as reason:
                skipped[check.__name__] = str(reason)
            except Exception as error:
                error.add_note(f"in {check.__name__} of {structure} at shape {shape}, seed {seed}")
                failures.append(error)
            else:
                passed.append(check.__name__)
    if failures:
        total = len(passed) + len(failures)
        raise ExceptionGroup(f"{structure} at shape {shape} fails {len(failures)} of {total} checks", failures)
    return Report(tuple(passed), MappingProxyType(skipped))
