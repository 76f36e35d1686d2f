"""The study of Kronecker networks compares what it says: equal sizes, the same function in every form."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from structmat.nn import KroneckerBlock, KroneckerNetwork
from structmat.structure import count_parameters

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.kronecker_models import METHODS, Method, build, counts, member, narrow_width
from benchmarks.kronecker_speed import Plain
from benchmarks.kronecker_study import CELLS, STUDY, best_rate, main_name
from benchmarks.kronecker_tasks import TASKS
from benchmarks.study import of_name

SIZES = ((4, 4), (32, 32), (32, 32), (17, 16))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key)
def test_methods_have_the_size_that_they_claim(method: Method) -> None:
    model = build(method, SIZES, torch.relu, 0, published=False)
    assert model(torch.randn(5, 16)).shape == (5, 272)
    found = counts(model)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    if method.terms and "tensor-train" not in method.name:
        network = KroneckerNetwork(SIZES, method.terms)
        budget = network.counts.parameters
        wide = [b.shape for b in network.layers()]
        slack = sum(max(0, b.in_features + b.out_features - b.weights - b.inner_biases) for b in wide)
        assert found["parameters"] <= budget + slack
        if method.name.startswith("Kronecker"):
            assert (found["parameters"], found["macs"]) == (budget, network.counts.macs)


def test_the_smallest_member_is_used_where_nothing_fits() -> None:
    smallest = member("BlockTensorTrain", (1024, 1024), 10)
    assert count_parameters(smallest, (1024, 1024)) > 10
    assert count_parameters(member("LowRank", (100, 50), 460), (100, 50)) == 450
    width = narrow_width(784, 10, 2, 6534)
    sizes = [sum(a * b + b for a, b in ((784, w), (w, w), (w, 10))) for w in (width, width + 1)]
    assert sizes[0] <= 6534 < sizes[1]


@pytest.mark.parametrize("form", ["broadcast", "transposed", "einsum"])
@pytest.mark.parametrize("terms", [1, 3])
def test_plain_forms_compute_the_same(form: str, terms: int) -> None:
    for outer in (torch.tanh, None):
        block = KroneckerBlock(
            15, 8, terms, in_shape=(3, 5), out_shape=(4, 2), order="left", inner=torch.tanh, outer=outer
        )
        x = torch.randn(6, 15)
        torch.testing.assert_close(Plain(block, form)(x), block(x), rtol=1e-5, atol=1e-6)


def test_cells_have_names_of_their_own_and_tables_say_what_was_not_run() -> None:
    keys = [cell.key for cell in CELLS]
    assert len(keys) == len(set(keys))
    text = "\n".join(STUDY.tables({}))
    assert text.count("not run") >= len(TASKS) * len(METHODS)
    stored = {path.stem for path in Path(STUDY.path(CELLS[0])).parent.glob("*.json")}
    assert stored <= set(keys), "every stored figure belongs to a cell"
    assert all(math.prod(task.sizes[0]) == 4096 or not task.images for task in TASKS)


def test_every_cell_has_the_best_rate_of_its_sweep() -> None:
    done = STUDY.done()
    for task in TASKS:
        for method in METHODS:
            rate, swept = best_rate(task, method)
            for cell in of_name(done, CELLS, main_name(task, method)):
                assert (cell["rate"], cell["swept"]) == (rate, swept), f"{task.name}, {method.key}: run it again"
