"""DeepSeek's and Kimi's name tables: multi-latent attention, shared experts."""

from __future__ import annotations

from megatron_eagle.hf.tables.entries import one, rows

MLA_ATTENTION = (
    one("input_layernorm.weight", "input_layernorm.weight", "H"),
    one(
        "self_attention.linear_q_proj.weight",
        "self_attn.q_proj.weight",
        "LQ",
        "H",
        when="no q_lora_rank",
    ),
    one(
        "self_attention.linear_q_down_proj.weight",
        "self_attn.q_a_proj.weight",
        "QR",
        "H",
        when="q_lora_rank",
    ),
    one(
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attn.q_a_layernorm.weight",
        "QR",
        when="q_lora_rank",
    ),
    one(
        "self_attention.linear_q_up_proj.weight",
        "self_attn.q_b_proj.weight",
        "LQ",
        "QR",
        when="q_lora_rank",
    ),
    rows(
        "self_attention.linear_kv_down_proj.weight",
        [("self_attn.kv_a_proj_with_mqa.weight", "KR+P")],
        "H",
    ),
    one(
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attn.kv_a_layernorm.weight",
        "KR",
    ),
    one("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", "LKV", "KR"),
    one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H", "LV"),
)
SHARED_EXPERTS = (
    rows(
        "mlp.shared_experts.linear_fc1.weight",
        [
            ("mlp.shared_experts.gate_proj.weight", "S"),
            ("mlp.shared_experts.up_proj.weight", "S"),
        ],
        "H",
        when="moe_shared_expert_intermediate_size",
    ),
    one(
        "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_experts.down_proj.weight",
        "H",
        "S",
        when="moe_shared_expert_intermediate_size",
    ),
)
ROUTER_BIAS = one(
    "mlp.router.expert_bias",
    "mlp.gate.e_score_correction_bias",
    "E",
    when="moe_router_enable_expert_bias",
)
