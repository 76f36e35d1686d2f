"""The character LSTM on Shakespeare and the spelling GRU on a dictionary, as a study's models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real_data import DATA, Passes, RealModel
from benchmarks.real_nets import G2P, CharLSTM, char_lstm, known_words, lesson, phoneme_errors, spellings
from structmat.compression.distill import Optimizer

Labelled = tuple[Tensor, Tensor]

# ------------------------------------------------------------------------------------------------ the character LSTM

LENGTH = 128
"""Characters of a training window, which begins with an empty state."""

ROWS = 32
"""Windows of a training batch."""

FORGOTTEN = 20
"""Characters after which the model does not remember any more that its state was empty. What it says before is not to
be imitated: with an empty state the original, which never saw one, takes five bits for each of the first eight
characters, and to say the same would cost a small model what it has. To calibrate on them too is better, though: fitted
without them a quarter of the numbers begins farther from the original everywhere (.32 nats in place of .25)."""

WRITTEN_AT_ONCE = 32
"""Batches that a model writes together, which takes a fraction of the time that they would take one after the other."""

STREAMS, STREAM = 16, 6900
"""Of the test text, the last tenth: so many parallel streams of so many characters, with the state carried."""


@cache
def _text() -> dict[str, Tensor]:
    """The last tenth is for testing; of the rest the last twentieth judges."""
    _, text = char_lstm(DATA)
    end = int(0.9 * len(text))
    start = int(0.95 * end)
    return {"train": text[:start], "held out": text[start:end], "test": text[end:]}


def _labelled(windows: Tensor, forgotten: int = FORGOTTEN) -> Labelled:
    """Of windows of one character more: the characters, and what follows them once the start is forgotten."""
    return windows[:, :-1], windows[:, forgotten + 1 :]


def _windows(text: Tensor, starts: np.ndarray, forgotten: int = FORGOTTEN) -> Labelled:
    return _labelled(torch.stack([text[s : s + LENGTH + 1] for s in starts]), forgotten)


def _said(model: nn.Module, batch: Labelled) -> Tensor:
    """Of the last characters, as many as have labels."""
    x, y = batch
    logits: Tensor = model(x)[0]
    return logits[:, -y.shape[1] :]


def _text_calibration(seed: int, windows: int = 512, size: int = 32) -> list[Labelled]:
    text = _text()["train"]
    starts = np.random.default_rng([seed, 1]).integers(0, len(text) - LENGTH - 1, windows)
    return [_windows(text, starts[i : i + size], forgotten=0) for i in range(0, windows, size)]


@torch.no_grad()
def written(model: nn.Module, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Text that a model writes, (rows, length), each character drawn from its distribution.

    Args:
        model: of characters; its state is empty at the first.
        first: (rows,) characters to begin with, which with those that follow at once are not returned.
        length: of the windows.
        generator: of what is drawn.
    """
    last, state, rows = first.unsqueeze(1), None, []
    for _ in range(FORGOTTEN + length):
        logits, state = model(last, state)
        last = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
        rows.append(last)
    return torch.cat(rows[FORGOTTEN:], 1)


