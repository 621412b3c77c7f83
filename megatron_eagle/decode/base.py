"""Frozen base with a key/value cache: runs tokens at any positions, returns features and ids.

B sequences, n tokens of each in a forward, H hidden size, A aux layers, d head size, N token ids.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.attention.mla import position_rotary
from megatron_eagle.checkpoint.hybrid_pattern import is_recurrent
from megatron_eagle.decode.cache import KeyValueCache
from megatron_eagle.decode.token_padding import TokenPadding
from megatron_eagle.decode.vocab_argmax import vocab_argmax
from megatron_eagle.errors import UserError
from megatron_eagle.parallel.vocab import VocabShard
from megatron_eagle.pipeline.exchange import StageExchange
from megatron_eagle.pipeline.links import Message
from megatron_eagle.teacher.base import FrozenBase
from megatron_eagle.teacher.embedding import token_embeddings


@dataclass(frozen=True)
class Forward:
    """Forward of ``count`` tokens per sequence whose part on this pipeline stage is done.

    output: this rank's part of [n, B, H], sent to the next stage by ``message``.
    aux_hidden: the aux hidden states of this stage's layers, by layer id.
    """

    count: int
    output: Tensor
    aux_hidden: dict[int, Tensor]
    message: Message | None


class CachedBase:
    """Frozen base that decodes with a cache, in any layout.

    Its layers must attend through ``EagleCoreAttention`` (``attention/core.py``). Context-parallel
    ranks do not cut the sequence: each decodes by itself. Embedding and decoder are run directly,
    because ``GPTModel.forward`` supports positions 0 .. S-1 only. All ranks of a tensor-parallel
    group and all pipeline stages, joined by ``exchange``, call every method alike and get the same
    results. With ``read_aux`` false the aux hidden states are not exchanged.
    """

    def __init__(
        self, base: FrozenBase, exchange: StageExchange | None = None, read_aux: bool = True
    ) -> None:
        self.base, self.gpt = base, base.gpt
        self.aux_layers = base.capture.layers if read_aux else ()
        self.tp_group = base.tp_group
        self.exchange = exchange or StageExchange(base)
        self.padding = TokenPadding.of(base.config, base.tp_group)
        _check_recurrent(base)
        weight = base.output_weight
        self.device = weight.device
        shard = VocabShard.of(base.vocab_size, self.tp_group, weight.shape[0])
        self._head = weight.detach()[: shard.rows]
        self._ids = torch.arange(shard.start, shard.start + shard.rows, device=self.device)

    def new_cache(self, capacity: int) -> KeyValueCache:
        """Return an empty cache for positions below ``capacity``."""
        return KeyValueCache(capacity + self.padding.spare)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of ``tokens`` [B, n]: this rank's part of [n, B, H]. One all-reduce
        over TP, or a reduce-scatter under sequence parallelism."""
        return token_embeddings(
            tokens,
            self.base.embedding_weight,
            self.base.vocab_size,
            self.tp_group,
            self.base.config.sequence_parallel,
        )

    def rotary(self, positions: Tensor, capacity: int) -> Tensor:
        """Return the RoPE angles [n, B, 1, d] of ``positions`` [B, n], all below ``capacity``."""
        # packed_seq: not cut over CP.
        return position_rotary(self.gpt)(capacity, packed_seq=True)[:, 0][positions.t()]

    def run(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """Run one forward: ``begin`` and ``finish``."""
        return self.finish(self.begin(tokens, positions, cache))

    def begin(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache) -> Forward:
        """Run this pipeline stage's layers on tokens at ``positions`` [B, n] and send the output to
        the next stage. Collectives: those of the layers, and one message per link."""
        count = tokens.shape[1]
        tokens, positions = self.padding.pad(tokens, positions)
        cache.place(positions)
        output = self._run_stage(tokens, positions, cache)
        return Forward(count, output, self.base.capture.take(), self.exchange.send_hidden(output))

    def finish(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """Return the draft's features and the final hidden state [n, B, H].

        Features are the concatenated aux hidden states [n, B, A * H]; without aux layers (EAGLE-1)
        the final hidden state. Collectives: over the pipeline one broadcast of the final hidden
        state and of each stage's aux hidden states; a gather of both over TP under sequence
        parallelism.
        """
        if forward.message is not None:
            forward.message.wait()
        output, count = forward.output, forward.count
        final = self.padding.gather(self.exchange.broadcast_last(output), count)
        if not self.aux_layers:
            return final, final
        shape = (output.shape[0], output.shape[1])
        aux_hidden = self.exchange.broadcast_aux(forward.aux_hidden, shape)
        return torch.cat([self.padding.gather(x, count) for x in aux_hidden], dim=-1), final

    def _run_stage(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
        """Run this stage's layers; return this rank's part of [n, B, H]."""
        angles = self.rotary(positions, cache.capacity) if self.base.has_rotary else None
        hidden = None
        shape = (tokens.shape[1] // self.padding.parts, tokens.shape[0])
        message = self.exchange.receive_hidden(shape)
        if message is None:
            hidden = self.gpt.embedding(input_ids=tokens, position_ids=positions)
        else:
            self.gpt.decoder.set_input_tensor(message.wait())
        mla = self.gpt.config.multi_latent_attention
        with self.gpt.mla_rotary.at(angles) if mla and angles is not None else nullcontext():
            return self.gpt.decoder(
                hidden_states=hidden,
                attention_mask=cache,
                rotary_pos_emb=None if mla else angles,
            )

    def argmax(self, hidden: Tensor) -> Tensor:
        """Return the greedy ids [...] of final hidden states [..., H]. One all-gather over TP, one
        broadcast over the pipeline."""
        return self.exchange.broadcast_last(
            vocab_argmax(hidden, self._head, self._ids, self.tp_group)
        )

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits [N] of ``tokens`` [N] for one final hidden state [H]. One all-reduce
        over TP."""
        in_shard = (tokens.unsqueeze(1) == self._ids).to(hidden.dtype)
        logits = in_shard @ (self._head @ hidden)
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(logits, group=self.tp_group)
        return logits


def _check_recurrent(base: FrozenBase) -> None:
    """Raise ``UserError`` for recurrent layers whose sequences other ranks would cut."""
    pattern = getattr(base.gpt, "hybrid_layer_pattern", None)
    cut = base.cp_group.size() > 1 or base.config.sequence_parallel
    if cut and is_recurrent({"hybrid_layer_pattern": pattern}):
        raise UserError(
            "<context_parallel_size>: a base with recurrent layers (G or M in its "
            "hybrid_layer_pattern) decodes whole sequences; leave context parallelism out"
        )
