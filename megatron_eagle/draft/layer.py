"""Draft layer specs: any self-attention TransformerLayer spec, its first layer widened to 2H.

The first layer reads [embedding ; hidden]. Two facts make Megatron's own TransformerLayer do it,
with no layer class of ours: an ``input_layernorm`` may return (output, residual), and a linear's
builder decides its input width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.backend import LayerBackend


class EmbeddingHiddenNorm(torch.nn.Module):
    """Norm of the embedding beside norm of the hidden; the residual stays the un-normed hidden.

    [S, B, 2H] holding [embedding ; hidden] -> ([S, B, 2H], [S, B, H]). Under sequence parallelism
    S is this rank's part, and the weights are marked so that their gradients are summed over TP.
    """

    def __init__(
        self, norm: Callable[..., torch.nn.Module], config: Any, hidden_size: int, eps: float
    ) -> None:
        super().__init__()
        self.embedding_norm = norm(config=config, hidden_size=hidden_size, eps=eps)
        self.hidden_norm = norm(config=config, hidden_size=hidden_size, eps=eps)

    def forward(self, embedding_and_hidden: Tensor) -> tuple[Tensor, Tensor]:
        embedding, hidden = embedding_and_hidden.chunk(2, dim=-1)
        normed = torch.cat([self.embedding_norm(embedding), self.hidden_norm(hidden)], dim=-1)
        return normed, hidden


def draft_layer_specs(backend: LayerBackend, config: Any) -> list[Any]:
    """TransformerLayer specs of the draft's ``config.num_layers`` layers.

    All of them attend through :class:`~megatron_eagle.attention.core.EagleCoreAttention`; the first
    one takes [S, B, 2H].
    """
    specs = [backend.layer_spec(config) for _ in range(config.num_layers)]
    _widen_input(specs[0], backend)
    return specs


def _widen_input(layer_spec: Any, backend: LayerBackend) -> None:
    submodules = layer_spec.submodules

    def embedding_hidden_norm(config: Any, hidden_size: int, eps: float) -> torch.nn.Module:
        return EmbeddingHiddenNorm(backend.norm, config, hidden_size, eps)

    submodules.input_layernorm = embedding_hidden_norm
    # The two norms cannot be fused into linear_qkv, so they keep their own checkpoint names.
    submodules.self_attention.submodules.linear_qkv = _doubled_input(backend.column_linear)
    submodules.sharded_state_dict_keys_map = {
        key: value
        for key, value in submodules.sharded_state_dict_keys_map.items()
        if not key.startswith("input_layernorm")
    }


def _doubled_input(linear: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    def build(input_size: int, output_size: int, **kwargs: Any) -> torch.nn.Module:
        return linear(2 * input_size, output_size, **kwargs)

    return build
