"""Checkpoint metadata of the reference's drafts."""

from __future__ import annotations

from typing import Any

from tests.helpers.trained_draft import Shape, metadata_json
from tests.reference.eagle3 import ReferenceConfig


def _mla_of(config: ReferenceConfig) -> dict[str, int]:
    if not config.kv_lora_rank:
        return {}
    return {
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
    }


def metadata_of(config: ReferenceConfig) -> dict[str, Any]:
    """Return the checkpoint metadata of a draft of the reference's ``config``."""
    shape = Shape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        groups=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        draft_vocab=config.draft_vocab_size,
        rope={"rope_theta": config.rope_theta},
        mla=_mla_of(config),
        algorithm="eagle1" if config.eagle1 else "eagle3.1" if config.fc_norm else "eagle3",
        norm_before_fc=config.norm_before_fc,
        norm_before_residual=config.norm_before_residual,
    )
    content = metadata_json(shape)
    content["base"]["megatron_args"]["rotary_base"] = int(config.rope_theta)
    return content
