"""MTPDraft: the base's own next-token module as a draft.

    x = fc [embedding_norm(embedding) ; hidden_norm(hidden)]      out = norm(layer(x))

The layer is one of the base's kind, dense or with experts, of grouped queries or multi-latent
attention. The head is the base's output layer. Step 0 reads the base's final hidden state, every
later one the step before's output.

Shape letters: S' this rank's tokens, B micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.mla import NORM_EPS
from megatron_eagle.draft.features import FeatureProjection
from megatron_eagle.draft.frozen_router import freeze_router
from megatron_eagle.draft.head import SharedHead
from megatron_eagle.draft.layer import let_queries_be_fewer
from megatron_eagle.draft.mla import use_mla
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.layers.backend import LayerBackend


class MTPDraft(EagleDraft):
    """A next-token module; arguments are ``EagleDraft``'s.

    Routers are frozen: a fine-tuning of the module alone has no balance loss, and the bias by which
    a router chooses is no weight. Gradients go through them to the hidden state.
    """

    def _build_inputs(self, backend: LayerBackend) -> None:
        config = self.config
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.embedding_norm = backend.norm(config=config, hidden_size=size, eps=eps)
        self.hidden_norm = backend.norm(config=config, hidden_size=size, eps=eps)
        self.fc = FeatureProjection(config, 2 * size, self.tp_group)
        self.fc_norm = torch.nn.ModuleList()
        self.input_norm = None

    def _layer_specs(self, backend: LayerBackend) -> list[Any]:
        layer = backend.layer_spec(self.config)
        if self.config.num_moe_experts is not None:
            freeze_router(layer, self.config)
        if self.config.multi_latent_attention:
            use_mla(layer, self.config.hidden_size, backend.norm)
        let_queries_be_fewer(layer, backend.column_linear)
        return [layer]

    def _build_head(self, backend: LayerBackend, base_head: Callable[[], Tensor]) -> None:
        config = self.config
        if config.multi_latent_attention:
            attention: Any = self.layers[0].self_attention
            for name in ("q_layernorm", "kv_layernorm"):
                if hasattr(attention, name):
                    getattr(attention, name).eps = NORM_EPS  # as in the base's layers
        self.norm = backend.norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.lm_head = SharedHead(config, base_head, self.shard)

    def join_by_fc(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Norm both, and run fc on them side by side: [S', B, H] each -> [S', B, H]. Collectives:
        fc's."""
        normed = self.concatenate(self.embedding_norm(embedding), self.hidden_norm(hidden))
        return self.fc(self.fc.summing_gradient(normed))
