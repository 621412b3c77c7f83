"""Specify the base's layers from Megatron-Core's own modules: dense or MoE, our core attention.

Checkpoint keys are the same as with Transformer Engine's layers. Transformer Engine fuses a norm
into the linear layer after it, so the norm's key starts with that layer's name.
"""

from __future__ import annotations

from typing import Any

from megatron_eagle.attention.core import with_eagle_attention
from megatron_eagle.compat import get_gpt_decoder_block_spec
from megatron_eagle.layers.group_router import GroupLimitedRouter
from megatron_eagle.layers.zero_centered_norm import ZeroCenteredNorm, use_zero_centered_norms

NORM_BEFORE_QKV = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
MLA_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
NORM_BEFORE_FC1 = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def local_base_spec(config: Any, pp_rank: int, native: bool = False) -> Any:
    """Return the TransformerBlockSubmodules of the layers of pipeline stage ``pp_rank``.

    ``native``: Megatron trained the base, so experts are routed as Megatron routes them.
    """
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        pp_rank=pp_rank,
    )
    # Equal layers share one spec object: change each object once.
    for spec in {id(spec): spec for spec in block.layer_specs}.values():
        with_eagle_attention(spec)
        spec.submodules.sharded_state_dict_keys_map = checkpoint_names(config, spec)
        if config.layernorm_zero_centered_gamma:
            use_zero_centered_norms(spec.submodules)
        if config.moe_router_num_groups is not None and _is_moe(spec) and not native:
            spec.submodules.mlp.keywords["submodules"].router = GroupLimitedRouter
    if config.layernorm_zero_centered_gamma:
        block.layer_norm = ZeroCenteredNorm
    return block


def checkpoint_names(config: Any, layer_spec: Any) -> dict[str, str]:
    """Map prefixes of a local layer's parameters to prefixes in a checkpoint, where they differ."""
    return {
        **(MLA_NORMS if config.multi_latent_attention else NORM_BEFORE_QKV),
        **({} if _is_moe(layer_spec) else NORM_BEFORE_FC1),
    }


def _is_moe(layer_spec: Any) -> bool:
    """Return whether a layer has experts; both kinds of MLP are partials with ``submodules``."""
    return hasattr(layer_spec.submodules.mlp.keywords["submodules"], "experts")
