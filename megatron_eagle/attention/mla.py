"""Patch Megatron's multi-latent attention (MLA) layers: RoPE angles, a missing norm, an epsilon.

Megatron's MLA computes angles of positions 0, 1, .. inside every layer. Here all layers ask one
module, to which packed documents and decoding give the angles of their own positions.

Shape letters: S positions, B sequences, d rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.rope import Rope, attention_factor, set_frequencies
from megatron_eagle.compat import MultiLatentAttention, RotaryEmbedding

NORM_EPS = 1e-6
"""Epsilon of the norms of latents in every MLA model so far, whatever its rms_norm_eps."""


class MLARotary(torch.nn.Module):
    """Rotary module shared by all MLA layers: returns (angles [S, 1 or B, 1, d], factor).

    The angles are of positions 0 .. length - 1, or those set by ``at``. ``factor`` multiplies cos
    and sin.
    """

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
        """Give the layers these angles [S, 1 or B, 1, d] inside the context."""
        self._angles = angles
        try:
            yield
        finally:
            self._angles = None


def patch_mla_layers(gpt: Any, rope: Rope, theta: float, norm: Callable[..., Any] | None) -> None:
    """Replace the rotary module of a GPTModel's MLA layers and set the norms of their latents.

    All layers share one new ``MLARotary``, which is also kept as ``gpt.mla_rotary``. Where queries
    have no low-rank projection, Megatron leaves out the norm of the key/value latent, too: it is
    added. The epsilon of all these norms becomes ``NORM_EPS``. That is how published models are; of
    a base that Megatron trained, the norms stay as they are.

    Args:
        gpt: the model, changed in place.
        rope: the base's description, empty for unscaled frequencies of ``theta``.
        theta: base of the frequencies.
        norm: builder of a norm, called with ``config``, ``hidden_size`` and ``eps``; None for a
            base that Megatron trained.
    """
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
        attention = getattr(layer, "self_attention", None)
        if not isinstance(attention, MultiLatentAttention):  # of a HybridModel, an MLP or experts
            continue
        attention.rotary_pos_emb = gpt.mla_rotary
        if norm is None:
            continue
        if config.q_lora_rank is None:
            attention.kv_layernorm = norm(config=config, hidden_size=config.kv_lora_rank, eps=0.0)
        # Transformer Engine fuses the norms into the projections after them.
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            module: Any = getattr(attention, name, None)
            if hasattr(module, "eps"):
                module.eps = NORM_EPS


def position_rotary(gpt: Any) -> Any:
    """Return the Megatron RotaryEmbedding of a GPTModel's layers, MLA or not; None without rope."""
    if gpt.config.multi_latent_attention:
        return gpt.mla_rotary.rotary
    return gpt.rotary_pos_emb if gpt.position_embedding_type == "rope" else None
