"""The oracle's multi-latent attention against transformers' DeepSeek-V3 layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.trained_mla import DEEPSEEK_YARN
from tests.reference.layers import ReferenceConfig, query_aligned_mask
from tests.reference.mla import ReferenceMLA

CONFIG = ReferenceConfig(
    hidden_size=8, target_hidden_size=8, intermediate_size=12, num_heads=4, num_kv_heads=4,
    head_dim=6, q_lora_rank=5, kv_lora_rank=7, qk_rope_head_dim=8, v_head_dim=3, vocab_size=11,
    draft_vocab_size=11, rope_theta=100.0, rms_eps=1e-6,
)  # fmt: skip
YARN = {**DEEPSEEK_YARN, "rope_type": "yarn"}


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("low_rank", [5, 0])
def test_causal_attention_is_deepseek_s(yarn: bool, low_rank: int) -> None:
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    scaling = YARN if yarn else None
    config = dataclasses.replace(CONFIG, q_lora_rank=low_rank, rope_scaling=scaling)
    theirs_config = deepseek.DeepseekV3Config(
        hidden_size=8, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=low_rank or None,
        kv_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=3,
        max_position_embeddings=32, attn_implementation="eager",
        rope_parameters={**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs: Any = deepseek.DeepseekV3Attention(theirs_config, layer_idx=0)
    ours = ReferenceMLA(config, 8, query_aligned_mask)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_(1.0 if "layernorm" in name else 0.0, 0.5)
    nn.Module.load_state_dict(theirs, ours.state_dict(), strict=True)
    x = torch.randn(1, 13, 8)
    rotary = deepseek.DeepseekV3RotaryEmbedding(theirs_config)(x, torch.arange(13)[None])
    mask = torch.full((13, 13), float("-inf")).triu(1)[None, None]
    expected, _ = theirs(x, position_embeddings=rotary, attention_mask=mask)
    torch.testing.assert_close(ours(x, []), expected, rtol=1e-4, atol=1e-5)
