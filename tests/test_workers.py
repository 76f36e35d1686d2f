"""Work on many layers at once: order, threads, errors."""

from __future__ import annotations

import pytest
import torch

from structmat.compression.workers import side_by_side


@pytest.mark.parametrize("alone", [False, True])
def test_results_come_in_the_order_of_the_items(alone: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []

        def work(item: int) -> int:
            seen.append(torch.get_num_threads())
            return item * item

        assert side_by_side(work, range(20), "squares", progress=False, alone=alone) == [i * i for i in range(20)]
        assert set(seen) == ({2} if alone else {1})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("alone", [False, True])
def test_an_error_ends_the_work_and_restores_the_threads(alone: bool) -> None:
    before, done = torch.get_num_threads(), []

    def work(item: int) -> int:
        if item == 3:
            raise ValueError("no threes")
        done.append(item)
        return item

    with pytest.raises(ValueError, match="no threes"):
        side_by_side(work, range(10_000), "numbers", progress=False, alone=alone)
    assert torch.get_num_threads() == before
    assert len(done) < 10_000
