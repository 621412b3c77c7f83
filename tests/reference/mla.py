"""The oracle's multi-latent attention, and yarn, as DeepSeek's papers and model files have them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def yarn_strength(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_factor(scaling: dict[str, Any] | None) -> float:
    """What cos and sin are multiplied by."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if over and under:
        return yarn_strength(scaling["factor"], over) / yarn_strength(scaling["factor"], under)
    return yarn_strength(scaling["factor"], 1.0)


def yarn_frequencies(frequency: Tensor, scaling: dict[str, Any], theta: float) -> Tensor:
    """Channels that turn often over the original context keep their frequency, those that hardly
    turn are slowed down by the factor, with a ramp between."""
    pairs, length = len(frequency), scaling["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        return pairs * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(channel(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(channel(scaling.get("beta_slow", 1))), 2 * pairs - 1)
    ramp = ((torch.arange(pairs) - low) / max(high - low, 0.001)).clamp(0, 1).to(frequency)
    return frequency * (1 - ramp) + frequency / scaling["factor"] * ramp


def rotate_pairs(x: Tensor, positions: Tensor, config: Any) -> Tensor:
    """x [B, heads, S, d], positions [S]: channels 2i and 2i + 1 are a pair."""
    pairs = x.shape[-1] // 2
    frequency = config.rope_theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    if config.rope_scaling is not None:
        frequency = yarn_frequencies(frequency, config.rope_scaling, config.rope_theta)
    angle = positions.double()[:, None] * frequency
    factor = yarn_factor(config.rope_scaling)
    cos, sin = (factor * angle.cos()).to(x.dtype), (factor * angle.sin()).to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class ReferenceMLA(nn.Module):
    """Keys and values from a latent that all heads share, besides one rotary key for all of them.
    `config.head_dim` is a head's part without position."""

    def __init__(self, config: Any, input_size: int, mask: Any) -> None:
        super().__init__()
        self.config, self.mask = config, mask
        heads, rotary = config.num_heads, config.qk_rope_head_dim
        queries = heads * (config.head_dim + rotary)
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(input_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=config.rms_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        else:
            self.q_proj = nn.Linear(input_size, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(input_size, config.kv_lora_rank + rotary, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=config.rms_eps)
        keys_values = heads * (config.head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, keys_values, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def scale(self) -> float:
        config, scaling = self.config, self.config.rope_scaling
        scale = (config.head_dim + config.qk_rope_head_dim) ** -0.5
        if scaling is None or not scaling.get("mscale_all_dim"):
            return scale
        return scale * yarn_strength(scaling["factor"], scaling["mscale_all_dim"]) ** 2

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """x [B, S, input] of step len(past); appends this step's keys and values to `past`."""
        config, length, step = self.config, x.shape[1], len(past)
        positions, rotary = torch.arange(length) + step, config.qk_rope_head_dim
        low_rank = bool(config.q_lora_rank)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if low_rank else self.q_proj(x)
        plain, turned = self.heads(q).split([config.head_dim, rotary], dim=-1)
        q = torch.cat([plain, rotate_pairs(turned, positions, config)], dim=-1)
        mla, shared = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, rotary], dim=-1)
        both = self.heads(self.kv_b_proj(self.kv_a_layernorm(mla)))
        plain, value = both.split([config.head_dim, config.v_head_dim], dim=-1)
        shared = rotate_pairs(shared.unsqueeze(1), positions, config)
        key = torch.cat([plain, shared.expand(-1, config.num_heads, -1, -1)], dim=-1)
        past.append((key, value))
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*past, strict=True))
        scores = (q @ keys.transpose(-1, -2)) * self.scale()
        scores = scores.masked_fill(~self.mask(length, step), float("-inf"))
        out = torch.softmax(scores, dim=-1) @ values
        return self.o_proj(out.transpose(1, 2).flatten(2))