@dataclass(frozen=True)
class TextAndWritten:
    """Windows of the training text, in turns with windows that the original writes.

    A million characters are few: a model of a quarter of the size comes much nearer to the original on them than on
    text that it was not shown. What the original writes is as much more as one likes of what it knows.
    """

    seed: int
    count: int = 1_000_000

    def __iter__(self) -> Iterator[Labelled]:
        text, original = _text()["train"], char_lstm(DATA)[0]
        random, generator = np.random.default_rng(self.seed), torch.Generator().manual_seed(self.seed)
        for _ in range(self.count // (2 * WRITTEN_AT_ONCE)):
            first = text[torch.randint(len(text), (ROWS * WRITTEN_AT_ONCE,), generator=generator)]
            for windows in reversed(written(original, first, LENGTH + 1, generator).split(ROWS)):
                yield _windows(text, random.integers(0, len(text) - LENGTH - 1, ROWS))
                yield _labelled(windows)

    def __len__(self) -> int:
        return self.count


def _text_training(seed: int) -> TextAndWritten:
    return TextAndWritten(seed + 1000)


def _text_held_out() -> list[Labelled]:
    text = _text()["held out"]
    starts = np.arange(256) * (len(text) - LENGTH - 1) // 256
    return [_windows(text, starts[i : i + 64]) for i in range(0, 256, 64)]


@torch.no_grad()
def _bits(model: nn.Module) -> float:
    text = _text()["test"]
    streams = text[: STREAMS * STREAM].view(STREAMS, STREAM)
    total, count, state = 0.0, 0, None
    for start in range(0, STREAM - 1, 690):
        x = streams[:, start : start + 690]
        y = streams[:, start + 1 : start + 691]
        logits, state = model(x, state)
        logits = logits[:, : y.shape[1]]
        total += float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
        count += y.numel()
    return total / count / math.log(2)


CHAR_LSTM = RealModel(
    name="char-lstm",
    load=lambda: char_lstm(DATA)[0],
    calibration=_text_calibration,
    training=_text_training,
    held_out=_text_held_out,
    evaluate=_bits,
    metric="bits per character",
    lower_is_better=True,
    sample=lambda size: _windows(_text()["train"], np.arange(size) * LENGTH),
    batches=(1, 64),
    rows=LENGTH,
    minutes=5.0,
    narrow=lambda width: CharLSTM(width).eval(),
    width=128,
    forward=_said,
    rates=(1e-3, 3e-3, 1e-2),
    optimizer=Optimizer.SOAP,
    thins=0.5,
)

# ------------------------------------------------------------------------------------------------- the spelling GRU

WORDS_HELD_OUT = 2000
"""Words of the dictionary that nothing is trained on, beside the 4,000 that are tested on."""

Lesson = tuple[list[str], Tensor]


@cache
def _words() -> tuple[list[Any], list[Any]]:
    """In an order of their own: to train on, and to judge by. Spellings of one word stay on one side."""
    entries = known_words(DATA, G2P(DATA))
    names = sorted({word for word, _ in entries})
    held = {names[i] for i in np.random.default_rng(0).permutation(len(names))[:WORDS_HELD_OUT]}
    return [e for e in entries if e[0] not in held], [e for e in entries if e[0] in held]


def _word_calibration(seed: int, batches: int = 24, size: int = 64) -> list[Lesson]:
    words = _words()[0]
    random = np.random.default_rng([seed, 1])
    return [lesson([words[i] for i in random.integers(0, len(words), size)]) for _ in range(batches)]


WORDS, SORTED = 256, 16
"""Words of a training batch; batches whose words are dealt by their lengths, so that those of one are alike: a step
takes three fifths of the time then."""


def _word_training(seed: int) -> Passes:
    """Every word once before any comes again."""
    words = _words()[0]

    def sorted_lessons(random: np.random.Generator) -> Iterator[Lesson]:
        order = random.permutation(len(words))
        for start in range(0, len(order) - WORDS * SORTED + 1, WORDS * SORTED):
            some = [words[i] for i in order[start : start + WORDS * SORTED]]
            some.sort(key=lambda entry: (len(entry[1]), len(entry[0])))
            for batch in random.permutation(SORTED):
                yield lesson(some[batch * WORDS : (batch + 1) * WORDS])

    return Passes(sorted_lessons, seed + 1000, 1_000_000)


def _word_held_out() -> list[Lesson]:
    words = _words()[1]
    return [lesson(words[i : i + 250]) for i in range(0, 1000, 250)]


def _word_loss(output: dict[str, Tensor], batch: Lesson) -> Tensor:
    wanted = batch[1][:, 1:]
    return F.cross_entropy(output["logits"], wanted[wanted != -100])


def _errors(model: nn.Module) -> float:
    assert isinstance(model, G2P)
    return phoneme_errors(model, spellings(DATA))


G2P_GRU = RealModel(
    name="g2p-gru",
    load=lambda: G2P(DATA).eval(),
    calibration=_word_calibration,
    training=_word_training,
    held_out=_word_held_out,
    evaluate=_errors,
    metric="phoneme errors, %",
    lower_is_better=True,
    sample=lambda size: lesson(_words()[0][:size]),
    batches=(1, 64),
    rows=8,
    minutes=5.0,
    narrow=lambda width: G2P(DATA, width).eval(),
    width=256,
    forward=lambda model, batch: model.teach(batch),
    rates=(2e-4, 6e-4, 2e-3),
    optimizer=Optimizer.SOAP,
    own_loss=1.0,
    loss=_word_loss,
)
