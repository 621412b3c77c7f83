"""What the arguments of a trained HybridModel say beside those that it has in common with a GPT."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_eagle.checkpoint.hybrid_pattern import (
    DELTA_NET,
    EXPERTS,
    MAMBA,
    layer_ends,
    main_pattern,
    pattern_fault,
    symbols,
)
from megatron_eagle.checkpoint.native.values import Args, size
from megatron_eagle.errors import UserError, literal

DELTA_NET_SIZES = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""Sizes of a gated delta net, whose names config.json and Megatron share."""
MAMBA_SIZES = ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups")
UNUSED = ("use_rope_scaling", "rope_scaling_factor", "qk_l2_norm", "moe_layer_freq")
"""Arguments of a GPT that a HybridModel does not look at."""
_OF_EXPERTS = ("num_experts", "moe_", "expert_")
_HEAD_NORMS = ("q_layernorm.", "k_layernorm.", "kv_layernorm.", "_up_proj.layer_norm_")


def as_hybrid(architecture: dict[str, Any], args: Args, source: str) -> dict[str, Any]:
    """Return ``architecture``, that of a GPT with these arguments, as that of a HybridModel.

    Layers that predict further tokens are left out. Raises ``UserError``, starting with ``source``,
    for a pattern that is not supported and for a size that its layers need and the arguments lack.
    """
    pattern = args["hybrid_layer_pattern"]
    wanted = pattern_fault(main_pattern(pattern) if isinstance(pattern, str) else pattern)
    if wanted is not None:
        raise UserError(
            f"{source}: hybrid_layer_pattern {literal(pattern)} is not supported, only {wanted}"
        )
    pattern = main_pattern(pattern)
    layers = symbols(pattern)
    kept = {name: value for name, value in architecture.items() if name not in UNUSED}
    kept |= {"num_layers": len(layer_ends(pattern)), "hybrid_layer_pattern": pattern}
    if EXPERTS in layers:
        size(args, "num_experts", source)
    else:  # whatever the arguments say
        kept = {name: value for name, value in kept.items() if not name.startswith(_OF_EXPERTS)}
    if DELTA_NET in layers:
        kept |= {name: size(args, name, source) for name in DELTA_NET_SIZES}
    if MAMBA in layers:
        kept |= {name: size(args, name, source) for name in MAMBA_SIZES}
        if args.get("mamba_num_heads") is not None:
            kept["mamba_num_heads"] = size(args, "mamba_num_heads", source)
    return kept


def norms_heads(keys: Collection[str]) -> bool:
    """Return whether there are norms of queries and keys: Megatron's own layers of a HybridModel
    have none, whatever the arguments say, and others may."""
    return any(part in key for key in keys for part in _HEAD_NORMS if key.startswith("decoder."))
