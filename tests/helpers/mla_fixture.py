"""What tests/helpers/draft_fixture.py needs for drafts with multi-latent attention."""

from __future__ import annotations

from typing import Any

from tests.reference.layers import ReferenceConfig


def mla_sizes(reference: ReferenceConfig) -> dict[str, Any]:
    """The TransformerConfig's fields of multi-latent attention, as importing a base sets them."""
    if not reference.kv_lora_rank:
        return {}
    scaling = reference.rope_scaling or {}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": reference.q_lora_rank or None,
        "kv_lora_rank": reference.kv_lora_rank,
        "qk_head_dim": reference.head_dim,
        "qk_pos_emb_head_dim": reference.qk_rope_head_dim,
        "v_head_dim": reference.v_head_dim,
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.get("factor", 1.0),
        "mscale_all_dim": scaling.get("mscale_all_dim", 0.0),
        "apply_rope_fusion": False,
    }


def mla_names(ours: str, theirs: str, low_rank: bool) -> dict[str, tuple[list[str], str]]:
    """The parameters of multi-latent attention."""
    pairs = {
        "linear_kv_down_proj": ("kv_a_proj_with_mqa", "whole"),
        "kv_layernorm": ("kv_a_layernorm", "whole"),
        "linear_kv_up_proj": ("kv_b_proj", "rows"),
    }
    if low_rank:
        pairs |= {
            "linear_q_down_proj": ("q_a_proj", "whole"),
            "q_layernorm": ("q_a_layernorm", "whole"),
            "linear_q_up_proj": ("q_b_proj", "rows"),
        }
    else:
        pairs["linear_q_proj"] = ("q_proj", "rows")
    return {
        f"{ours}{name}.weight": ([f"{theirs}{its}.weight"], kind)
        for name, (its, kind) in pairs.items()
    }
