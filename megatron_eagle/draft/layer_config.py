"""The TransformerConfig of a draft's layers and its rotary angles, from the base's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import RotaryEmbedding
from megatron_eagle.config import EagleConfig
from megatron_eagle.config_checks import LAYER_WIDTHS


def draft_config(base_config: Any, options: EagleConfig) -> Any:
    """The base's TransformerConfig with the draft's depth and widths: the same hidden size, a dense
    ffn, and no experts, query/key norms or biases, which EAGLE-3 readers do not know.

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
    config.num_moe_experts = None
    config.moe_layer_freq = 1
    for name in LAYER_WIDTHS:
        if getattr(options, name) is not None:
            setattr(config, name, getattr(options, name))
    return config


Rotary = Callable[[int], Tensor]
"""RoPE angles of positions 0 .. length - 1 for a length, [length, 1, 1, d]."""


def draft_rotary(
    base_rotary: Rotary, base_args: Mapping[str, Any], options: EagleConfig, device: torch.device
) -> Rotary:
    """The base's angles, or for heads of another size angles of the same frequencies' law.

    Raises ``ValueError`` if the base's law depends on more than Megatron's plain rope flags."""
    if options.kv_channels in (None, base_args["kv_channels"]):
        return base_rotary
    if base_args["position_embedding_type"] != "rope":
        raise ValueError(
            f"--eagle-kv-channels {options.kv_channels}: the base's "
            f"{base_args['position_embedding_type']} positions are defined for its own head size "
            f"of {base_args['kv_channels']} only"
        )
    rope = RotaryEmbedding(
        options.kv_channels,
        base_args["rotary_percent"],
        rotary_base=base_args["rotary_base"],
        rope_scaling=base_args.get("use_rope_scaling", False),
        rope_scaling_factor=base_args.get("rope_scaling_factor", 8.0),
        use_cpu_initialization=device.type == "cpu",
    )
    return lambda length: rope(length, packed_seq=True)  # packed_seq: not cut over CP
