"""Describe a model in memory: for the draft's checkpoint, and as the draft's TransformerConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_eagle.attached.model_kinds import (
    layers_of_model,
    pattern_of_model,
    rotary_base,
    rotary_percent,
)
from megatron_eagle.attention.rope import inverse_frequencies
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.native.describe import FAMILY, HYBRID_FAMILY
from megatron_eagle.compat import TransformerConfig
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.base.rope_args import rope_args, rope_beyond_args
from megatron_eagle.hf.draft.base_config import SIZES
from megatron_eagle.hf.tables.rope import complete_rope

_SOURCE = "<hf_config>"
_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
)
_EXPERT_LAYOUT = ("expert_model_parallel_size", "expert_tensor_parallel_size")
_INHERITED = (
    *_SIZES,
    "layernorm_epsilon",
    "init_method_std",
    "tensor_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "use_cpu_initialization",
    "gradient_accumulation_fusion",
    "deterministic_mode",
)
"""Fields of the model's TransformerConfig that its draft has too; all others are the defaults."""


def describe_model(
    gpt: Any, vocab_size: int, name: str, hf_config: Mapping[str, Any] | None
) -> BaseInfo:
    """Return the description that the draft's checkpoint holds of ``gpt``.

    Args:
        gpt: the GPTModel or HybridModel.
        vocab_size: without padding.
        name: what the model card calls the base.
        hf_config: the model's config.json, if it has one; the only source of scaled RoPE.

    Raises ``UserError`` if ``hf_config`` contradicts the model.
    """
    config = gpt.config
    theta, pattern = rotary_base(gpt), pattern_of_model(gpt)
    length = gpt.max_sequence_length
    fields = dict(hf_config or {"rope_theta": theta, "max_position_embeddings": length})
    fields.setdefault("max_position_embeddings", length)
    args = {
        **{size: getattr(config, size) for size in _SIZES},
        "num_layers": layers_of_model(gpt),
        **({} if pattern is None else {"hybrid_layer_pattern": pattern}),
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "max_position_embeddings": length,
        "normalization": config.normalization,
        "norm_epsilon": config.layernorm_epsilon,
        "position_embedding_type": gpt.position_embedding_type,
        **rope_args(fields, partial=True, source=_SOURCE),
        "rotary_percent": rotary_percent(gpt),
        "untie_embeddings_and_output_weights": not gpt.share_embeddings_and_output_weights,
        "multi_latent_attention": config.multi_latent_attention,
        "vocab_size": vocab_size,
    }
    for key, argument in SIZES.items():
        if fields.get(key, args[argument]) != args[argument]:
            raise UserError(
                f"{_SOURCE}: {key} is {literal(fields[key])}, <model> has {args[argument]}"
            )
    _check_rope(gpt, fields, theta)
    return BaseInfo(
        family=FAMILY if pattern is None else HYBRID_FAMILY,
        name=name,
        fingerprint="",  # weights that are being trained have none
        vocab_size=vocab_size,
        hf_config=fields,
        megatron_args=args,
        rope=rope_beyond_args(fields, _SOURCE),
        source="a model in memory, beside which the draft was trained",
    )


def draft_base_config(config: Any, dtype: torch.dtype) -> Any:
    """Return the TransformerConfig from which a draft of ``dtype`` is made beside a model of
    ``config``.

    It takes sizes and layout of ``config`` and nothing else: the model's experts, norms,
    recomputation, dropout and callbacks are its own. Losses are sums over tokens.
    """
    draft = TransformerConfig(
        **{name: getattr(config, name) for name in _INHERITED},
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    for name in _EXPERT_LAYOUT:  # the constructor wants experts with them
        setattr(draft, name, getattr(config, name))
    return draft


def _check_rope(gpt: Any, fields: Mapping[str, Any], theta: float) -> None:
    """Raise ``UserError`` unless the model turns its queries as ``fields`` say."""
    rope = complete_rope(fields, _SOURCE)
    if gpt.position_embedding_type == "rope" and rope["rope_theta"] != theta:
        raise UserError(f"{_SOURCE}: rope_theta is {rope['rope_theta']:g}, <model> has {theta:g}")
    module = getattr(gpt, "rotary_pos_emb", None)
    if module is None:
        return
    expected = inverse_frequencies(rope, 2 * module.inv_freq.numel()).to(module.inv_freq)
    scaled = module.seq_len_interpolation_factor is not None
    if scaled or not torch.allclose(module.inv_freq, expected, rtol=1e-5):
        raise UserError(
            f"{_SOURCE}: <model> has other rotary frequencies than {rope['rope_type']} RoPE of "
            f"base {theta:g}; a config.json with its rope_scaling says which"
        )
