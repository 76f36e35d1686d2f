"""Checks of the account: parameters and operations against the tensors, the program and a count of positions."""

from __future__ import annotations

from structmat.nn.linear import StructuredLinear
from structmat.program import build, cost, stages, table
from structmat.structure import count_parameters, resolve, specs
from structmat.testing.case import Case
from structmat.testing.oracle import count_operations
from structmat.testing.values import small_enough_to_write_out


def check_parameter_counts(case: Case) -> None:
    """Matrix, structure, program and layer agree on the number of learned numbers, and each of them is read."""
    matrix, declared = case.matrix, specs(case.structure, case.shape)
    learned = {name: spec for name, spec in declared.items() if spec.learned}
    in_tensors = sum(matrix.tensors[name].numel() for name in learned)
    layer = StructuredLinear.from_matrix(matrix)
    counts = {
        "the tensors": in_tensors,
        "num_parameters": matrix.num_parameters,
        "count_parameters": count_parameters(case.structure, case.shape),
        "cost(program)": cost(matrix.program).parameters,
        "layer.parameters()": sum(p.numel() for p in layer.parameters()),
    }
    case.require(len(set(counts.values())) == 1, f"the numbers of parameters differ: {counts}.")
    read = {name for stage in stages(matrix.program) for name in (*stage.weights, *stage.indices)}
    case.require(
        read == set(declared), f"the program reads the tensors {sorted(read)}, declared are {sorted(declared)}."
    )
    for name in learned:
        shape, found = declared[name].shape, tuple(matrix.tensors[name].shape)
        case.require(found == shape, f"the tensor {name} has shape {found}, declared is {shape}.")
    buffers = {name for name, _ in layer.named_buffers()}
    case.require(buffers == set(declared) - set(learned), f"the layer's buffers are {sorted(buffers)}.")


def check_operation_counts(case: Case) -> None:
    """Multiplications and additions equal a count of the positions of the matrices written out, for S and S.T."""
    for name, matrix in (("S", case.matrix), ("S.T", case.matrix.T)):
        amount = matrix.cost
        case.require(
            matrix.flops == amount.multiplications + amount.additions and matrix.macs == amount.multiplications,
            f"flops={matrix.flops} and macs={matrix.macs} of {name} are not those of its program: {amount}.",
        )
        case.require(amount.depth >= 0 and amount.additions >= 0, f"{name} has a negative count: {amount}.")
        if not small_enough_to_write_out(case):
            continue
        counted = count_operations(matrix.program, matrix.tensors)
        if counted is None:
            continue
        multiplications, additions, empty_rows = counted
        case.require(
            amount.multiplications == multiplications,
            f"{name} claims {amount.multiplications} multiplications; its positions take {multiplications}.",
        )
        case.require(  # which rows are empty is in the tensors, which the program does not know
            additions - empty_rows <= amount.additions <= additions,
            f"{name} claims {amount.additions} additions; its positions take {additions}.",
        )


def check_program(case: Case) -> None:
    """The program is the same value each time it is built, maps in_features to out_features, and prints as a table."""
    program = case.matrix.program
    again = build(resolve(case.structure, case.shape), case.shape)
    case.require(program == again and hash(program) == hash(again), "building the program twice gives two values.")
    ends = (program.out_features, program.in_features)
    case.require(ends == case.shape, f"the program has shape {ends}.")
    text = table(program)
    case.require(f"{cost(program).parameters}" in text.splitlines()[-1], "the table's total lacks the parameters.")
