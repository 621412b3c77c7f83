"""Choose the modules that layers are made of: Megatron-Core's own, or Transformer Engine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_eagle.attention.core import with_eagle_attention
from megatron_eagle.compat import (
    MLP,
    LocalSpecProvider,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    require,
)
from megatron_eagle.errors import UserError
from megatron_eagle.layers.base_spec import (
    checkpoint_names,
    local_base_spec,
    transformer_engine_base_spec,
)
from megatron_eagle.layers.hybrid_spec import local_hybrid_spec, transformer_engine_hybrid_spec
from megatron_eagle.layers.lean_layers import GatedMLP, RMSNorm


@dataclass(frozen=True)
class LayerBackend:
    """Builders of one implementation.

    Attributes:
        base_spec: (config, pp_rank, native) -> spec of the base's block on a pipeline stage;
            ``native``: Megatron trained it.
        hybrid_spec: (config, pattern, native) -> spec of the stack of a HybridModel.
        layer_spec: config -> TransformerLayer spec of the draft.
        norm: builds a norm.
        column_linear: class of a column-parallel linear without a norm in front.
    """

    base_spec: Callable[[Any, int, bool], Any]
    hybrid_spec: Callable[[Any, str, bool], Any]
    layer_spec: Callable[[Any], Any]
    norm: Callable[..., Any]
    column_linear: type[Any]


LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"
"""The implementations, as ``TransformerConfig.transformer_impl`` names them."""


def backend_of(implementation: str, *, keeps_states: bool = True) -> LayerBackend:
    """Return the builders of ``implementation``; ``keeps_states`` and errors as those of
    ``transformer_engine_backend``."""
    if implementation == LOCAL:
        return local_backend()
    assert implementation == TRANSFORMER_ENGINE, implementation
    return transformer_engine_backend(keeps_states=keeps_states)


def local_backend() -> LayerBackend:
    """Return the builders of Megatron-Core's own modules (``transformer_impl`` local), RMSNorm."""
    provider = LocalSpecProvider()

    def layer_spec(config: Any) -> Any:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            normalization="RMSNorm",
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
        spec.submodules.sharded_state_dict_keys_map = checkpoint_names(config, spec)
        head_norms = config.qk_layernorm and not config.multi_latent_attention
        return with_eagle_attention(_lean(spec, head_norms))

    return LayerBackend(
        base_spec=local_base_spec,
        hybrid_spec=local_hybrid_spec,
        layer_spec=layer_spec,
        norm=RMSNorm,
        column_linear=provider.column_parallel_linear(),
    )


def transformer_engine_backend(*, keeps_states: bool = True) -> LayerBackend:
    """Return the builders of Transformer Engine's modules.

    Args:
        keeps_states: the base will be given attention states (packed documents, decoding); its core
            attention is then ours.

    Raises:
        UserError: Transformer Engine is not installed.
    """
    if not require("megatron.core.extensions.transformer_engine:HAVE_TE"):
        raise UserError(
            "<transformer_impl> transformer_engine: Transformer Engine is not installed; "
            "use <transformer_impl> local"
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
        base_spec=partial(transformer_engine_base_spec, keeps_states=keeps_states),
        hybrid_spec=partial(transformer_engine_hybrid_spec, keeps_states=keeps_states),
        layer_spec=layer_spec,
        norm=provider.layer_norm(),
        column_linear=provider.column_parallel_linear(),
    )


def _lean(layer_spec: Any, has_head_norms: bool) -> Any:
    """Return ``layer_spec``, changed in place, with the modules of ``lean_layers``.

    ``has_head_norms``: whether queries and keys are normed. Parameters and checkpoint keys stay the
    same.
    """
    layer = layer_spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if has_head_norms:
        attention = layer.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if layer.mlp.func == MLP.as_mlp_submodule:
        layer.mlp = partial(GatedMLP.as_mlp_submodule, **layer.mlp.keywords)
    return layer_spec
