"""Small models and data for the tests of compression."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.candidates import Candidate
from structmat.structure import Structure

Batches = list[Any]


def mlp(seed: int = 0, sizes: tuple[int, ...] = (32, 48, 40, 10), bias: bool = True) -> nn.Sequential:
    """Linear layers with in-place ReLUs between them, and weights whose spectra decay."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(a, b, bias=bias)
        with torch.no_grad():
            u, _ = torch.linalg.qr(torch.randn(b, min(a, b), generator=generator))
            v, _ = torch.linalg.qr(torch.randn(a, min(a, b), generator=generator))
            linear.weight.copy_(u @ torch.diag(2.0 * 0.85 ** torch.arange(min(a, b))) @ v.T)
            if linear.bias is not None:
                linear.bias.copy_(0.1 * torch.randn(b, generator=generator))
        layers += [linear] if i == len(sizes) - 2 else [linear, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def labelled(count: int = 4, size: int = 32, features: int = 32, classes: int = 10, seed: int = 1) -> Batches:
    """Batches ``(inputs, labels)`` of correlated features."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    return [
        (
            torch.randn(size, features, generator=generator) @ mix,
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


class Encoder(nn.Module):
    """A ``TransformerEncoderLayer`` between two linear layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True, dropout=0.0)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(1))


def llama(seed: int = 0, **options: Any) -> nn.Module:
    """A tiny language model of transformers with tied embedding, built from scratch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        **{"tie_word_embeddings": True, "initializer_range": 0.2, **options},
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> nn.Module:
    """A tiny GPT-2 of transformers, whose linear layers are ``Conv1D``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=24, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tokens(count: int = 3, size: int = 4, length: int = 12, vocabulary: int = 24, seed: int = 2) -> Batches:
    """Batches ``{"input_ids": ...}``."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, vocabulary, (size, length), generator=generator)} for _ in range(count)]


def candidate(structure: Structure, cost: float, loss: float, certificate: str = "none") -> Candidate:
    """One whose numbers are what is asked for."""
    return Candidate(structure, int(cost), int(cost), loss**0.5, 0.0, certificate, "made up", loss, cost)
