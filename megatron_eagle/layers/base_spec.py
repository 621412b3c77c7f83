"""The base's layers out of Megatron-Core's own modules: dense or MoE, our core attention.

Checkpoint keys are those of Transformer Engine's layers, whatever the modules: a norm that TE fuses
into the linear layer after it carries that layer's name.
"""

from __future__ import annotations

from typing import Any

from megatron_eagle.attention.core import with_eagle_attention
from megatron_eagle.compat import get_gpt_decoder_block_spec
from megatron_eagle.layers.group_router import GroupLimitedRouter

NORM_BEFORE_QKV = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
MLA_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
NORM_BEFORE_FC1 = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def local_base_spec(config: Any, pp_rank: int) -> Any:
    """TransformerBlockSubmodules of the layers of pipeline stage ``pp_rank``."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", pp_rank=pp_rank
    )
    # Megatron's specs of equal layers are one object.
    for spec in {id(spec): spec for spec in block.layer_specs}.values():
        with_eagle_attention(spec)
        spec.submodules.sharded_state_dict_keys_map = checkpoint_names(config, spec)
        if config.moe_router_num_groups is not None and _is_moe(spec):
            spec.submodules.mlp.keywords["submodules"].router = GroupLimitedRouter
    return block


def checkpoint_names(config: Any, layer_spec: Any) -> dict[str, str]:
    """The names in a checkpoint of what a local layer calls otherwise, by prefix."""
    return {
        **(MLA_NORMS if config.multi_latent_attention else NORM_BEFORE_QKV),
        **({} if _is_moe(layer_spec) else NORM_BEFORE_FC1),
    }


def _is_moe(layer_spec: Any) -> bool:
    # Both kinds of MLP are partials: of MoELayer, or of MLP.as_mlp_submodule.
    return hasattr(layer_spec.submodules.mlp.keywords["submodules"], "experts")
