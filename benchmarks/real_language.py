"""The language model of characters on novels, as a study's model."""

from __future__ import annotations

import json
import lzma
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real_data import DATA, Draws, RealModel

WINDOW = 256
"""Characters that the language model sees at once."""

VALIDATION = 300_000
"""Last characters of the training text that nothing is trained or calibrated on."""


@cache
def _characters(file: str) -> Tensor:
    index = {c: i for i, c in enumerate(json.loads((DATA / "novel-lm" / "chars.json").read_text(encoding="utf-8")))}
    with lzma.open(DATA / "novels" / file, "rt") as stream:
        text = stream.read()
    return torch.tensor([index[c] for c in text], dtype=torch.int64)


def _windows(tokens: Tensor, starts: np.ndarray) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([tokens[s : s + WINDOW] for s in starts])}


def _load_language_model() -> nn.Module:
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(DATA / "novel-lm", dtype=torch.float32)
    return model.eval()


def _language_calibration(seed: int, windows: int = 512, size: int = 16) -> list[dict[str, Tensor]]:
    tokens = _characters("train.txt.xz")[:-VALIDATION]
    starts = np.random.default_rng([seed, 1]).integers(0, len(tokens) - WINDOW, windows)
    return [_windows(tokens, starts[i : i + size]) for i in range(0, windows, size)]


def _language_training(seed: int) -> Draws:
    tokens = _characters("train.txt.xz")[:-VALIDATION]

    def draw(random: np.random.Generator) -> dict[str, Tensor]:
        return _windows(tokens, random.integers(0, len(tokens) - WINDOW, 16))

    return Draws(draw, seed + 1000, 100_000)


def _language_held_out() -> list[dict[str, Tensor]]:
    tokens = _characters("train.txt.xz")[-VALIDATION:]
    return [_windows(tokens, np.arange(i, i + 16) * WINDOW) for i in range(0, 128, 16)]


@torch.no_grad()
def bits_per_character(model: nn.Module, characters: int = 262_144) -> float:
    """On the test book, in windows of 256 characters, each predicted from its own window only."""
    test = _characters("test.txt.xz")
    total = 0.0
    step = WINDOW * 64
    for s in range(0, characters, step):
        x, y = test[s : s + step].view(-1, WINDOW), test[s + 1 : s + step + 1].view(-1, WINDOW)
        logits = model(input_ids=x).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    return total / characters / math.log(2)


@torch.no_grad()
def validation_bits(model: nn.Module, windows: int = 256) -> float:
    """Bits per character on the end of the training text, which nothing is trained on: to choose by."""
    tokens = _characters("train.txt.xz")[-VALIDATION:]
    total = 0.0
    for start in range(0, windows, 32):
        places = np.arange(start, start + 32) * (WINDOW + 1)
        x = torch.stack([tokens[p : p + WINDOW] for p in places])
        y = torch.stack([tokens[p + 1 : p + WINDOW + 1] for p in places])
        total += float(F.cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten()))
    return total / (windows // 32) / math.log(2)


def _narrow(width: int) -> nn.Module:
    """Four heads as before, whose sizes are even; the feed-forward part in proportion."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width -= width % 8
    config = LlamaConfig.from_pretrained(DATA / "novel-lm")
    config.hidden_size, config.intermediate_size = width, round(width * 688 / 256)
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = width // 4
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


LANGUAGE_MODEL = RealModel(
    name="novel-lm",
    load=_load_language_model,
    calibration=_language_calibration,
    training=_language_training,
    held_out=_language_held_out,
    evaluate=bits_per_character,
    metric="bits per character",
    lower_is_better=True,
    sample=lambda size: _windows(_characters("train.txt.xz"), np.arange(size) * WINDOW),
    batches=(1, 64),
    rows=WINDOW,
    minutes=6.0,
    narrow=_narrow,
    width=256,
    includes_fitting=True,
)
