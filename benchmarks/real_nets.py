"""The trained models with convolutions and recurrent nets, at any width, their data and their measures of quality."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

Batches = list[Any]


def logits(output: Any) -> Tensor:
    """Of what a network of this file returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.more:
            half = self.more // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.more - half))
        return F.relu(x + y)


class ResNet(nn.Module):
    """For pictures of 32 x 32: three groups of ``count`` blocks, ``width``, twice and four times as many channels."""

    def __init__(self, count: int, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(i if k == 0 else o, o, s if k == 0 else 1) for k in range(count)))
            for i, o, s in ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        )
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(y))).mean((2, 3)))


def resnet(data: Path, count: int = 3) -> ResNet:
    """ResNet-20, or another depth of ``6 count + 2``."""
    model = ResNet(count)
    model.load_state_dict(load_file(data / f"cifar-resnet/resnet{6 * count + 2}.safetensors"), strict=False)
    return model.eval()


def tiles(file: Path) -> Tensor:
    """The pictures of a sheet, (pictures, 3, 32, 32), as bytes."""
    from PIL import Image

    with Image.open(file) as image:
        sheet = np.asarray(image.convert("RGB"))
    parts = sheet.reshape(sheet.shape[0] // 32, 32, sheet.shape[1] // 32, 32, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(parts.reshape(-1, 3, 32, 32).copy())


def pictures(data: Path, name: str, count: int) -> Tensor:
    """The first tiles of a sheet, normalised."""
    return normalised(tiles(data / f"cifar10/{name}.webp")[:count])


def normalised(pixels: Tensor) -> Tensor:
    """Bytes as the networks read them."""
    x = pixels.float() / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x - mean) / deviation


class CharLSTM(nn.Module):
    """A language model of characters."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.emb, self.lstm, self.out = (
            nn.Embedding(65, width),
            nn.LSTM(width, width, 2, batch_first=True),
            nn.Linear(width, 65),
        )

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.lstm(self.emb(x), state)
        return self.out(y), state


def char_lstm(data: Path) -> tuple[CharLSTM, Tensor]:
    """The model and the text as indices; the last tenth is for judging."""
    model = CharLSTM()
    model.load_state_dict(load_file(data / "char-lstm/model.safetensors"))
    characters = {c: i for i, c in enumerate(json.loads((data / "char-lstm/chars.json").read_text()))}
    text = (data / "text/tinyshakespeare.txt").read_text()
    return model.eval(), torch.tensor([characters[c] for c in text])


class G2P(nn.Module):
    """Spelling to phonemes: an encoder and a decoder of GRUs."""

    def __init__(self, data: Path, width: int = 256) -> None:
        super().__init__()
        names = json.loads((data / "g2p-gru/vocab.json").read_text())
        self.letters, self.phonemes = names["graphemes"], names["phonemes"]
        self.enc_emb, self.dec_emb = nn.Embedding(29, width), nn.Embedding(74, width)
        self.enc, self.dec = (nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.fc = nn.Linear(width, 74)
        if width == 256:
            self.load_state_dict(load_file(data / "g2p-gru/model.safetensors"))

    def read(self, words: list[str]) -> Tensor:
        """The state after the spelling."""
        ids = [torch.tensor([self.letters.index(c) for c in word] + [2]) for word in words]
        packed = nn.utils.rnn.pack_sequence(ids, enforce_sorted=False)  # indices: one look-up for all letters then
        return self.enc(packed._replace(data=self.enc_emb(packed.data)))[1]

    def teach(self, batch: tuple[list[str], Tensor]) -> dict[str, Tensor]:
        """Logits of the phonemes that follow given ones; padding is -100."""
        words, given = batch
        y, _ = self.dec(self.dec_emb(given[:, :-1].clamp(min=0)), self.read(words))
        return {"logits": self.fc(y)[given[:, 1:] != -100]}

    @torch.no_grad()
    def speak(self, words: list[str], steps: int = 20) -> list[list[str]]:
        """Phonemes, the likeliest one after the other."""
        h, y, found = self.read(words), torch.full((len(words),), 2), []
        for _ in range(steps):
            o, h = self.dec(self.dec_emb(y)[:, None], h)
            y = self.fc(o[:, 0]).argmax(-1)
            found.append(y)
        rows = torch.stack(found, 1).tolist()
        return [[self.phonemes[i] for i in (r[: r.index(3)] if 3 in r else r)] for r in rows]


def spellings(data: Path) -> list[tuple[str, list[list[str]]]]:
    """Words to judge by, each with its pronunciations."""
    lines = [line.split("\t") for line in (data / "cmudict/eval4000.tsv").read_text().splitlines()]
    return [(word, [p.split() for p in several.split("|")]) for word, several in lines]


def phoneme_errors(model: G2P, words: list[tuple[str, list[list[str]]]]) -> float:
    """Edit distances to the nearest pronunciation, by the lengths of these, in percent."""
    wrong = total = 0
    for said, (_, several) in zip(model.speak([word for word, _ in words]), words, strict=True):
        distance, length = min((_edits(said, wanted), len(wanted)) for wanted in several)
        wrong, total = wrong + distance, total + length
    return 100 * wrong / total


def _edits(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def lessons(data: Path, model: G2P, count: int, size: int, seed: int) -> Batches:
    """Words of the dictionary that are not judged by, with their phonemes."""
    entries = known_words(data, model)
    draws = torch.randint(0, len(entries), (count, size), generator=torch.Generator().manual_seed(seed)).tolist()
    return [lesson([entries[i] for i in draw]) for draw in draws]


def known_words(data: Path, model: G2P) -> list[tuple[str, list[int]]]:
    """Every word of the dictionary that is not judged by, with the indices of its phonemes between start and end."""
    held = {word for word, _ in spellings(data)}
    entries = []
    for line in gzip.decompress((data / "cmudict/cmudict.dict.gz").read_bytes()).decode().splitlines():
        word, *phonemes = line.split("#")[0].split()
        if word.isalpha() and word.isascii() and word not in held and set(phonemes) <= set(model.phonemes):
            entries.append((word, [2, *(model.phonemes.index(p) for p in phonemes), 3]))
    return entries


def lesson(entries: list[tuple[str, list[int]]]) -> tuple[list[str], Tensor]:
    """A batch: words, and their phonemes padded with -100."""
    ids = torch.full((len(entries), max(len(y) for _, y in entries)), -100)
    for row, (_, y) in zip(ids, entries, strict=True):
        row[: len(y)] = torch.tensor(y)
    return [word for word, _ in entries], ids
