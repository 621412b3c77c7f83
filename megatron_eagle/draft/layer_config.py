"""The TransformerConfig of a draft's layers and its RoPE, derived from the base's.

d: RoPE channels of a head.
"""

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
from megatron_eagle.config import DraftSpec
from megatron_eagle.config.widths import expert_config, layer_widths

_PLAIN: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "glu_linear_offset": 0.0,
    "heterogeneous_block_specs": False,
    "is_hybrid_model": False,
    "layernorm_zero_centered_gamma": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "qk_l2_norm": False,
    "rotary_interleaved": False,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
    "window_size": None,
}
"""What a base's layers may have and a draft's do not."""

_OF_MODULES = ("attention_output_gate", "layernorm_zero_centered_gamma")
"""What of these the layer of a base's own next-token module has as the base's layers do."""

_FROZEN_ROUTING: dict[str, Any] = {
    "moe_aux_loss_coeff": 0.0,
    "moe_grouped_gemm": False,
    "moe_input_jitter_eps": None,
    "moe_router_load_balancing_type": "none",
    "moe_shared_expert_overlap": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_z_loss_coeff": None,
}
"""Options of a next-token module's experts, whose routers are frozen, beside the base's."""


def draft_config(base_config: Any, spec: DraftSpec, moe_aux_loss_coeff: float = 0.0) -> Any:
    """Return the base's TransformerConfig with the draft's depth, widths and experts.

    The hidden size is the base's; norms are RMSNorm, the MLP is SwiGLU, and there is nothing that
    EAGLE-3 readers do not know (``_PLAIN``): no biases, windows or sinks, and query and key norms
    only as the spec says. The layer of a next-token module keeps the base's biases, gates, norms
    and routing.
    "core_attn" of ``recompute_modules`` is dropped: the kernels keep no scores for backward, and
    Megatron's own checkpointing cannot carry an attention state.
    """
    config = copy.copy(base_config)
    if config.recompute_granularity == "selective":
        config.recompute_modules = [m for m in config.recompute_modules if m != "core_attn"]
    config.num_layers = spec.num_layers
    config.pipeline_model_parallel_size = 1  # every stage has all of it
    # Transformer Engine would let the first pass of a micro-batch overwrite a gradient that is
    # accumulated elsewhere; a draft runs K passes, and the first one's backward comes last.
    config.disable_parameter_transpose_cache = True
    config.qk_layernorm = spec.norms_heads
    if spec.method.drafts_blocks:
        # linear_qkv's weight is used twice, and a fused gradient would hide the second use's.
        config.gradient_accumulation_fusion = False
    config.add_qkv_bias = spec.method.is_base_module and base_config.add_qkv_bias
    config.add_bias_linear = False
    if config.activation_func is not torch.nn.functional.silu:
        config.bias_activation_fusion = False  # it was chosen for the base's activation
    config.activation_func = torch.nn.functional.silu
    config.gated_linear_unit = True
    for name, value in _PLAIN.items():
        if not (spec.method.is_base_module and name in _OF_MODULES):
            setattr(config, name, value)
    for name, width in layer_widths(spec, vars(base_config)).items():
        setattr(config, name, width)
    config.multi_latent_attention = spec.uses_mla
    if config.multi_latent_attention:
        config.q_lora_rank = config.q_lora_rank or None
        config.num_query_groups = config.num_attention_heads
        config.apply_rope_fusion = False  # it would ask Megatron's own rotary module
    _set_experts(config, spec, moe_aux_loss_coeff)
    return config


def _set_experts(config: Any, spec: DraftSpec, moe_aux_loss_coeff: float) -> None:
    """Set the draft's experts, and reset every option of the base's experts, unless the draft's are
    of the base's kind."""
    if spec.method.is_base_module:
        config.num_moe_experts, config.moe_layer_freq = spec.num_experts, 1
        for name, value in _FROZEN_ROUTING.items():
            setattr(config, name, value)
        return
    for field in fields(config):
        if field.name.startswith("moe_"):
            setattr(config, field.name, field.default)
    config.num_moe_experts = None
    config.moe_ffn_hidden_size = config.ffn_hidden_size
    config.moe_token_dispatcher_type = "alltoall"
    if spec.num_experts is not None:
        config.moe_aux_loss_coeff = moe_aux_loss_coeff
    for name, value in expert_config(spec).items():
        setattr(config, name, value)


ROTARY_WIDTHS = {"gqa": "kv_channels", "mla": "qk_pos_emb_head_dim"}


@dataclass(frozen=True)
class Rotary:
    """RoPE of a draft.

    ``angles(length)`` returns the angles of positions 0 .. length - 1, [length, 1, 1, d];
    ``factor`` multiplies cos and sin of an MLA draft (grouped queries take it from the
    TransformerConfig).
    """

    angles: Callable[[int], Tensor]
    factor: float = 1.0

    def __call__(self, length: int) -> Tensor:
        return self.angles(length)


def draft_rotary(
    base_rotary: Callable[[int], Tensor], base: BaseInfo, spec: DraftSpec, device: torch.device
) -> Rotary:
    """Return the base's RoPE, or for another head size RoPE with the same base and scaling over the
    whole head.

    A draft rotates all channels of its heads, also beside a base that rotates a part of its own. A
    draft of grouped queries beside a base of multi-latent attention has plain RoPE of the base's
    rope_theta: servers give a Llama-type draft no other. So has a draft beside a base without RoPE,
    and no draft interleaves its channels. A next-token module of the base's has the base's RoPE.
    """
    if spec.method.is_base_module:
        return Rotary(base_rotary, attention_factor(base.rope))
    same_kind = spec.uses_mla == _has_mla(base) and _rotates_halves(base)
    if same_kind and rotary_channels(base, spec) == _base_channels(base):
        return Rotary(base_rotary, attention_factor(base.rope))
    return own_rotary(base, spec, device)


def own_rotary(base: BaseInfo, spec: DraftSpec, device: torch.device) -> Rotary:
    """Return RoPE from a module of the draft's own, see :func:`draft_rotary`."""
    args = base.megatron_args
    rope = RotaryEmbedding(
        rotary_channels(base, spec),
        1.0,
        rotary_base=args["rotary_base"],
        rope_scaling=args.get("use_rope_scaling", False),
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        use_cpu_initialization=device.type == "cpu",
    )
    if base.rope and spec.uses_mla == _has_mla(base):
        set_frequencies(rope, base.rope)
    # packed_seq: not cut over CP.
    return Rotary(lambda length: rope(length, packed_seq=True), attention_factor(base.rope))


def rotary_channels(base: BaseInfo, spec: DraftSpec) -> int:
    """Return the number of channels of a draft's head that RoPE rotates."""
    name = ROTARY_WIDTHS[spec.attention]
    return getattr(spec, name) or base.megatron_args[name]


def _base_channels(base: BaseInfo) -> int:
    width = base.megatron_args[ROTARY_WIDTHS["mla" if _has_mla(base) else "gqa"]]
    return int(width * base.megatron_args["rotary_percent"])


def _rotates_halves(base: BaseInfo) -> bool:
    """Return whether the base's angles are laid out as a draft's are."""
    args = base.megatron_args
    interleaved = args.get("rotary_interleaved") and not _has_mla(base)
    return args.get("position_embedding_type", "rope") == "rope" and not interleaved


def _has_mla(base: BaseInfo) -> bool:
    return bool(base.megatron_args.get("multi_latent_attention"))
