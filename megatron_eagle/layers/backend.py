"""Which modules a layer is made of: Megatron-Core's own, or Transformer Engine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_eagle.attention.core import with_eagle_attention
from megatron_eagle.compat import (
    MLP,
    LocalSpecProvider,
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    require,
)
from megatron_eagle.layers.base_spec import checkpoint_names, local_base_spec
from megatron_eagle.layers.lean_layers import GatedMLP, RMSNorm


@dataclass(frozen=True)
class LayerBackend:
    """Builders of one implementation.

    ``base_spec(config, pp_rank)`` gives the spec of the base's block on a pipeline stage and
    ``layer_spec(config)`` a TransformerLayer spec of the draft; ``norm`` and ``column_linear``
    build a norm and an un-normed column-parallel linear.
    """

    base_spec: Callable[[Any, int], Any]
    layer_spec: Callable[[Any], Any]
    norm: Callable[..., Any]
    column_linear: Callable[..., Any]


def local_backend() -> LayerBackend:
    """Modules of Megatron-Core alone (``--transformer-impl local``), RMSNorm."""
    provider = LocalSpecProvider()

    def layer_spec(config: Any) -> Any:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            normalization="RMSNorm",
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
        spec.submodules.sharded_state_dict_keys_map = checkpoint_names(config, spec)
        return with_eagle_attention(_lean(spec))

    return LayerBackend(
        base_spec=local_base_spec,
        layer_spec=layer_spec,
        norm=RMSNorm,
        column_linear=provider.column_parallel_linear(),
    )


def transformer_engine_backend() -> LayerBackend:
    """Transformer Engine's modules; raises ``ValueError`` where it is not installed."""
    if not require("megatron.core.extensions.transformer_engine:HAVE_TE"):
        raise ValueError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed; "
            "use --transformer-impl local"
        )
    provider = require("megatron.core.extensions.transformer_engine_spec_provider:TESpecProvider")()

    def layer_spec(config: Any) -> Any:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
        return with_eagle_attention(spec)

    return LayerBackend(
        base_spec=lambda config, pp_rank: get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, pp_rank=pp_rank
        ),
        layer_spec=layer_spec,
        norm=provider.layer_norm(),
        column_linear=provider.column_parallel_linear(),
    )


def _lean(layer_spec: Any) -> Any:
    """``layer_spec`` (changed in place) with the modules of
    :mod:`~megatron_eagle.layers.lean_layers`; parameters and checkpoint keys stay the same."""
    layer = layer_spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if layer.mlp.func == MLP.as_mlp_submodule:
        layer.mlp = partial(GatedMLP.as_mlp_submodule, **layer.mlp.keywords)
    return layer_spec
