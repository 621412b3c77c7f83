"""What vLLM's block drafts call beside the layers of every draft: a cache of slots and two kernels.

A block's context is stored before the block runs, so attention here reads keys and values by the
slots that they were stored under, as vLLM's does: one slot a position.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.readers import stand_in_layers as layers

SLOTS = 64


class CachedAttention(layers.Attention):
    """Over everything that is stored before the end of the block; the block stores itself first.

    ``causal`` and ``positions`` [B] of the block are set by whoever runs it, as vLLM's runner does.
    """

    def __init__(
        self, heads: int, head_size: int, scale: float, num_kv_heads: int, **rest: Any
    ) -> None:
        super().__init__(heads, head_size, scale, num_kv_heads)
        assert rest["per_layer_sliding_window"] is None and rest["sinks"] is None
        assert rest["attn_type"] == "decoder"
        self.layer_name = rest["prefix"]
        self.kv_cache = torch.full((2, SLOTS, num_kv_heads, head_size), float("nan"))
        self.impl = SimpleNamespace(do_kv_cache_update=store)
        self.causal, self.positions = True, torch.empty(0, dtype=torch.long)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *batch: Any) -> Tensor:
        new = tuple(x.view(-1, self.kv_heads, self.size) for x in (k, v))
        store(self, *new, self.kv_cache, self.positions)
        end = int(self.positions[-1]) + 1
        repeat = self.heads // self.kv_heads
        keys, values = (x[:end].transpose(0, 1).repeat_interleave(repeat, 0) for x in self.kv_cache)
        mask = torch.ones(len(q), end, dtype=torch.bool)
        if self.causal:
            mask = mask.tril(end - len(q))
        queries = q.view(-1, self.heads, self.size).transpose(0, 1)
        out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=self.scale)
        return out.transpose(0, 1).flatten(1)


def attention(*args: Any, **fields: Any) -> layers.Attention:
    """Attention of a block draft, whose file names the sinks, or of an EAGLE draft."""
    return (CachedAttention if "sinks" in fields else layers.Attention)(*args, **fields)


def store(attention: Any, k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Write keys and values [T, kv heads, d] into their slots."""
    kv_cache[0, slots], kv_cache[1, slots] = k, v


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Norm into ``out``; a weight of two dimensions has a row for each index of the first."""
    if weight.dim() == 2:
        weight = weight.view(len(weight), *[1] * (x.dim() - 2), -1)
    out.copy_(F.rms_norm(x, x.shape[-1:], None, eps) * weight)


def rotary_embedding(
    positions: Tensor, x: Tensor, key: None, head_size: int, cos_sin_cache: Tensor, neox: bool
) -> None:
    """Turn the heads of ``x`` [T, heads * head_size] in place; halves of a head are pairs."""
    assert neox and key is None
    heads = x.view(len(positions), -1, head_size)
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = heads.chunk(2, dim=-1)
    heads.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
