"""Multi-latent attention of an exported draft, as DeepSeek's formats define it: plain PyTorch.

Part of ``plain_draft``. RoPE is transformers' own, and the rope fields are deliberately read
without ``hf/tables/rope.py``: the verification must not share a mistake with the export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm


class PlainMLA:
    """Queries, keys and values of a draft whose config.json is ``config``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.heads = config["num_attention_heads"]
        self.plain, self.turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        self.rope = _rotary(config)
        self.scale = _attention_factor(config) ** 2 * (self.plain + self.turned) ** -0.5

    def __call__(
        self, weight: Callable[[str], Tensor], x: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [S, N] at ``positions`` [S] -> q, k [S, n, d] and v [S, n, dv]; ``weight`` gives the
        tensor of a module."""
        config = self.config
        if config["q_lora_rank"]:
            low_rank = self._norm(weight("q_a_layernorm"), linear(x, weight("q_a_proj")))
            q = linear(low_rank, weight("q_b_proj"))
        else:
            q = linear(x, weight("q_proj"))
        rank, size = config["kv_lora_rank"], config["v_head_dim"]
        mla, shared = linear(x, weight("kv_a_proj_with_mqa")).split([rank, self.turned], -1)
        both = linear(self._norm(weight("kv_a_layernorm"), mla), weight("kv_b_proj"))
        k, v = both.unflatten(-1, (self.heads, -1)).split([self.plain, size], -1)
        q, q_turned = q.unflatten(-1, (self.heads, -1)).split([self.plain, self.turned], -1)
        cos, sin = (part[0, :, : self.turned // 2] for part in self.rope(x[None], positions[None]))
        shared = _rotate_pairs(shared.unsqueeze(1), cos, sin).expand(-1, self.heads, -1)
        return torch.cat([q, _rotate_pairs(q_turned, cos, sin)], -1), torch.cat([k, shared], -1), v

    def _norm(self, weight: Tensor, x: Tensor) -> Tensor:
        return rms_norm(x, (weight.numel(),), weight, self.config["rms_norm_eps"])


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [S, n, d] by [S, d / 2]: channels 2i and 2i + 1 are a pair."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def _attention_factor(config: Mapping[str, Any]) -> float:
    """Return yarn's factor on queries and keys (1.0 for plain rope)."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_get_mscale

    scaling = config.get("rope_scaling") or {}  # which an export has beside rope_parameters
    return yarn_get_mscale(scaling.get("factor", 1.0), scaling.get("mscale_all_dim") or 0.0)


def _rotary(config: Mapping[str, Any]) -> Any:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    fields = {name: value for name, value in config.items() if name != "model_type"}
    return DeepseekV3RotaryEmbedding(DeepseekV3Config(**fields))
