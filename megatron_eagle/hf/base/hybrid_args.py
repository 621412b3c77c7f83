"""Layers of which some have attention and others a gated delta net, as a Megatron HybridModel.

Each layer of the Hugging Face model is two symbols of the pattern: what mixes its positions, and
its MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_eagle.checkpoint.hybrid_pattern import ATTENTION, DELTA_NET, DENSE, EXPERTS
from megatron_eagle.checkpoint.native.hybrid import DELTA_NET_SIZES
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.base.moe_args import moe_layers
from megatron_eagle.hf.tables.config_fields import require, size
from megatron_eagle.hf.tables.entries import Dims

QWEN3_NEXT_LAYERS = {"swiglu": True, "apply_layernorm_1p": True, "attention_output_gate": True}
"""Megatron arguments of every Qwen3-Next and Qwen3.5."""
QWEN3_5_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
"""Defaults of Qwen3.5's configuration class for text."""
_QWEN3_5_ALWAYS = {"attn_output_gate": True, "mtp_use_dedicated_embeddings": False}
QWEN3_NEXT_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
"""Defaults of Qwen3-Next's configuration class."""
_KINDS = {"full_attention": ATTENTION, "linear_attention": DELTA_NET}


def qwen3_next(config: Mapping[str, Any], source: str) -> list[str]:
    """Return the symbol of what mixes the positions in each layer, by ``layer_types`` or, without
    them, ``full_attention_interval``.

    Raises UserError, naming ``source``, for other kinds of layers.
    """
    if config.get("output_gate_type") not in (None, "silu", "swish"):
        gate = literal(repr(config["output_gate_type"]))
        raise UserError(f"{source}: output_gate_type {gate} is not supported, only 'silu'")
    layers = size(config, "num_hidden_layers", source)
    kinds = config.get("layer_types")
    if kinds is None:
        interval = size(config, "full_attention_interval", source, 4)
        return [DELTA_NET if (i + 1) % interval else ATTENTION for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(f"{source}: layer_types must name a kind for each of {layers} layers")
    if unknown := [kind for kind in kinds if kind not in tuple(_KINDS)]:
        raise UserError(f"{source}: layer_types {literal(repr(unknown[0]))} is not supported")
    return [_KINDS[kind] for kind in kinds]


def qwen3_5(config: Mapping[str, Any], source: str) -> list[str]:
    """Return what mixes the positions in each layer, as :func:`qwen3_next`."""
    require(config, _QWEN3_5_ALWAYS, source)
    return qwen3_next(config, source)


def as_hybrid(
    args: Mapping[str, Any], mixers: Sequence[str], config: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Return the Megatron arguments ``args`` of a GPTModel as those of a HybridModel whose layers
    mix positions by ``mixers``.

    Raises UserError, naming ``source``, for sizes that do not go together and for a rope that
    Megatron's HybridModel leaves out.
    """
    if args.get("use_rope_scaling"):
        raise UserError(f"{source}: rope of type llama3 is not supported beside gated delta nets")
    sizes = {name: size(config, name, source) for name in DELTA_NET_SIZES}
    keys, values = sizes["linear_num_key_heads"], sizes["linear_num_value_heads"]
    if values % keys:
        raise UserError(
            f"{source}: linear_num_value_heads {values} is not a multiple of "
            f"linear_num_key_heads {keys}"
        )
    pairs = zip(mixers, moe_layers(args), strict=True)
    pattern = "".join(mixer + (EXPERTS if moe else DENSE) for mixer, moe in pairs)
    # The pattern says which layers have experts.
    kept = {name: value for name, value in args.items() if name != "moe_layer_freq"}
    return {**kept, "hybrid_layer_pattern": pattern, **sizes}


def delta_net_dims(args: Mapping[str, Any]) -> Dims:
    """Return the symbols of a gated delta net's shapes (see ``entries``), and ``key_heads``."""
    heads, size_of_value = args["linear_num_value_heads"], args["linear_value_head_dim"]
    return {
        "NV": heads,
        "VD": size_of_value,
        "DK": args["linear_num_key_heads"] * args["linear_key_head_dim"],
        "DV": heads * size_of_value,
        "C": args["linear_conv_kernel_dim"],
        "key_heads": args["linear_num_key_heads"],
    }
