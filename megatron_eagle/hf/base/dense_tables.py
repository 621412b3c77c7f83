"""The name tables that most families share: attention with grouped queries and a gated MLP.

The symbols of the shapes are explained in ``megatron_eagle.hf.tables.entries``.
"""

from __future__ import annotations

from megatron_eagle.hf.tables.entries import Table, one, qkv, rows

LAYER_PREFIX = "model.layers.{}."
MODEL: Table = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight", "V", "H"),
    "decoder.final_layernorm.weight": ("model.norm.weight", "H"),
    "output_layer.weight": one("lm_head.weight", "V", "H", when="untied"),
}
HYBRID_MODEL: Table = {
    "decoder.final_norm.weight" if name == "decoder.final_layernorm.weight" else name: row
    for name, row in MODEL.items()
}
ATTENTION: Table = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", "H"),
    "self_attention.linear_qkv.weight": qkv("weight", "H"),
    "self_attention.linear_qkv.bias": qkv("bias", when="any_qkv_bias", zeros_unless="qkv_bias"),
    "self_attention.q_layernorm.weight": one("self_attn.q_norm.weight", "HD", when="qk_layernorm"),
    "self_attention.k_layernorm.weight": one("self_attn.k_norm.weight", "HD", when="qk_layernorm"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", "H", "Q"),
    "self_attention.linear_proj.bias": one(
        "self_attn.o_proj.bias", "H", when="add_bias_linear", zeros_unless="output_bias"
    ),
}
MLP_BIAS = {"when": "add_bias_linear", "zeros_unless": "mlp_bias"}
DENSE: Table = {
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight", "H"),
    "mlp.linear_fc1.weight": rows({"mlp.gate_proj.weight": "F", "mlp.up_proj.weight": "F"}, "H"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", "H", "F"),
    "mlp.linear_fc1.bias": rows({"mlp.gate_proj.bias": "F", "mlp.up_proj.bias": "F"}, **MLP_BIAS),
    "mlp.linear_fc2.bias": one("mlp.down_proj.bias", "H", **MLP_BIAS),
}
