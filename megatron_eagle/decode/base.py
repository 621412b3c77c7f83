"""The base with a key/value cache: tokens at given positions in, captured layers and ids out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.latent import position_rotary
from megatron_eagle.decode.cache import KeyValueCache
from megatron_eagle.decode.vocab_argmax import vocab_argmax
from megatron_eagle.parallel.vocab import VocabShard
from megatron_eagle.teacher.base import output_rows


class CachedBase:
    """A GPTModel, whole on this pipeline stage, whose layers attend through
    :class:`~megatron_eagle.attention.core.EagleCoreAttention`.

    Its embedding and decoder are run directly, since ``GPTModel.forward`` knows positions 0 .. S-1
    only. ``captured`` are 0-based layers whose outputs :meth:`run` returns; no hook is left behind.
    Raises ``ValueError`` under sequence parallelism: single rows cannot be cut over ranks.
    """

    def __init__(self, gpt: Any, vocab_size: int, captured: Sequence[int] = ()) -> None:
        if gpt.config.sequence_parallel:
            raise ValueError("--sequence-parallel: decoding works without it only")
        self.gpt, self.captured = gpt, tuple(captured)
        self.tp_group = gpt.pg_collection.tp
        weight = output_rows(gpt)
        self.device = weight.device
        shard = VocabShard.of(vocab_size, self.tp_group, weight.shape[0])
        self._head = weight.detach()[: shard.rows]
        self._ids = torch.arange(shard.start, shard.start + shard.rows, device=self.device)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens and positions [B, n] -> [n, B, H]. One all-reduce over TP."""
        return self.gpt.embedding(input_ids=tokens, position_ids=positions)

    def rotary(self, positions: Tensor, capacity: int) -> Tensor:
        """RoPE angles [n, B, 1, d] of ``positions`` [B, n], all below ``capacity``."""
        return position_rotary(self.gpt)(capacity)[:, 0][positions.t()]

    def run(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """tokens and positions [B, n] -> what a draft reads and the final hidden [n, B, H]. A draft
        reads the captured layers [n, B, A * H], or if none are, the final hidden (EAGLE-1).
        Collectives: those of one forward."""
        cache.place(positions)
        angles = self.rotary(positions, cache.capacity)
        latent = self.gpt.config.multi_latent_attention
        with self.gpt.latent_rotary.at(angles) if latent else nullcontext():
            output = self.gpt.decoder(
                hidden_states=self.embed(tokens, positions),
                attention_mask=cache,
                rotary_pos_emb=None if latent else angles,
                extract_layer_indices=set(self.captured),
            )
        if not self.captured:
            return output, output
        final, layers = output
        return torch.cat(layers, dim=-1), final

    def argmax(self, hidden: Tensor) -> Tensor:
        """Greedy ids [...] after final hidden [..., H]; one all-gather over TP."""
        return vocab_argmax(hidden, self._head, self._ids, self.tp_group)

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The logits of ``tokens`` [N] after one final hidden [H]; one all-reduce over TP."""
        mine = (tokens.unsqueeze(1) == self._ids).to(hidden.dtype)
        logits = mine @ (self._head @ hidden)
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(logits, group=self.tp_group)
        return logits
