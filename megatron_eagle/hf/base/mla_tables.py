"""The name tables of DeepSeek and Kimi: multi-latent attention, the router's bias.

The symbols of the shapes are explained in ``megatron_eagle.hf.tables.entries``.
"""

from __future__ import annotations

from megatron_eagle.hf.tables.entries import Table, one

LOW_RANK, FULL_RANK = {"when": "q_lora_rank"}, {"unless": "q_lora_rank"}
"""Conditions on the queries, which some models project through a low rank and others directly."""

MLA_ATTENTION: Table = {
    "input_layernorm.weight": ("input_layernorm.weight", "H"),
    "self_attention.linear_q_proj.weight": one("self_attn.q_proj.weight", "LQ", "H", **FULL_RANK),
    "self_attention.linear_q_down_proj.weight": one(
        "self_attn.q_a_proj.weight", "QR", "H", **LOW_RANK
    ),
    "self_attention.linear_q_up_proj.layer_norm_weight": one(
        "self_attn.q_a_layernorm.weight", "QR", **LOW_RANK
    ),
    "self_attention.linear_q_up_proj.weight": one(
        "self_attn.q_b_proj.weight", "LQ", "QR", **LOW_RANK
    ),
    "self_attention.linear_kv_down_proj.weight": (
        "self_attn.kv_a_proj_with_mqa.weight",
        "KR+P",
        "H",
    ),
    "self_attention.linear_kv_up_proj.layer_norm_weight": ("self_attn.kv_a_layernorm.weight", "KR"),
    "self_attention.linear_kv_up_proj.weight": ("self_attn.kv_b_proj.weight", "LKV", "KR"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", "H", "LV"),
}
ROUTER_BIAS: Table = {
    "mlp.router.expert_bias": one(
        "mlp.gate.e_score_correction_bias", "E", when="moe_router_enable_expert_bias"
    )
}
