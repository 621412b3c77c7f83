"""The TransformerConfig of a draft's layers and its rotary embedding, from the base's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.rope import attention_factor, set_frequencies
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.compat import RotaryEmbedding
from megatron_eagle.config import EagleConfig


def draft_config(base_config: Any, options: EagleConfig) -> Any:
    """The base's TransformerConfig with the draft's depth, widths and experts: the same hidden
    size, SwiGLU, and nothing that EAGLE-3 readers do not know: no norms of grouped queries and keys
    (those of the latents are the layers' own), biases, windows or sinks.

    Of ``recompute_modules`` "core_attn" is done already: the kernels keep no scores for backward,
    and Megatron's own checkpointing cannot carry an attention state."""
    config = copy.copy(base_config)
    if config.recompute_granularity == "selective":
        config.recompute_modules = [m for m in config.recompute_modules if m != "core_attn"]
    config.num_layers = options.num_layers
    config.pipeline_model_parallel_size = 1  # every stage has all of it
    config.qk_layernorm = False
    config.add_qkv_bias = False
    config.add_bias_linear = False
    config.activation_func = torch.nn.functional.silu
    config.activation_func_clamp_value, config.glu_linear_offset = None, 0.0
    config.softmax_type, config.window_size = "vanilla", None
    for name, width in options.layer_widths(vars(base_config)).items():
        setattr(config, name, width)
    config.multi_latent_attention = options.attention == "mla"
    if config.multi_latent_attention:
        config.q_lora_rank = config.q_lora_rank or None
        config.num_query_groups = config.num_attention_heads
        config.apply_rope_fusion = False  # it would ask Megatron's own rotary module
    _set_experts(config, options)
    return config


def _set_experts(config: Any, options: EagleConfig) -> None:
    """The draft's experts and none of the base's options for its own."""
    for field in fields(config):
        if field.name.startswith("moe_"):
            setattr(config, field.name, field.default)
    config.num_moe_experts = None
    config.moe_ffn_hidden_size = config.ffn_hidden_size
    config.moe_token_dispatcher_type = "alltoall"
    for name, value in options.expert_config().items():
        setattr(config, name, value)


ROTARY_WIDTHS = {"gqa": "kv_channels", "mla": "qk_pos_emb_head_dim"}


@dataclass(frozen=True)
class Rotary:
    """RoPE of a draft. ``angles`` gives those of positions 0 .. length - 1 for a length,
    [length, 1, 1, d]; ``factor`` multiplies cos and sin of an MLA draft (grouped queries take it
    from the TransformerConfig)."""

    angles: Callable[[int], Tensor]
    factor: float = 1.0

    def __call__(self, length: int) -> Tensor:
        return self.angles(length)


def draft_rotary(
    base_rotary: Callable[[int], Tensor], base: BaseInfo, options: EagleConfig, device: torch.device
) -> Rotary:
    """The base's angles, or for heads of another size angles of the same frequencies' law: a draft
    turns all channels of its heads, also beside a base that turns a part of its own. A draft of
    grouped queries beside multi-latent attention, which rotates a few channels of its own, has
    plain angles of the base's rope_theta: servers give a Llama-type draft no other."""
    same_kind = (options.attention == "mla") == _has_mla(base)
    if same_kind and rotary_channels(base, options) == _base_channels(base):
        return Rotary(base_rotary, attention_factor(base.rope))
    return own_rotary(base, options, device)


def own_rotary(base: BaseInfo, options: EagleConfig, device: torch.device) -> Rotary:
    """Angles of a module of the draft's own, see :func:`draft_rotary`."""
    args = base.megatron_args
    rope = RotaryEmbedding(
        rotary_channels(base, options),
        1.0,
        rotary_base=args["rotary_base"],
        rope_scaling=args.get("use_rope_scaling", False),
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        use_cpu_initialization=device.type == "cpu",
    )
    if base.rope and (options.attention == "mla") == _has_mla(base):
        set_frequencies(rope, base.rope)
    # packed_seq: not cut over CP.
    return Rotary(lambda length: rope(length, packed_seq=True), attention_factor(base.rope))


def rotary_channels(base: BaseInfo, options: EagleConfig) -> int:
    """The channels of a draft's head that positions turn."""
    name = ROTARY_WIDTHS[options.attention]
    return getattr(options, name) or base.megatron_args[name]


def _base_channels(base: BaseInfo) -> int:
    width = base.megatron_args[ROTARY_WIDTHS["mla" if _has_mla(base) else "gqa"]]
    return int(width * base.megatron_args["rotary_percent"])


def _has_mla(base: BaseInfo) -> bool:
    return bool(base.megatron_args.get("multi_latent_attention"))
