"""Multi-latent attention in plain PyTorch that stands for the servers' kernels, as stand_in_layers.

Positions turn pairs of neighbouring channels; the frequencies are transformers' own, from the
arguments that the server gives its rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from tests.readers import stand_in_layers as layers


def get_rope(head_size: int, **fields: Any) -> Callable[..., Any]:
    """Rotates q [T, n, head_size] and k [T, 1, head_size]."""
    rope = {**fields["rope_parameters"]}
    if rope["rope_type"].startswith("deepseek_"):
        assert rope["rope_type"] == "deepseek_yarn"
        rope["rope_type"] = "yarn"
    config = DeepseekV3Config(
        qk_rope_head_dim=head_size,
        max_position_embeddings=fields["max_position"],
        rope_parameters=rope,
    )
    embedding = DeepseekV3RotaryEmbedding(config)
    assert not fields["is_neox_style"]

    def rotate(positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (x[0, :, None, : head_size // 2] for x in embedding(q, positions.unsqueeze(0)))
        return _turned(q, cos, sin), _turned(k, cos, sin)

    return rotate


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class MLAAttention(nn.Module):
    """vLLM's: queries [T, n, d], the normed latent [T, rank] and the turned key [T, 1, r]."""

    def __init__(
        self, num_heads: int, scale: float, qk_nope_head_dim: int, v_head_dim: int,
        kv_b_proj: Any, **rest: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.sizes = num_heads, [qk_nope_head_dim, v_head_dim]
        self.up = kv_b_proj
        size = qk_nope_head_dim + rest["qk_rope_head_dim"]
        self.attention = layers.Attention(num_heads, size, scale, num_heads)

    def forward(self, q: Tensor, mla: Tensor, key: Tensor, **rest: Any) -> Tensor:
        both = self.up(mla)[0].unflatten(-1, (self.heads, -1))
        plain, value = both.split(self.sizes, dim=-1)
        keys = torch.cat([plain, key.expand(-1, self.heads, -1)], dim=-1)
        padded = nn.functional.pad(value, (0, keys.shape[-1] - value.shape[-1]))
        out = self.attention(*(x.flatten(1) for x in (q, keys, padded)))
        return out.unflatten(-1, (self.heads, -1))[..., : value.shape[-1]].flatten(1)


class DeepseekV2MLP(nn.Module):
    """SGLang's dense MLP."""

    def __init__(self, *, hidden_size: int, intermediate_size: int, **rest: Any) -> None:
        super().__init__()
        self.gate_up_proj = layers.MergedColumnParallelLinear(hidden_size, [intermediate_size] * 2)
        self.down_proj = layers.Linear(intermediate_size, hidden_size)
        self.act_fn = layers.SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class DeepseekV2AttentionMLA(nn.Module):
    """SGLang's whole attention module, which is made of kernels."""

    def __init__(self, *, config: Any, hidden_size: int, layer_id: int, **fields: Any) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in fields.items() if k.endswith(("_dim", "_rank"))})
        heads, rank = fields["num_heads"], fields["kv_lora_rank"]
        size = self.qk_nope_head_dim + self.qk_rope_head_dim
        eps = config.rms_norm_eps
        self.q_a_layernorm = layers.RMSNorm(self.q_lora_rank, eps)
        self.q_b_proj = layers.Linear(self.q_lora_rank, heads * size)
        self.kv_a_layernorm = layers.RMSNorm(rank, eps)
        self.kv_b_proj = layers.Linear(rank, heads * (self.qk_nope_head_dim + self.v_head_dim))
        self.o_proj = layers.Linear(heads * self.v_head_dim, hidden_size)
        rope = fields["rope_scaling"] or {"rope_type": "default"}
        strength = 1.0
        if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
            strength = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
        self.rotate = get_rope(
            self.qk_rope_head_dim,
            rope_parameters={**rope, "rope_theta": fields["rope_theta"]},
            max_position=fields["max_position_embeddings"],
            is_neox_style=False,
        )
        self.attention = MLAAttention(
            heads, size**-0.5 * strength**2, self.qk_nope_head_dim, self.v_head_dim,
            self.kv_b_proj, qk_rope_head_dim=self.qk_rope_head_dim,
        )  # fmt: skip

    def prepare_qkv_latent(self, *given: Any) -> None:
        raise AssertionError("the stand-in reads the inputs itself")

    def forward(self, *, positions: Tensor, hidden_states: Tensor, **rest: Any) -> Tensor:
        rank, turned = self.kv_lora_rank, self.qk_rope_head_dim
        down = self.fused_qkv_a_proj_with_mqa(hidden_states)[0]
        q, mla, key = down.split([self.q_lora_rank, rank, turned], dim=-1)
        q = self.q_b_proj(self.q_a_layernorm(q))[0]
        q = q.unflatten(-1, (-1, self.qk_nope_head_dim + turned))
        plain, q_turned = q.split([self.qk_nope_head_dim, turned], dim=-1)
        q_turned, key = self.rotate(positions, q_turned, key.unsqueeze(1))
        q = torch.cat([plain, q_turned], dim=-1)
        return self.o_proj(self.attention(q, self.kv_a_layernorm(mla), key))[0]
