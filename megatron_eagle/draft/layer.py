"""Draft layer specs: any self-attention TransformerLayer spec, its first layer widened to 2H.

EAGLE-3's first layer reads [embedding ; hidden]. Two facts make Megatron's own TransformerLayer do
it, without a layer class of this package: an ``input_layernorm`` may return (output, residual), and
a linear's builder decides its input width. EAGLE-1 joins both by fc instead; its first layer has no
``input_layernorm``. S sequence, B micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import IdentityOp
from megatron_eagle.config import DraftSpec
from megatron_eagle.draft.live_queries import LiveQueryAttention, with_live_queries
from megatron_eagle.draft.mla import use_mla
from megatron_eagle.draft.moe import keep_balance_losses
from megatron_eagle.layers.backend import LayerBackend


class EmbeddingHiddenNorm(torch.nn.Module):
    """Two RMSNorms side by side: one of the embedding, one of the hidden state.

    [S, B, 2H] holding [embedding ; hidden] -> (normed [S, B, 2H], residual [S, B, H]); the residual
    is the un-normed hidden state, or the normed one with ``normed_residual``. Under sequence
    parallelism S is this rank's part, and the weights are marked so that their gradients are summed
    over TP.
    """

    def __init__(
        self,
        norm: Callable[..., torch.nn.Module],
        normed_residual: bool,
        config: Any,
        hidden_size: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.normed_residual = normed_residual
        self.embedding_norm = norm(config=config, hidden_size=hidden_size, eps=eps)
        self.hidden_norm = norm(config=config, hidden_size=hidden_size, eps=eps)

    def forward(self, embedding_and_hidden: Tensor) -> tuple[Tensor, Tensor]:
        embedding, hidden = embedding_and_hidden.chunk(2, dim=-1)
        normed_hidden = self.hidden_norm(hidden)
        normed = torch.cat([self.embedding_norm(embedding), normed_hidden], dim=-1)
        return normed, normed_hidden if self.normed_residual else hidden


def draft_layer_specs(backend: LayerBackend, config: Any, spec: DraftSpec) -> list[Any]:
    """Return TransformerLayer specs of the draft's ``config.num_layers`` layers.

    All attend through ``attention.core.EagleCoreAttention``. The first takes [S, B, 2H], or for an
    algorithm that joins both halves by ``fc`` [S, B, H] without a norm. The last one can make
    queries of some rows only.
    """
    layers = [backend.layer_spec(config) for _ in range(config.num_layers)]
    joined, linear = spec.method.joins_by_fc, backend.column_linear
    for number, layer in enumerate(layers):
        if config.num_moe_experts is not None:
            keep_balance_losses(layer)
        if config.multi_latent_attention:
            widening = 1 if joined or number else 2
            use_mla(layer, widening * config.hidden_size, backend.norm)
    _replace_linear(layers[0], linear)
    _let_queries_be_fewer(layers[-1], linear)
    if joined:
        layers[0].submodules.input_layernorm = IdentityOp
    else:
        norm = partial(EmbeddingHiddenNorm, backend.norm, spec.norm_before_residual)
        layers[0].submodules.input_layernorm = norm
        _double_input(layers[0])
    return layers


def _let_queries_be_fewer(layer_spec: Any, linear: Callable[..., Any]) -> None:
    """Let the layer make queries of some rows only, if its ``linear_qkv`` is a ``linear`` without a
    norm fused into it."""
    attention = layer_spec.submodules.self_attention
    if getattr(attention.submodules, "linear_qkv", None) is linear:
        attention.module = LiveQueryAttention
        attention.submodules.linear_qkv = with_live_queries(linear)


def _replace_linear(layer_spec: Any, linear: Callable[..., Any]) -> None:
    """Make ``linear_qkv`` of a ``linear`` without a norm; that of the layer, if it has one, has a
    checkpoint name of its own."""
    submodules = layer_spec.submodules
    if hasattr(submodules.self_attention.submodules, "linear_qkv"):
        submodules.self_attention.submodules.linear_qkv = linear
    submodules.sharded_state_dict_keys_map = {
        key: value
        for key, value in submodules.sharded_state_dict_keys_map.items()
        if not key.startswith("input_layernorm")
    }


def _double_input(layer_spec: Any) -> None:
    """Let ``linear_qkv`` read twice as many channels."""
    submodules = layer_spec.submodules.self_attention.submodules
    linear = getattr(submodules, "linear_qkv", None)
    if linear is None:
        return

    def build(input_size: int, output_size: int, **kwargs: Any) -> torch.nn.Module:
        module: torch.nn.Module = linear(2 * input_size, output_size, **kwargs)
        return module

    submodules.linear_qkv = build
