"""Attention whose projections are layers of their own, so that each can be of any kind."""

from __future__ import annotations

from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat.errors import ShapeError
from structmat.nn.linear import StructuredLinear

PROJECTIONS = ("query", "key", "value", "output")
"""Names of the layers."""


class SplitAttention(nn.Module):
    """``nn.MultiheadAttention`` with four layers in place of its weights: ``query``, ``key``, ``value``, ``output``.

    Called as that one, with the same outputs. What reads the weights of an ``nn.MultiheadAttention``, such as the fast
    path of ``nn.TransformerEncoderLayer``, finds no ``in_proj_bias`` here and calls it instead.

    Args:
        query, key, value: layers to ``embed_dim`` numbers.
        output: a layer from ``embed_dim`` numbers.
        num_heads: of equal size.
        dropout: probability on the weights of attention, in training.
        batch_first: whether inputs are (batch, time, numbers).
        bias_k, bias_v: (1, 1, embed_dim), appended to keys and values, or None.
        add_zero_attn: whether to append zeros to keys and values.

    Raises:
        ShapeError: the heads do not divide the numbers.
    """

    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        query: nn.Module,
        key: nn.Module,
        value: nn.Module,
        output: nn.Module,
        *,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        batch_first: bool = False,
        bias_k: nn.Parameter | None = None,
        bias_v: nn.Parameter | None = None,
        add_zero_attn: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ShapeError(f"{embed_dim} numbers are not {num_heads} equal heads. Use a divisor.")
        self.query, self.key, self.value, self.output = query, key, value, output
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self.bias_k, self.bias_v = bias_k, bias_v

    @classmethod
    def from_attention(cls, attention: nn.MultiheadAttention) -> Self:
        """The same attention; its layers are ``nn.Linear`` that share the memory of the given weights."""
        size = attention.embed_dim
        held = dict(attention.named_parameters(recurse=False))
        fused, bias = held.get("in_proj_weight"), held.get("in_proj_bias")
        weights: list[Tensor] = [held[f"{n}_proj_weight"] for n in "qkv"] if fused is None else [*fused.split(size)]
        biases: list[Tensor | None] = [None] * 3 if bias is None else [*bias.split(size)]
        trained = (weights[0] if fused is None else fused).requires_grad
        layers = [_sharing(w, b, trained) for w, b in zip(weights, biases, strict=True)]
        out = attention.out_proj
        layers.append(_sharing(out.weight, out.bias, out.weight.requires_grad))
        made = cls(
            *layers,
            embed_dim=size,
            num_heads=attention.num_heads,
            dropout=attention.dropout,
            batch_first=attention.batch_first,
            bias_k=cast(nn.Parameter | None, attention.bias_k),
            bias_v=cast(nn.Parameter | None, attention.bias_v),
            add_zero_attn=attention.add_zero_attn,
        )
        return made.train(attention.training)

    def to_attention(self) -> nn.MultiheadAttention:
        """The ``nn.MultiheadAttention`` with the same outputs: weights written out."""
        layers = [_dense(self.get_submodule(name)) for name in PROJECTIONS]
        like = layers[0].weight
        made = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=layers[0].bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=layers[1].in_features,
            vdim=layers[2].in_features,
            batch_first=self.batch_first,
            device=like.device,
            dtype=like.dtype,
        )
        with torch.no_grad():
            if made._qkv_same_embed_dim:
                made.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers[:3]]))
            else:
                for name, layer in zip("qkv", layers[:3], strict=True):
                    made.get_parameter(f"{name}_proj_weight").copy_(layer.weight)
            if made.in_proj_bias is not None:
                made.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers[:3]]))
            made.out_proj.weight.copy_(layers[3].weight)
            if made.out_proj.bias is not None:
                made.out_proj.bias.copy_(layers[3].bias)
            for own, other in ((self.bias_k, made.bias_k), (self.bias_v, made.bias_v)):
                if own is not None and other is not None:
                    other.copy_(own)
        return made.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of ``nn.MultiheadAttention``: the output and, if asked for, the weights of attention.

        Args:
            query, key, value: (time, batch, numbers), (batch, time, numbers) if ``batch_first``, or (time, numbers).
            key_padding_mask: (batch, time of the keys), True or minus infinity at keys that are padding.
            need_weights: whether to return the weights of attention.
            attn_mask: (time, time of the keys), or one a batch and head: True where a query must not look, or numbers
                that are added.
            average_attn_weights: over the heads.
            is_causal: says that ``attn_mask`` is the causal mask.

        Raises:
            ShapeError: ``is_causal`` comes without the mask that it describes.
        """
        is_batched = query.dim() == 3
        q, k, v = self.query(query), self.key(key), self.value(value)
        if not is_batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if is_causal and attn_mask is None:
            raise ShapeError("is_causal describes an attn_mask and none is given. Give the causal mask.")
        masks = [_added(mask, q.dtype) for mask in (attn_mask, key_padding_mask)]
        k, v, (mask, padding) = self._extended(k, v, masks)
        batch, times, others = q.shape[0], q.shape[1], k.shape[1]
        q, k, v = (x.reshape(batch, -1, self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        if mask is not None and mask.dim() == 3:
            mask = mask.reshape(batch, self.num_heads, times, others)
        if padding is not None:
            padding = padding.reshape(batch, 1, 1, others)
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights[0]
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.output(y.transpose(1, 2).reshape(batch, times, self.embed_dim))
        if not is_batched:
            return y[0], weights
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _extended(self, k: Tensor, v: Tensor, masks: list[Tensor | None]) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Keys and values with what is appended to them, and masks that let it be seen."""
        more: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            more.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            zero = k.new_zeros(1, 1, k.shape[-1])
            more.append((zero, zero))
        for of_keys, of_values in more:
            k = torch.cat([k, of_keys.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, of_values.expand(v.shape[0], -1, -1)], 1)
            masks = [None if mask is None else F.pad(mask, (0, 1)) for mask in masks]
        return k, v, masks

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as numbers to add to scores."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    return mask.to(dtype)


def _sharing(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    """A layer on the memory of a weight and a bias."""
    out, inputs = weight.shape
    layer = nn.Linear(inputs, out, bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def _dense(layer: nn.Module) -> nn.Linear:
    return layer.to_linear() if isinstance(layer, StructuredLinear) else cast(nn.Linear, layer)
