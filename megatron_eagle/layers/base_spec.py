"""Specify the base's layers, dense or MoE: of Megatron-Core's own modules or Transformer Engine's.

Checkpoint keys are the same for both. Transformer Engine fuses a norm into the linear layer after
it, so the norm's key starts with that layer's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_eagle.attention.core import with_eagle_attention
from megatron_eagle.compat import WrappedTorchNorm, get_gpt_decoder_block_spec, require
from megatron_eagle.layers.group_router import GroupLimitedRouter
from megatron_eagle.layers.zero_centered_norm import ZeroCenteredNorm, use_zero_centered_norms

_HETEROGENEOUS = (
    "megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs:"
    "get_gpt_heterogeneous_layer_spec"
)
NORM_BEFORE_QKV = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
MLA_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
NORM_BEFORE_FC1 = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def local_base_spec(config: Any, pp_rank: int, native: bool = False) -> Any:
    """Return the TransformerBlockSubmodules of the layers of pipeline stage ``pp_rank``, made of
    Megatron-Core's own modules and our core attention.

    ``native``: Megatron trained the base, so experts are routed as Megatron routes them.
    """
    if config.heterogeneous_block_specs:
        return _heterogeneous_spec(config, pp_rank, transformer_engine=False, ours=True)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        pp_rank=pp_rank,
    )
    # Where Apex is installed, Megatron takes its layer norm here, which is no RMSNorm.
    block.layer_norm = WrappedTorchNorm
    for spec in _distinct_layers(block):
        with_eagle_attention(spec)
        spec.submodules.sharded_state_dict_keys_map = checkpoint_names(config, spec)
        if config.layernorm_zero_centered_gamma:
            use_zero_centered_norms(spec.submodules)
        _limit_groups(config, spec, native)
    if config.layernorm_zero_centered_gamma:
        block.layer_norm = ZeroCenteredNorm
    return block


def transformer_engine_base_spec(
    config: Any, pp_rank: int, native: bool = False, *, keeps_states: bool
) -> Any:
    """Return the TransformerBlockSubmodules of the layers of pipeline stage ``pp_rank``, made of
    Transformer Engine's modules.

    Its own core attention is causal and no more. Ours takes its place if it ``keeps_states`` (an
    ``AttentionState`` for packed documents or decoding), and for windows and sinks. ``native``: as
    for :func:`local_base_spec`.
    """
    ours = keeps_states or config.window_size is not None or config.softmax_type != "vanilla"
    if config.heterogeneous_block_specs:
        return _heterogeneous_spec(config, pp_rank, transformer_engine=True, ours=ours)
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, qk_l2_norm=config.qk_l2_norm, pp_rank=pp_rank
    )
    for spec in _distinct_layers(block):
        if ours:
            with_eagle_attention(spec)
        if config.multi_latent_attention and config.q_lora_rank is None:
            # ``attention.mla`` adds the norm of the key/value latent, fused into nothing.
            spec.submodules.sharded_state_dict_keys_map = {
                **spec.submodules.sharded_state_dict_keys_map,
                **MLA_NORMS,
            }
        _limit_groups(config, spec, native)
    return block


def _heterogeneous_spec(config: Any, pp_rank: int, *, transformer_engine: bool, ours: bool) -> Any:
    """Return Megatron's spec of layers that differ in their parts; ``ours``: with our core
    attention in those that have attention."""
    block = require(_HETEROGENEOUS)(config, transformer_engine, pp_rank=pp_rank)
    for spec in block.layer_specs if ours else ():
        if spec.submodules.self_attention.submodules is not None:
            with_eagle_attention(spec)
    return block


def checkpoint_names(config: Any, layer_spec: Any) -> dict[str, str]:
    """Map prefixes of a local layer's parameters to prefixes in a checkpoint, where they differ."""
    return {
        **(MLA_NORMS if config.multi_latent_attention else NORM_BEFORE_QKV),
        **({} if _is_moe(layer_spec) else NORM_BEFORE_FC1),
    }


def _distinct_layers(block: Any) -> Iterator[Any]:
    """Yield each layer's spec once: equal layers share an object."""
    yield from {id(spec): spec for spec in block.layer_specs}.values()


def _limit_groups(config: Any, layer_spec: Any, native: bool) -> None:
    """Give a MoE layer of an imported base that routes to groups of experts the router that scores
    groups as its family does; Megatron's own scores them as Megatron trained a ``native`` one."""
    if config.moe_router_num_groups is not None and _is_moe(layer_spec) and not native:
        layer_spec.submodules.mlp.keywords["submodules"].router = GroupLimitedRouter


def _is_moe(layer_spec: Any) -> bool:
    """Return whether a layer has experts; both kinds of MLP are partials with ``submodules``."""
    return hasattr(layer_spec.submodules.mlp.keywords["submodules"], "experts")
