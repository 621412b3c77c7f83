"""The TransformerConfig of a draft's layers and its rotary angles, from the base's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.rope import set_frequencies
from megatron_eagle.checkpoint_dir import BaseInfo
from megatron_eagle.compat import RotaryEmbedding
from megatron_eagle.config import EagleConfig
from megatron_eagle.config_checks import LAYER_WIDTHS


def draft_config(base_config: Any, options: EagleConfig) -> Any:
    """The base's TransformerConfig with the draft's depth, widths and experts: the same hidden
    size, SwiGLU, and nothing that EAGLE-3 readers do not know: no query/key norms, biases, windows
    or sinks.

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
    config.multi_latent_attention = False
    for name in LAYER_WIDTHS:
        if getattr(options, name) is not None:
            setattr(config, name, getattr(options, name))
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


Rotary = Callable[[int], Tensor]
"""RoPE angles of positions 0 .. length - 1 for a length, [length, 1, 1, d]."""


def draft_rotary(
    base_rotary: Rotary, base: BaseInfo, options: EagleConfig, device: torch.device
) -> Rotary:
    """The base's angles, or for heads of another size angles of the same frequencies' law. Beside
    multi-latent attention, which rotates a few channels of its own, plain angles of the base's
    rope_theta: servers give a Llama-type draft no other."""
    args = base.megatron_args
    latent = args.get("multi_latent_attention", False)
    if options.kv_channels in (None, args["kv_channels"]) and not latent:
        return base_rotary
    return own_rotary(base, options.kv_channels or args["kv_channels"], device)


def own_rotary(base: BaseInfo, kv_channels: int, device: torch.device) -> Rotary:
    """Angles for heads of ``kv_channels``, by the law of the base's frequencies; see
    :func:`draft_rotary`."""
    args = base.megatron_args
    rope = RotaryEmbedding(
        kv_channels,
        args["rotary_percent"],
        rotary_base=args["rotary_base"],
        rope_scaling=args.get("use_rope_scaling", False),
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        use_cpu_initialization=device.type == "cpu",
    )
    if base.rope and not args.get("multi_latent_attention", False):
        set_frequencies(rope, base.rope)
    return lambda length: rope(length, packed_seq=True)  # packed_seq: not cut over CP
