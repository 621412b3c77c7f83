"""Specify the layers of a HybridModel, made of Megatron-Core's own modules or of Transformer
Engine's.

Megatron's specification is Transformer Engine's alone. Checkpoint keys are the same for both, as
in ``base_spec``: Transformer Engine fuses a norm into the linear layer after it.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron_eagle.attention.core import with_eagle_attention
from megatron_eagle.checkpoint.hybrid_pattern import DELTA_NET, MAMBA, symbols
from megatron_eagle.compat import (
    ColumnParallelLinear,
    HybridStack,
    IdentityOp,
    RowParallelLinear,
    WrappedTorchNorm,
    get_gpt_layer_local_spec,
    hybrid_stack_spec,
)
from megatron_eagle.layers.base_spec import NORM_BEFORE_FC1, NORM_BEFORE_QKV
from megatron_eagle.layers.recurrent import check_mamba, delta_net, remembering
from megatron_eagle.layers.zero_centered_norm import ZeroCenteredNorm

NORM_BEFORE_IN_PROJ = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
NORM_BEFORE_MIXER = {"norm.": "mixer.in_proj.layer_norm_"}


class LocalHybridStack(HybridStack):
    """Megatron's stack of hybrid layers, with a final norm that needs no Transformer Engine."""

    def __init__(self, config: Any, submodules: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, **kwargs, post_layer_norm=False)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = _norm(config)(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def local_hybrid_spec(config: Any, pattern: str, native: bool) -> Any:
    """Return the HybridStack spec of the layers in ``pattern``, made of Megatron-Core's own modules
    and our core attention.

    ``native``: Megatron trained the base; the gated delta nets of any other have the output norm of
    Hugging Face's, whose weight multiplies as it is. Raises ``UserError`` for layers whose kernels
    are not installed.
    """
    stack = _stack(pattern, native)
    stack.module = LocalHybridStack
    layers, norm = stack.submodules, _norm(config)
    for layer, latent in ((layers.attention_layer, False), (layers.mla_layer, True)):
        local = _local_layer(config, multi_latent_attention=latent).submodules
        layer.submodules.input_layernorm = norm
        layer.submodules.self_attention = local.self_attention
        layer.submodules.sharded_state_dict_keys_map = {} if latent else NORM_BEFORE_QKV
        with_eagle_attention(layer)
        _norm_heads(local.self_attention.submodules, norm)
    layers.mlp_layer.submodules.mlp = _local_layer(config).submodules.mlp
    layers.mlp_layer.submodules.sharded_state_dict_keys_map = NORM_BEFORE_FC1
    if config.num_moe_experts is not None:
        experts = _local_layer(config, num_experts=config.num_moe_experts)
        layers.moe_layer.submodules.mlp = experts.submodules.mlp
    for layer in (layers.mlp_layer, layers.moe_layer):
        layer.submodules.pre_mlp_layernorm = norm
    layers.gdn_layer.submodules.input_layernorm = norm
    layers.gdn_layer.submodules.sharded_state_dict_keys_map = NORM_BEFORE_IN_PROJ
    own_norm = norm if native else _plain(WrappedTorchNorm)
    layers.gdn_layer.submodules.self_attention.submodules.out_norm = own_norm
    layers.mamba_layer.submodules.norm = norm
    layers.mamba_layer.submodules.sharded_state_dict_keys_map = NORM_BEFORE_MIXER
    for mixer in (layers.gdn_layer.submodules.self_attention, layers.mamba_layer.submodules.mixer):
        mixer.submodules.in_proj = ColumnParallelLinear
        mixer.submodules.out_proj = RowParallelLinear
    return stack


def transformer_engine_hybrid_spec(
    config: Any, pattern: str, native: bool, *, keeps_states: bool
) -> Any:
    """Return Megatron's own HybridStack spec, made of Transformer Engine's modules.

    Its core attention is replaced as ``base_spec.transformer_engine_base_spec`` says, and the norms
    of gated delta nets as ``local_hybrid_spec`` says.
    """
    stack = _stack(pattern, native)
    if not native:
        delta_net = stack.submodules.gdn_layer.submodules.self_attention.submodules
        delta_net.out_norm = _plain(delta_net.out_norm)
    ours = keeps_states or config.window_size is not None or config.softmax_type != "vanilla"
    for layer in (stack.submodules.attention_layer, stack.submodules.mla_layer) if ours else ():
        with_eagle_attention(layer)
    return stack


def _stack(pattern: str, native: bool) -> Any:
    """Return a copy of Megatron's specification in which recurrent layers can decode."""
    stack = _copied(hybrid_stack_spec)
    layers = stack.submodules
    layers.mtp_block_spec = None
    if MAMBA in symbols(pattern):
        check_mamba()
    if DELTA_NET in symbols(pattern):
        layers.gdn_layer.submodules.self_attention.module = delta_net(native)
    for layer in (layers.gdn_layer, layers.mamba_layer):
        layer.module = remembering(layer.module)
    return stack


def _copied(spec: Any) -> Any:
    """Copy a ModuleSpec and those inside it, and none of the modules that they name."""
    spec = copy.copy(spec)
    if spec.submodules is not None:
        spec.submodules = copy.copy(spec.submodules)
        for name, value in vars(spec.submodules).items():
            if isinstance(value, type(spec)):
                setattr(spec.submodules, name, _copied(value))
    return spec


def _local_layer(config: Any, **kind: Any) -> Any:
    return get_gpt_layer_local_spec(
        normalization=config.normalization, qk_layernorm=config.qk_layernorm, **kind
    )


def _norm(config: Any) -> Any:
    return ZeroCenteredNorm if config.layernorm_zero_centered_gamma else WrappedTorchNorm


def _plain(norm: Any) -> type:
    """Return a class that builds ``norm`` with a weight that multiplies as it is, also among norms
    whose weight is stored as its difference from 1."""

    class PlainNorm:
        def __new__(cls, config: Any, **kwargs: Any) -> Any:
            config = copy.copy(config)
            config.layernorm_zero_centered_gamma = False
            return norm(config=config, **kwargs)

    return PlainNorm


def _norm_heads(attention: Any, norm: Any) -> None:
    """Build the norms of queries and keys, where there are any, by ``norm``."""
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(attention, name, IdentityOp) is not IdentityOp:
            setattr(attention, name, norm)
