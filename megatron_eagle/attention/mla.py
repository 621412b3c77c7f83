"""What multi-latent attention needs of ours: RoPE angles handed in, and its norms' epsilon.

Megatron's MLA computes angles of positions 0, 1, .. inside every layer. Here all layers ask one
module, which packed documents and decoding give the angles of their own positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.rope import Rope, attention_factor, set_frequencies
from megatron_eagle.compat import RotaryEmbedding

NORM_EPS = 1e-6
"""The latent norms' in every MLA model so far: their layers do not pass rms_norm_eps on."""


class MLARotary(torch.nn.Module):
    """In place of the rotary module of every MLA layer: (angles [S, 1 or B, 1, d], factor)."""

    def __init__(self, rotary: Any, factor: float) -> None:
        super().__init__()
        self.rotary, self.factor = rotary, factor
        self.get_rotary_seq_len = rotary.get_rotary_seq_len
        self._angles: Tensor | None = None

    def forward(self, length: int, packed_seq: bool = False) -> tuple[Tensor, float]:
        if self._angles is not None:
            return self._angles, self.factor
        return self.rotary(length, packed_seq=packed_seq), self.factor

    @contextmanager
    def at(self, angles: Tensor) -> Iterator[None]:
        """Inside, the layers' rows have these angles [S, 1 or B, 1, d]."""
        self._angles = angles
        try:
            yield
        finally:
            self._angles = None


def patch_mla_layers(gpt: Any, rope: Rope, theta: float, norm: Callable[..., Any]) -> None:
    """Give the MLA layers of a GPTModel ``gpt.mla_rotary`` and the norms they lack."""
    config = gpt.config
    rotary = RotaryEmbedding(
        config.qk_pos_emb_head_dim,
        1.0,
        rotary_base=theta,
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=gpt.pg_collection.cp,
    )
    if rope:
        set_frequencies(rotary, rope)
    gpt.mla_rotary = MLARotary(rotary, attention_factor(rope))
    for layer in gpt.decoder.layers:
        attention = layer.self_attention
        attention.rotary_pos_emb = gpt.mla_rotary
        if config.q_lora_rank is None:
            attention.kv_layernorm = norm(config=config, hidden_size=config.kv_lora_rank, eps=0.0)
        # Transformer Engine fuses the norms into the projections after them.
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            module: Any = getattr(attention, name, None)
            if hasattr(module, "eps"):
                module.eps = NORM_EPS


def position_rotary(gpt: Any) -> Any:
    """The Megatron RotaryEmbedding of the base's layers, MLA or not."""
    return gpt.mla_rotary.rotary if gpt.config.multi_latent_attention else gpt.rotary_pos_emb
