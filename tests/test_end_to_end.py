"""The blocks of the benchmark of whole models are transformer blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import structmat as sm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import end_to_end
from benchmarks.end_to_end import Cell, GPT2Block, LlamaBlock, _heads, _rotated, block, cells, structures


class SmallGPT2(GPT2Block):
    width, heads, inner = 192, 3, 384


class SmallLlama(LlamaBlock):
    width, heads, key_heads, inner = 64, 4, 2, 96


def keys_and_values(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = model.first(x)
    if isinstance(model, GPT2Block):
        _, k, v = (_heads(t, model.heads) for t in model.qkv(y).chunk(3, dim=-1))
        return k, v
    angles = torch.outer(torch.arange(x.shape[1]), model.speeds)
    return _rotated(_heads(model.k(y), model.key_heads), angles), _heads(model.v(y), model.key_heads)


@pytest.mark.parametrize("structure", [None, sm.LowRank(4)])
@pytest.mark.parametrize("kind", [SmallGPT2, SmallLlama])
def test_a_token_after_others_is_as_in_the_whole_sequence(
    kind: type[nn.Module], structure: sm.Structure | None
) -> None:
    model, x = block(kind, structure), torch.randn(2, 7, kind.width)
    with torch.no_grad():
        whole = model(x)
        assert whole.shape == x.shape
        torch.testing.assert_close(model(x[:, :-1]), whole[:, :-1])
        past = keys_and_values(model, x[:, :-1])
        assert past[0].shape == model.past(2, 6)[0].shape
        torch.testing.assert_close(model(x[:, -1:], past), whole[:, -1:])
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear | sm.nn.StructuredLinear)}
    assert kinds == {nn.Linear if structure is None else sm.nn.StructuredLinear}


def test_a_cell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(end_to_end, "GPT2Block", SmallGPT2)
    monkeypatch.setattr(end_to_end, "SECONDS", 0.0)
    monkeypatch.setattr(end_to_end, "STUDY", tmp_path / "study")
    monkeypatch.setattr(end_to_end.Cell, "tokens", 5)
    try:
        result = end_to_end.run_cell(Cell("gpt2-small", 0.25, end_to_end.PREFILL, 2, 1), tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert [model["name"] for model in result["models"]] == list(structures(0.25))
    for model in result["models"]:
        assert min(*model["frozen"].values(), model["tuned"]["after"], model["tuned"]["faster"]) > 0
        assert sum(model["tuned"]["ways"].values()) == 4
        assert model["parameters"] > 2
        assert model["operations"] > 2


def test_every_model_and_phase_has_cells() -> None:
    found = cells()
    assert len({cell.key for cell in found}) == len(found)
    for model in ("novel-lm", "gpt2-small", "llama-1b"):
        assert {(c.phase, c.batch) for c in found if c.model == model} == {
            (phase, batch) for phase in ("prefill", "token") for batch in (1, 64)
        }
