"""Multi-latent attention of a config.json (DeepSeek-V2, -V3, Kimi-K2) as Megatron arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.hf.tables.config_fields import require, size
from megatron_eagle.hf.tables.entries import Dims
from megatron_eagle.hf.tables.rope import described_rope, rope_fields


def mla_args(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Megatron argparse names -> values.

    ``kv_channels`` and ``num_query_groups`` are the draft's, which attends with as many heads of
    the size of a base's head without its rotary channels.
    """
    require(config, {"rope_interleave": True}, source)
    heads = size(config, "num_attention_heads", source)
    if size(config, "num_key_value_heads", source, heads) != heads:
        raise ValueError(
            f"{source}: num_key_value_heads must be num_attention_heads {heads}, "
            f"found {config['num_key_value_heads']}"
        )
    rope = described_rope(config, source)
    yarn = rope["rope_type"] == "yarn"
    if not yarn and rope["rope_type"] != "default":
        raise ValueError(
            f"{source}: rope type {rope['rope_type']!r} is not supported with latent attention"
        )
    low_rank = (
        {}
        if config.get("q_lora_rank") is None
        else {"q_lora_rank": size(config, "q_lora_rank", source)}
    )
    return {
        "multi_latent_attention": True,
        # Without low-rank queries it would ask for a norm of queries, which no model has; the norm
        # of keys and values is then ours to add.
        "qk_layernorm": bool(low_rank),
        "kv_channels": size(config, "qk_nope_head_dim", source),
        **low_rank,
        "kv_lora_rank": size(config, "kv_lora_rank", source),
        "qk_head_dim": size(config, "qk_nope_head_dim", source),
        "qk_pos_emb_head_dim": size(config, "qk_rope_head_dim", source),
        "v_head_dim": size(config, "v_head_dim", source),
        # Ours replaces Megatron's rotary module, which gives its strength too when it is yarn's.
        "rope_type": "yarn",
        "rotary_scaling_factor": rope.get("factor", 1.0),
        "mscale_all_dim": float(rope_fields(config).get("mscale_all_dim") or 0.0) if yarn else 0.0,
    }


def mla_dims(args: Mapping[str, Any]) -> Dims:
    """The name tables' symbols."""
    heads, rotary = args["num_attention_heads"], args["qk_pos_emb_head_dim"]
    return {
        "QR": args.get("q_lora_rank", 0),
        "KR": args["kv_lora_rank"],
        "P": rotary,
        "LQ": heads * (args["qk_head_dim"] + rotary),
        "LKV": heads * (args["qk_head_dim"] + args["v_head_dim"]),
        "LV": heads * args["v_head_dim"],
    }
